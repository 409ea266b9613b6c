// AVX2 alone: vpmaddubsw takes u8 x s8, but saturates the sum of two products at 32767 (255 * 127 * 2 = 64770).  So where
// that might happen (isa/avx2_pairs.cpp) both sides are widened to 16 bits, and vpmaddwd adds pairs into int32, exactly.
#include "internal.h"

#ifdef W8A8_X86
#define W8A8_AVX2 "avx2,fma,f16c"

namespace w8a8 {
namespace {

bool usable() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && ((Cpuid(1, 0).c >> 29) & 1);
}

W8A8_TARGET_BEGIN(W8A8_AVX2)

template <int DT>
inline __m256 load8(const void *row, int64_t i) {
  if (DT == W8A8_F32) return _mm256_loadu_ps(static_cast<const float *>(row) + i);
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i *>(static_cast<const uint16_t *>(row) + i));
  if (DT == W8A8_F16) return _mm256_cvtph_ps(h);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

template <int DT>
inline __m256 load8_tail(const void *row, int64_t i, int64_t k) {   // zeros beyond the row
  alignas(32) float v[8] = {};
  for (int j = 0; j < 8 && i + j < k; ++j) v[j] = load_one(row, DT, i + j);
  return _mm256_load_ps(v);
}

template <int DT, bool Asym>
RowRange range_of(const void *row, int64_t k) {
  __m256 lo = _mm256_setzero_ps(), hi = lo;
  __m256i bits0 = _mm256_setzero_si256(), bits1 = bits0;
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  auto see = [&](__m256 v, __m256i &bits) {
    if (Asym) lo = _mm256_min_ps(lo, v), hi = _mm256_max_ps(hi, v);
    bits = _mm256_max_epi32(bits, _mm256_and_si256(_mm256_castps_si256(v), magnitude));
  };
  int64_t i = 0;
  for (; i + 16 <= k; i += 16) see(load8<DT>(row, i), bits0), see(load8<DT>(row, i + 8), bits1);
  for (; i < k; i += 8) see(load8_tail<DT>(row, i, k), bits0);
  alignas(32) float los[8], his[8];
  alignas(32) uint32_t bits[8];
  _mm256_store_ps(los, lo), _mm256_store_ps(his, hi);
  _mm256_store_si256(reinterpret_cast<__m256i *>(bits), _mm256_max_epi32(bits0, bits1));
  RowRange out{0, 0, 0};
  for (int j = 0; j < 8; ++j) {
    out.lo = los[j] < out.lo ? los[j] : out.lo;
    out.hi = his[j] > out.hi ? his[j] : out.hi;
    out.absbits = bits[j] > out.absbits ? bits[j] : out.absbits;
  }
  return out;
}

template <int DT>
RowRange range(const void *row, int64_t k, bool asym) {
  return asym ? range_of<DT, true>(row, k) : range_of<DT, false>(row, k);
}

struct Codes8 {
  __m256 scale;
  __m256i add, low, high;   // zero point + offset; clamp bounds, shifted by the offset too

  Codes8(const Grid &g, int offset)
      : scale(_mm256_set1_ps(g.scale)),
        add(_mm256_set1_epi32(g.zero_point + offset)),
        low(_mm256_set1_epi32(g.qmin + offset)),
        high(_mm256_set1_epi32(g.qmax + offset)) {}

  inline __m256i operator()(__m256 x) const {   // _mm256_cvtps_epi32 rounds half to even: DefaultFloat sees to it
    const __m256 t = _mm256_max_ps(_mm256_min_ps(_mm256_div_ps(x, scale), _mm256_set1_ps(kBound)), _mm256_set1_ps(-kBound));
    return _mm256_max_epi32(_mm256_min_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(t), add), high), low);
  }
};

inline void store16(void *out, int64_t i, Left left, __m256i q0, __m256i q1) {
  // packs works within 128-bit lanes; permute puts the quarters back in order
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(q0, q1), 0xd8);
  if (left == Left::kS16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(static_cast<int16_t *>(out) + i), words);
    return;
  }
  const __m256i low = _mm256_and_si256(words, _mm256_set1_epi16(0xff));   // modulo 256, whatever the sign
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i *>(static_cast<uint8_t *>(out) + i), bytes);
}

template <int DT>
void codes(const void *row, int64_t k, const Grid &g, Left left, int offset, void *out) {
  const Codes8 code(g, offset);
  int64_t i = 0;
  for (; i + 16 <= k; i += 16) store16(out, i, left, code(load8<DT>(row, i)), code(load8<DT>(row, i + 8)));
  if (i < k) store16(out, i, left, code(load8_tail<DT>(row, i, k)), code(load8_tail<DT>(row, i + 8, k)));
}

