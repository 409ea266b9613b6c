// AArch64 with the dot-product extension (ARMv8.2 and later: Neoverse N1, Graviton 2, every Apple M): sdot multiplies
// 16 signed by 16 signed bytes and adds fours of them to four int32.  Signed on both sides, so no shift by 128.
#include "internal.h"

#ifdef W8A8_ARM_DOT
#include <arm_neon.h>

#include <algorithm>
#ifdef __linux__
#include <sys/auxv.h>
#ifndef HWCAP_ASIMDDP
#define HWCAP_ASIMDDP (1 << 20)
#endif
#endif

#ifdef __clang__
#define W8A8_DOT "dotprod"
#else
#define W8A8_DOT "arch=armv8.2-a+dotprod"
#endif

namespace w8a8 {
namespace {

bool usable() {
#ifdef __linux__
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
  return true;   // macOS: every arm64 machine
#endif
}

W8A8_TARGET_BEGIN(W8A8_DOT)

template <int DT>
inline float32x4_t load4(const void *row, int64_t i) {
  if (DT == W8A8_F32) return vld1q_f32(static_cast<const float *>(row) + i);
  const uint16x4_t h = vld1_u16(static_cast<const uint16_t *>(row) + i);
  if (DT == W8A8_F16) return vcvt_f32_f16(vreinterpret_f16_u16(h));
  return vreinterpretq_f32_u32(vshll_n_u16(h, 16));
}

template <int DT>
inline float32x4_t load4_tail(const void *row, int64_t i, int64_t k) {   // zeros beyond the row
  float v[4] = {};
  for (int j = 0; j < 4 && i + j < k; ++j) v[j] = load_one(row, DT, i + j);
  return vld1q_f32(v);
}

template <int DT>
RowRange range(const void *row, int64_t k, bool) {
  float32x4_t lo = vdupq_n_f32(0), hi = lo;
  uint32x4_t bits = vdupq_n_u32(0);
  const uint32x4_t magnitude = vdupq_n_u32(0x7fffffffu);
  auto see = [&](float32x4_t v) {
    lo = vminq_f32(lo, v), hi = vmaxq_f32(hi, v);
    bits = vmaxq_u32(bits, vandq_u32(vreinterpretq_u32_f32(v), magnitude));
  };
  int64_t i = 0;
  for (; i + 4 <= k; i += 4) see(load4<DT>(row, i));
  if (i < k) see(load4_tail<DT>(row, i, k));
  return {vminvq_f32(lo), vmaxvq_f32(hi), vmaxvq_u32(bits)};
}

template <int DT>
void codes(const void *row, int64_t k, const Grid &g, Left, int offset, void *to) {
  uint8_t *const out = static_cast<uint8_t *>(to);
  const float32x4_t scale = vdupq_n_f32(g.scale);
  const int32x4_t zero = vdupq_n_s32(g.zero_point), low = vdupq_n_s32(g.qmin), high = vdupq_n_s32(g.qmax);
  const int32x4_t shift = vdupq_n_s32(offset);
  // The conversion rounds half to even and saturates, the addition saturates: no bound on x / scale is needed.
  auto code = [&](float32x4_t v) {
    const int32x4_t q = vqaddq_s32(vcvtnq_s32_f32(vdivq_f32(v, scale)), zero);
    return vmovn_s32(vaddq_s32(vmaxq_s32(vminq_s32(q, high), low), shift));
  };
  int64_t i = 0;
  for (; i + 8 <= k; i += 8) {
    const int16x8_t q = vcombine_s16(code(load4<DT>(row, i)), code(load4<DT>(row, i + 4)));
    vst1_u8(out + i, vreinterpret_u8_s8(vmovn_s16(q)));
  }
  if (i < k) {
    const int16x8_t q = vcombine_s16(code(load4_tail<DT>(row, i, k)), code(load4_tail<DT>(row, i + 4, k)));
    vst1_u8(out + i, vreinterpret_u8_s8(vmovn_s16(q)));
  }
}

void finish(const Finish &f, const int32_t *sums, int64_t ld, int64_t m0, int rows, int64_t n0, int cols) {
  const w8a8_layer &w = *f.layer;
  const int whole = cols / 4 * 4;
  for (int r = 0; r < rows; ++r) {
    const int64_t m = m0 + r;
    const int32x4_t shift = vdupq_n_s32(f.offset + f.zx[m]);
    const float32x4_t sx = vdupq_n_f32(f.sx[m]);
    for (int c = 0; c < whole; c += 4) {
      const int64_t n = n0 + c;
      const int32x4_t acc = vmlsq_s32(vld1q_s32(sums + r * ld + c), vld1q_s32(w.colsum + n), shift);
      float32x4_t v = vmulq_f32(vcvtq_f32_s32(acc), sx);
      v = vmulq_f32(v, w.scale_stride ? vld1q_f32(w.scale + n) : vdupq_n_f32(w.scale[0]));
      if (w.bias) v = vaddq_f32(v, vld1q_f32(w.bias + n));
      if (f.dtype == W8A8_F32) {
        vst1q_f32(static_cast<float *>(f.y) + m * f.ldy + n, v);
      } else if (f.dtype == W8A8_F16) {
        vst1_u16(static_cast<uint16_t *>(f.y) + m * f.ldy + n, vreinterpret_u16_f16(vcvt_f16_f32(v)));
      } else {
        const uint32x4_t b = vreinterpretq_u32_f32(v);
        const uint32x4_t odd = vandq_u32(vshrq_n_u32(b, 16), vdupq_n_u32(1));
        const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(vaddq_u32(b, vdupq_n_u32(0x7fff)), odd), 16);
        const uint32x4_t number = vceqq_f32(v, v);
        const uint16x4_t h = vmovn_u32(vbslq_u32(number, rounded, vdupq_n_u32(0x7fc0)));
        vst1_u16(static_cast<uint16_t *>(f.y) + m * f.ldy + n, h);
      }
    }
  }
  if (whole < cols) kPortableSteps.finish(f, sums + whole, ld, m0, rows, n0 + whole, cols - whole);
}

}  // namespace

