// AArch64 with the 8-bit matrix multiplication (FEAT_I8MM, ARMv8.6: Neoverse V1 and N2, Graviton 3, Apple M2): smmla
// multiplies two rows of eight codes by two columns of eight weights and adds four sums, twice what sdot does at once.
//
// The register holds sums of two rows: lanes (r, c) (r, c + 1) (r + 1, c) (r + 1, c + 1).  What is not the product is
// neon.cpp's.
#include "internal.h"

#ifdef W8A8_ARM_I8MM
#include <arm_neon.h>

#ifdef __linux__
#include <sys/auxv.h>
#ifndef HWCAP2_I8MM
#define HWCAP2_I8MM (1 << 13)
#endif
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#ifdef __clang__
#define W8A8_I8MM "dotprod,i8mm"
#else
#define W8A8_I8MM "arch=armv8.2-a+dotprod+i8mm"
#endif

namespace w8a8 {
namespace {

bool has_i8mm() {
#ifdef __linux__
  return getauxval(AT_HWCAP2) & HWCAP2_I8MM;
#elif defined(__APPLE__)
  int found = 0;
  size_t size = sizeof found;
  return sysctlbyname("hw.optional.arm.FEAT_I8MM", &found, &size, nullptr, 0) == 0 && found;
#else
  return false;
#endif
}

bool usable() { return kNeonDot.usable() && has_i8mm(); }   // one row is sdot's

W8A8_TARGET_BEGIN(W8A8_I8MM)

// The sums of MR rows by 2 V columns.  Where MR is odd the last row makes a pair with itself.
template <int MR, int V, bool Fetch>
inline void columns(const int8_t *left, int64_t ld, const int8_t *panel, int64_t ksteps, int32_t *sums, Ahead fetch) {
  constexpr int kPairs = (MR + 1) / 2;
  int32x4_t acc[kPairs][V];
#pragma GCC unroll 8
  for (int p = 0; p < kPairs; ++p)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[p][v] = vdupq_n_s32(0);
  for (int64_t s = 0; s < ksteps; ++s, left += 8, panel += kPanelStep) {
    if (Fetch) fetch.step(2 * s), fetch.step(2 * s + 1);
    int8x16_t a[kPairs];
#pragma GCC unroll 8
    for (int p = 0; p < kPairs; ++p)
      a[p] = vcombine_s8(vld1_s8(left + 2 * p * ld), vld1_s8(left + (2 * p + 1 < MR ? 2 * p + 1 : 2 * p) * ld));
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const int8x16_t b = vld1q_s8(panel + 16 * v);
#pragma GCC unroll 8
      for (int p = 0; p < kPairs; ++p) {
        acc[p][v] = vmmlaq_s32(acc[p][v], a[p], b);
        __asm__ volatile("" : "+w"(acc[p][v]));   // holds the order: GCC 12 loads all first and spills sums
      }
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < kPairs; ++p)
#pragma GCC unroll 16
    for (int v = 0; v < V; v += 2) {   // two registers are four columns of either row
      const int64x2_t even = vreinterpretq_s64_s32(acc[p][v]), odd = vreinterpretq_s64_s32(acc[p][v + 1]);
      int32_t *to = sums + 2 * p * kPanel + 2 * v;
      vst1q_s32(to, vreinterpretq_s32_s64(vzip1q_s64(even, odd)));
      if (2 * p + 1 < MR) vst1q_s32(to + kPanel, vreinterpretq_s32_s64(vzip2q_s64(even, odd)));
    }
}

// V registers of two columns in a pass, and what remains of the panel in a last, narrower one, which prefetches nothing.
template <int MR, int V>
void tile(const void *left_, int64_t ld, const int8_t *panel, int64_t ksteps, int32_t *sums, const int8_t *ahead,
          int ahead_lines) {
  constexpr int kPasses = kPanel / (2 * V), kRest = kPanel / 2 % V;
  static_assert(V % 2 == 0 && kRest % 2 == 0, "registers are stored in pairs");
  const int8_t *left = static_cast<const int8_t *>(left_);
  for (int pass = 0; pass < kPasses; ++pass)
    columns<MR, V, true>(left, ld, panel + 16 * V * pass, ksteps, sums + 2 * V * pass,
                         Ahead(ahead, ahead_lines, 2 * ksteps, kPasses, pass));
  if constexpr (kRest > 0)
    columns<MR, kRest, false>(left, ld, panel + 16 * V * kPasses, ksteps, sums + 2 * V * kPasses,
                              Ahead(ahead, ahead_lines, 0));
}

double peak(int64_t rounds) {
  int32x4_t acc[16];
  int8x16_t a = vdupq_n_s8(3), b = vdupq_n_s8(5);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) acc[i] = vdupq_n_s32(0);
  for (int64_t n = 0; n < rounds; ++n) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      acc[i] = vmmlaq_s32(acc[i], a, b);
      __asm__ volatile("" : "+w"(acc[i]));
    }
  }
  return static_cast<double>(rounds) * 16 * 32 * 2;
}

W8A8_TARGET_END

}  // namespace

// Sixteen registers of sums up to four rows.  Beyond, 24 (3 pairs of rows by 8 or 4 by 6), and 29 with the codes and one of
// weights; of four pairs the panel takes two such passes and a third of 4 by 4.
const Isa kNeonI8mm = {"neon_i8mm", usable, Left::kS8, 8, 2,
                       {nullptr, neon_tile_one, tile<2, 16>, tile<3, 8>, tile<4, 8>, tile<5, 8>, tile<6, 8>, tile<7, 6>,
                        tile<8, 6>},
                       &kNeonSteps, peak, &kPortableFloats};

}  // namespace w8a8
#endif