inline __m128i to_bf16x8(__m256 v) {
  const __m256i b = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(b, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}

void finish(const Finish &f, const int32_t *sums, int64_t ld, int64_t m0, int rows, int64_t n0, int cols) {
  const w8a8_layer &w = *f.layer;
  const int whole = cols / 8 * 8;
  for (int c = 0; c < whole; c += 8) {
    const int64_t n = n0 + c;
    const __m256 sw = w.scale_stride ? _mm256_loadu_ps(w.scale + n) : _mm256_set1_ps(w.scale[0]);
    const __m256 bias = w.bias ? _mm256_loadu_ps(w.bias + n) : _mm256_setzero_ps();
    const __m256i colsum = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(w.colsum + n));
    for (int r = 0; r < rows; ++r) {
      const int64_t m = m0 + r;
      const __m256i shift = _mm256_mullo_epi32(colsum, _mm256_set1_epi32(f.offset + f.zx[m]));
      const __m256i sum = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(sums + r * ld + c));
      __m256 v = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(sum, shift)), _mm256_set1_ps(f.sx[m]));
      v = _mm256_mul_ps(v, sw);
      if (w.bias) v = _mm256_add_ps(v, bias);
      if (f.dtype == W8A8_F32) {
        _mm256_storeu_ps(static_cast<float *>(f.y) + m * f.ldy + n, v);
      } else {
        const __m128i h = f.dtype == W8A8_BF16 ? to_bf16x8(v)
                                               : _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm_storeu_si128(reinterpret_cast<__m128i *>(static_cast<uint16_t *>(f.y) + m * f.ldy + n), h);
      }
    }
  }
  if (whole < cols) kPortableSteps.finish(f, sums + whole, ld, m0, rows, n0 + whole, cols - whole);
}

// --- AVX2: 16-bit pairs.  A register holds four columns, two partial sums each; a pass takes 4 V columns. -------------

template <int MR, int V>
void tile(const void *left_, int64_t ld, const int8_t *panel, int64_t ksteps, int32_t *sums, const int8_t *ahead,
          int ahead_lines) {
  constexpr int kPasses = kPanel / (4 * V);
  const char *left = static_cast<const char *>(left_);
  for (int pass = 0; pass < kPasses; ++pass) {
    __m256i acc[MR][V];
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[r][v] = _mm256_setzero_si256();
    const int8_t *b = panel + 16 * V * pass;
    const char *a = left;
    Ahead fetch(ahead, ahead_lines, ksteps, kPasses, pass);
    for (int64_t s = 0; s < ksteps; ++s, b += kPanelStep, a += 8) {
      fetch.step(s);
      auto weights = [&](int v) {
        return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(b + 16 * v)));
      };
      auto codes = [&](int r) {
        int64_t four;
        std::memcpy(&four, a + r * ld, 8);
        return _mm256_set1_epi64x(four);
      };
      // Emits nothing, holds the order: GCC 12 would load everything first and spill the sums for it (2x slower).
      auto add = [&](int r, int v, __m256i codes_r, __m256i weights_v) {
        acc[r][v] = _mm256_add_epi32(acc[r][v], _mm256_madd_epi16(codes_r, weights_v));
        __asm__ volatile("" : "+x"(acc[r][v]));
      };
      if constexpr (MR <= 2) {   // keep the codes in registers, or where there are more rows the weights
        __m256i av[MR];
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r) av[r] = codes(r);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
          const __m256i bv = weights(v);
#pragma GCC unroll 8
          for (int r = 0; r < MR; ++r) add(r, v, av[r], bv);
        }
      } else {
        __m256i bv[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) bv[v] = weights(v);
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r) {
          const __m256i av = codes(r);
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v) add(r, v, av, bv[v]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int p = 0; p < V / 2; ++p) {
        const __m256i pairs = _mm256_hadd_epi32(acc[r][2 * p], acc[r][2 * p + 1]);   // lanes: 0 1 4 5 | 2 3 6 7
        int32_t *to = sums + r * kPanel + 4 * V * pass + 8 * p;
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), _mm256_permute4x64_epi64(pairs, 0xd8));
      }
  }
}

double peak(int64_t rounds) {
  __m256i acc[12], a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5);
  const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 12
  for (int i = 0; i < 12; ++i) acc[i] = _mm256_setzero_si256();
  for (int64_t n = 0; n < rounds; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) {
      __asm__ volatile("" : "+x"(a));
      acc[i] = _mm256_add_epi32(acc[i], _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones));
      __asm__ volatile("" : "+x"(acc[i]));
    }
  }
  return static_cast<double>(rounds) * 12 * 32 * 2;
}

W8A8_TARGET_END

}  // namespace

const RowSteps kAvx2Steps = {{range<W8A8_F32>, range<W8A8_BF16>, range<W8A8_F16>},
                             {codes<W8A8_F32>, codes<W8A8_BF16>, codes<W8A8_F16>}, finish};

const Isa kAvx2 = {"avx2", usable, Left::kS16, 6, 1,
                   {nullptr, tile<1, 8>, tile<2, 4>, tile<3, 2>, tile<4, 2>, tile<5, 2>, tile<6, 2>},
                   &kAvx2Steps, peak, &kAvx2Floats, nullptr, nullptr, &kAvx2Pairs};

}  // namespace w8a8
#endif
