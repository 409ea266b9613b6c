// VNNI on 256 bits: in its own encoding (AVX-VNNI: Alder Lake, Sierra Forest, Zen 5), and in AVX-512's, which exists so
// that the same tile can be tested where only AVX-512 is.  What is not the product is AVX2's.
#include "internal.h"

#ifdef W8A8_X86
namespace w8a8 {
namespace {

bool usable_avxvnni() { return kAvx2.usable() && Cpuid(7, 0).a >= 1 && ((Cpuid(7, 1).a >> 4) & 1); }

bool usable_avx512vnni256() {
  return kAvx2.usable() && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

// The tile, once per encoding: V registers of eight columns in a pass, U sets of sums taking turns.
#define W8A8_TILE_256(NAME, DPBUSD)                                                                                   \
  template <int MR, int V, int U>                                                                                     \
  void tile_##NAME(const void *left_, int64_t ld, const int8_t *panel, int64_t ksteps, int32_t *sums,                 \
                   const int8_t *ahead, int ahead_lines) {                                                            \
    constexpr int kPasses = kPanel / (8 * V);                                                                         \
    const char *left = static_cast<const char *>(left_);                                                              \
    for (int pass = 0; pass < kPasses; ++pass) {                                                                      \
      __m256i acc[U][MR][V];                                                                                          \
      W8A8_PRAGMA(GCC unroll 4)                                                                                       \
      for (int u = 0; u < U; ++u)                                                                                     \
        W8A8_PRAGMA(GCC unroll 8)                                                                                     \
        for (int r = 0; r < MR; ++r)                                                                                  \
          W8A8_PRAGMA(GCC unroll 4)                                                                                   \
          for (int v = 0; v < V; ++v) acc[u][r][v] = _mm256_setzero_si256();                                          \
      const int8_t *b = panel + 32 * V * pass;                                                                        \
      const char *a = left;                                                                                           \
      Ahead fetch(ahead, ahead_lines, ksteps, kPasses, pass);                                                         \
      auto step = [&](int u) {                                                                                        \
        __m256i bv[V];                                                                                                \
        W8A8_PRAGMA(GCC unroll 4)                                                                                     \
        for (int v = 0; v < V; ++v) bv[v] = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(b + 32 * v));        \
        W8A8_PRAGMA(GCC unroll 8)                                                                                     \
        for (int r = 0; r < MR; ++r) {                                                                                \
          int32_t four;                                                                                               \
          std::memcpy(&four, a + r * ld, 4);                                                                          \
          const __m256i av = _mm256_set1_epi32(four);                                                                 \
          W8A8_PRAGMA(GCC unroll 4)                                                                                   \
          for (int v = 0; v < V; ++v) acc[u][r][v] = DPBUSD(acc[u][r][v], av, bv[v]);                                 \
        }                                                                                                             \
        a += 4, b += kPanelStep;                                                                                      \
      };                                                                                                              \
      int64_t s = 0;                                                                                                  \
      for (; s + 4 <= ksteps; s += 4) {                                                                               \
        W8A8_PRAGMA(GCC unroll 4)                                                                                     \
        for (int u = 0; u < 4; ++u) fetch.step(s + u), step(u % U);                                                   \
      }                                                                                                               \
      for (; s < ksteps; ++s) step(0);                                                                                \
      W8A8_PRAGMA(GCC unroll 8)                                                                                       \
      for (int r = 0; r < MR; ++r)                                                                                    \
        W8A8_PRAGMA(GCC unroll 4)                                                                                     \
        for (int v = 0; v < V; ++v) {                                                                                 \
          __m256i sum = acc[0][r][v];                                                                                 \
          W8A8_PRAGMA(GCC unroll 4)                                                                                   \
          for (int u = 1; u < U; ++u) sum = _mm256_add_epi32(sum, acc[u][r][v]);                                      \
          _mm256_storeu_si256(reinterpret_cast<__m256i *>(sums + r * kPanel + 8 * (V * pass + v)), sum);              \
        }                                                                                                             \
    }                                                                                                                 \
  }                                                                                                                   \
  double peak_##NAME(int64_t rounds) {                                                                                \
    __m256i acc[12], a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5);                                                \
    W8A8_PRAGMA(GCC unroll 12)                                                                                        \
    for (int i = 0; i < 12; ++i) acc[i] = _mm256_setzero_si256();                                                     \
    for (int64_t n = 0; n < rounds; ++n) {                                                                            \
      W8A8_PRAGMA(GCC unroll 12)                                                                                      \
      for (int i = 0; i < 12; ++i) {                                                                                  \
        acc[i] = DPBUSD(acc[i], a, b);                                                                                \
        __asm__ volatile("" : "+x"(acc[i]));                                                                          \
      }                                                                                                               \
    }                                                                                                                 \
    return static_cast<double>(rounds) * 12 * 32 * 2;                                                                 \
  }

W8A8_TARGET_BEGIN("avx2,fma,f16c,avxvnni")
W8A8_TILE_256(avxvnni, _mm256_dpbusd_avx_epi32)
W8A8_TARGET_END

W8A8_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512vl,avx512vnni")
W8A8_TILE_256(avx512vnni256, _mm256_dpbusd_epi32)
W8A8_TARGET_END

}  // namespace

const Isa kAvxVnni = {"avxvnni", usable_avxvnni, Left::kU8, 6, 2,
                      {nullptr, tile_avxvnni<1, 4, 2>, tile_avxvnni<2, 4, 1>, tile_avxvnni<3, 2, 1>, tile_avxvnni<4, 2, 1>,
                       tile_avxvnni<5, 2, 1>, tile_avxvnni<6, 2, 1>},
                      &kAvx2Steps, peak_avxvnni, &kAvx2Floats};

const Isa kAvx512Vnni256 = {"avx512vnni256", usable_avx512vnni256, Left::kU8, 6, 2,
                            {nullptr, tile_avx512vnni256<1, 4, 2>, tile_avx512vnni256<2, 4, 1>, tile_avx512vnni256<3, 2, 1>,
                             tile_avx512vnni256<4, 2, 1>, tile_avx512vnni256<5, 2, 1>, tile_avx512vnni256<6, 2, 1>},
                            &kAvx2Steps, peak_avx512vnni256, &kAvx2Floats};

}  // namespace w8a8
#endif