// One row: a register of weights is two columns by eight k, and its product with the same eight codes twice has two half
// sums of each.  Nothing is rearranged, and sixteen registers of half sums are chains enough.
void neon_tile_one(const void *left_, int64_t, const int8_t *panel, int64_t ksteps, int32_t *sums,
                   const int8_t *ahead, int ahead_lines) {
  constexpr int kPairs = kPanel / 2;
  const int8_t *left = static_cast<const int8_t *>(left_);
  int32x4_t acc[kPairs];
#pragma GCC unroll 16
  for (int v = 0; v < kPairs; ++v) acc[v] = vdupq_n_s32(0);
  Ahead fetch(ahead, ahead_lines, 2 * ksteps);
  for (int64_t s = 0; s < ksteps; ++s, left += 8, panel += kPanelStep) {
    fetch.step(2 * s), fetch.step(2 * s + 1);
    const int8x8_t eight = vld1_s8(left);
    const int8x16_t a = vcombine_s8(eight, eight);
#pragma GCC unroll 16
    for (int v = 0; v < kPairs; ++v) acc[v] = vdotq_s32(acc[v], vld1q_s8(panel + 16 * v), a);
  }
#pragma GCC unroll 16
  for (int v = 0; v < kPairs; v += 2) vst1q_s32(sums + 2 * v, vpaddq_s32(acc[v], acc[v + 1]));
}

namespace {

// MR rows by V registers of four columns in a pass.  ld2 parts four columns by eight k into the first four k of each and
// the last; either multiplies four codes of every row, which are a lane of the row's register.  Rows are padded to whole
// cache lines, so 16 codes can always be read.
template <int MR, int V>
void tile(const void *left_, int64_t ld, const int8_t *panel, int64_t ksteps, int32_t *sums, const int8_t *ahead,
          int ahead_lines) {
  constexpr int kPasses = kPanel / (4 * V);
  const int8_t *left = static_cast<const int8_t *>(left_);
  for (int pass = 0; pass < kPasses; ++pass) {
    int32x4_t acc[MR][V];
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[r][v] = vdupq_n_s32(0);
    const int8_t *b = panel + 32 * V * pass, *a = left;
    Ahead fetch(ahead, ahead_lines, 2 * ksteps, kPasses, pass);
    int8x16_t av[MR];
    // The lane is part of the instruction, so the two halves of 16 codes are written out.
#define W8A8_ADD(WEIGHTS, LANE)                                                                              \
  W8A8_PRAGMA(GCC unroll 8)                                                                                  \
  for (int r = 0; r < MR; ++r) {                                                                             \
    acc[r][v] = vdotq_laneq_s32(acc[r][v], vreinterpretq_s8_s32(WEIGHTS), av[r], LANE);                      \
    __asm__ volatile("" : "+w"(acc[r][v])); /* holds the order: GCC 12 loads all first and spills sums */    \
  }
#define W8A8_STEP(STEP, LANE)                                                                                \
  {                                                                                                          \
    fetch.step(2 * (STEP)), fetch.step(2 * (STEP) + 1);                                                      \
    W8A8_PRAGMA(GCC unroll 8)                                                                                \
    for (int v = 0; v < V; ++v) {                                                                            \
      const int32x4x2_t bv = vld2q_s32(reinterpret_cast<const int32_t *>(b + 32 * v));                       \
      W8A8_ADD(bv.val[0], LANE)                                                                              \
      W8A8_ADD(bv.val[1], LANE + 1)                                                                          \
    }                                                                                                        \
    b += kPanelStep;                                                                                         \
  }
    int64_t s = 0;
    for (; s + 2 <= ksteps; s += 2, a += 16) {
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) av[r] = vld1q_s8(a + r * ld);
      W8A8_STEP(s, 0) W8A8_STEP(s + 1, 2)
    }
    if (s < ksteps) {
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) av[r] = vld1q_s8(a + r * ld);
      W8A8_STEP(s, 0)
    }
#undef W8A8_STEP
#undef W8A8_ADD
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) vst1q_s32(sums + r * kPanel + 4 * (V * pass + v), acc[r][v]);
  }
}

double peak(int64_t rounds) {
  int32x4_t acc[16];
  int8x16_t a = vdupq_n_s8(3), b = vdupq_n_s8(5);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) acc[i] = vdupq_n_s32(0);
  for (int64_t n = 0; n < rounds; ++n) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      acc[i] = vdotq_s32(acc[i], a, b);
      __asm__ volatile("" : "+w"(acc[i]));
    }
  }
  return static_cast<double>(rounds) * 16 * 16 * 2;
}

W8A8_TARGET_END

}  // namespace

const RowSteps kNeonSteps = {{range<W8A8_F32>, range<W8A8_BF16>, range<W8A8_F16>},
                             {codes<W8A8_F32>, codes<W8A8_BF16>, codes<W8A8_F16>}, finish};

// At most 3 x 8 or 6 x 4 sums beside the codes and two registers of weights: 29 and 32.
const Isa kNeonDot = {"neon_dot", usable, Left::kS8, 6, 3,
                      {nullptr, neon_tile_one, tile<2, 8>, tile<3, 8>, tile<4, 4>, tile<5, 4>, tile<6, 4>},
                      &kNeonSteps, peak, &kPortableFloats};

}  // namespace w8a8
#endif
