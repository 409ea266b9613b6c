// AVX-512 with VNNI: vpdpbusd multiplies 64 unsigned by 64 signed bytes and adds fours of them to 16 int32, unsaturated.
// The left side is therefore code + 128; the column sums take the 128 out again.
#include "internal.h"

#ifdef W8A8_X86
#define W8A8_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"

namespace w8a8 {
namespace {

bool usable() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");   // each includes the operating system's consent (XCR0)
}

W8A8_TARGET_BEGIN(W8A8_AVX512)

template <int DT>
inline __m512 load16(const void *row, int64_t i) {
  if (DT == W8A8_F32) return _mm512_loadu_ps(static_cast<const float *>(row) + i);
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(static_cast<const uint16_t *>(row) + i));
  if (DT == W8A8_F16) return _mm512_cvtph_ps(h);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

// Lanes beyond the row are zero, which moves neither the range nor, the weights there being zero, the product.
template <int DT>
inline __m512 load16_tail(const void *row, int64_t i, int64_t k) {
  const int64_t left = k - i;
  const __mmask16 mask = left >= 16 ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
  if (DT == W8A8_F32) return _mm512_maskz_loadu_ps(mask, static_cast<const float *>(row) + i);
  const __m256i h = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t *>(row) + i);
  if (DT == W8A8_F16) return _mm512_cvtph_ps(h);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

struct Range16 {
  __m512 lo, hi;
  __m512i bits;
  // Written out: GCC gives an implicit constructor no target, and then cannot inline what it calls.
  Range16() : lo(_mm512_setzero_ps()), hi(_mm512_setzero_ps()), bits(_mm512_setzero_si512()) {}
  template <bool Asym>
  inline void see(__m512 v) {
    if (Asym) {
      lo = _mm512_min_ps(lo, v);
      hi = _mm512_max_ps(hi, v);
    }
    const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
    bits = _mm512_max_epi32(bits, magnitude);
  }
};

template <int DT, bool Asym>
RowRange range_of(const void *row, int64_t k) {
  Range16 a, b, c, d;
  int64_t i = 0;
  for (; i + 64 <= k; i += 64) {
    a.see<Asym>(load16<DT>(row, i));
    b.see<Asym>(load16<DT>(row, i + 16));
    c.see<Asym>(load16<DT>(row, i + 32));
    d.see<Asym>(load16<DT>(row, i + 48));
  }
  for (; i < k; i += 16) a.see<Asym>(load16_tail<DT>(row, i, k));
  RowRange out;
  out.lo = _mm512_reduce_min_ps(_mm512_min_ps(_mm512_min_ps(a.lo, b.lo), _mm512_min_ps(c.lo, d.lo)));
  out.hi = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(a.hi, b.hi), _mm512_max_ps(c.hi, d.hi)));
  out.absbits = static_cast<uint32_t>(_mm512_reduce_max_epi32(
      _mm512_max_epi32(_mm512_max_epi32(a.bits, b.bits), _mm512_max_epi32(c.bits, d.bits))));
  return out;
}

template <int DT>
RowRange range(const void *row, int64_t k, bool asym) {
  return asym ? range_of<DT, true>(row, k) : range_of<DT, false>(row, k);
}

// 64 codes at once, by `Reciprocal` (internal.h).
struct Codes64 {
  Reciprocal by;
  __m512 scale, reciprocal, low, high;
  __m512i zero, offset, order;

  Codes64(const Grid &g, int offset_)
      : by(g),
        scale(_mm512_set1_ps(g.scale)),
        reciprocal(_mm512_set1_ps(by.reciprocal)),
        low(_mm512_set1_ps(by.low)),
        high(_mm512_set1_ps(by.high)),
        zero(_mm512_set1_epi16(static_cast<int16_t>(g.zero_point))),
        offset(_mm512_set1_epi8(static_cast<int8_t>(offset_))),
        order(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)) {}

  inline __m512 bounded(__m512 t) const { return _mm512_max_ps(_mm512_min_ps(t, high), low); }
  static inline __m512i rounded(__m512 t) {
    return _mm512_cvt_roundps_epi32(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  inline __m512i divided(__m512 x) const { return rounded(bounded(_mm512_div_ps(x, scale))); }
  // `far` grows to the largest distance from an integer.
  inline __m512i multiplied(__m512 x, __m512 &far) const {
    const __m512 t = bounded(_mm512_mul_ps(x, reciprocal));
    const __m512i q = rounded(t);
    far = _mm512_max_ps(far, _mm512_abs_ps(_mm512_sub_ps(t, _mm512_cvtepi32_ps(q))));
    return q;
  }
  // pack works within 128-bit lanes; permute puts the fours back in order.
  inline __m512i bytes(__m512i a, __m512i b, __m512i c, __m512i d) const {
    const __m512i ab = _mm512_add_epi16(_mm512_packs_epi32(a, b), zero);
    const __m512i cd = _mm512_add_epi16(_mm512_packs_epi32(c, d), zero);
    return _mm512_permutexvar_epi32(order, _mm512_add_epi8(_mm512_packs_epi16(ab, cd), offset));
  }
  inline __m512i operator()(__m512 a, __m512 b, __m512 c, __m512 d) const {
    if (!by.is_safe) return bytes(divided(a), divided(b), divided(c), divided(d));
    __m512 far = _mm512_setzero_ps();
    const __m512i qa = multiplied(a, far), qb = multiplied(b, far), qc = multiplied(c, far), qd = multiplied(d, far);
    if (__builtin_expect(_mm512_cmp_ps_mask(far, _mm512_set1_ps(Reciprocal::kSure), _CMP_GT_OQ), 0))
      return bytes(divided(a), divided(b), divided(c), divided(d));
    return bytes(qa, qb, qc, qd);
  }
};

template <int DT>
void codes(const void *row, int64_t k, const Grid &g, Left, int offset, void *to) {
  uint8_t *const out = static_cast<uint8_t *>(to);
  const Codes64 code(g, offset);
  int64_t i = 0;
  for (; i + 64 <= k; i += 64) {
    const __m512i q = code(load16<DT>(row, i), load16<DT>(row, i + 16), load16<DT>(row, i + 32), load16<DT>(row, i + 48));
    _mm512_storeu_si512(out + i, q);
  }
  if (i < k) {
    const __m512i q = code(load16_tail<DT>(row, i, k), load16_tail<DT>(row, i + 16, k), load16_tail<DT>(row, i + 32, k),
                           load16_tail<DT>(row, i + 48, k));
    _mm512_storeu_si512(out + i, q);
  }
}

// Not vcvtneps2bf16: that one flushes subnormals whatever the mode says.
inline __m256i to_bf16x16(__m512 v) {
  const __m512i b = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(b, _mm512_set1_epi32(0x7fff)), odd), 16);
  r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(r);
}

void finish(const Finish &f, const int32_t *sums, int64_t ld, int64_t m0, int rows, int64_t n0, int cols) {
  const w8a8_layer &w = *f.layer;
  for (int c = 0; c < cols; c += 16) {
    const int64_t n = n0 + c;
    const __mmask16 mask = cols - c >= 16 ? 0xffff : static_cast<__mmask16>((1u << (cols - c)) - 1);
    const __m512 sw = w.scale_stride ? _mm512_maskz_loadu_ps(mask, w.scale + n) : _mm512_set1_ps(w.scale[0]);
    const __m512 bias = w.bias ? _mm512_maskz_loadu_ps(mask, w.bias + n) : _mm512_setzero_ps();
    const __m512i colsum = _mm512_maskz_loadu_epi32(mask, w.colsum + n);
    const __m512i base = _mm512_mullo_epi32(colsum, _mm512_set1_epi32(f.offset));
    for (int r = 0; r < rows; ++r) {
      const int64_t m = m0 + r;
      const __m512i shift = f.zx[m] == 0 ? base : _mm512_mullo_epi32(colsum, _mm512_set1_epi32(f.offset + f.zx[m]));
      const __m512i acc = _mm512_sub_epi32(_mm512_maskz_loadu_epi32(mask, sums + r * ld + c), shift);
      __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(acc), _mm512_set1_ps(f.sx[m]));
      v = _mm512_mul_ps(v, sw);
      if (w.bias) v = _mm512_add_ps(v, bias);
      if (f.dtype == W8A8_F32) {
        _mm512_mask_storeu_ps(static_cast<float *>(f.y) + m * f.ldy + n, mask, v);
      } else {
        const __m256i h = f.dtype == W8A8_BF16 ? to_bf16x16(v)
                                               : _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm256_mask_storeu_epi16(static_cast<uint16_t *>(f.y) + m * f.ldy + n, mask, h);
      }
    }
  }
}

inline __m512i broadcast4(const uint8_t *p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return _mm512_set1_epi32(v);
}

// MR rows by 32 columns of sums stay in registers.  With few rows there are too few chains to hide the four cycles of a
// vpdpbusd, so U sets of sums take turns along k.
template <int MR, int U>
void tile(const void *left_, int64_t ld, const int8_t *panel, int64_t ksteps, int32_t *sums, const int8_t *ahead,
          int ahead_lines) {
  const uint8_t *left = static_cast<const uint8_t *>(left_);
  const uint8_t *left7 = left + 7 * ld;   // a second base: seven rows can be reached from one with three multiples of ld
  const int64_t ld3 = 3 * ld, ld5 = 5 * ld;
  auto at = [&](int r) {
    const uint8_t *base = r < 7 ? left : left7;
    switch (r % 7) {
      case 0: return base;
      case 1: return base + ld;
      case 2: return base + 2 * ld;
      case 3: return base + ld3;
      case 4: return base + 4 * ld;
      case 5: return base + ld5;
      default: return base + 2 * ld3;
    }
  };
  __m512i acc[U][MR][2];
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u)
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) acc[u][r][0] = acc[u][r][1] = _mm512_setzero_si512();

  Ahead fetch(ahead, ahead_lines, ksteps);
  auto step = [&](int u) {
    const __m512i b0 = _mm512_loadu_si512(panel), b1 = _mm512_loadu_si512(panel + 64);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const __m512i a = broadcast4(at(r));
      acc[u][r][0] = _mm512_dpbusd_epi32(acc[u][r][0], a, b0);
      acc[u][r][1] = _mm512_dpbusd_epi32(acc[u][r][1], a, b1);
    }
    left += 4, left7 += 4, panel += kPanelStep;
  };
  int64_t s = 0;
  for (; s + 4 <= ksteps; s += 4) {
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
      fetch.step(u);
      step(u % U);
    }
  }
  for (; s < ksteps; ++s) step(0);
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      __m512i v = acc[0][r][h];
#pragma GCC unroll 8
      for (int u = 1; u < U; ++u) v = _mm512_add_epi32(v, acc[u][r][h]);
      _mm512_storeu_si512(sums + r * kPanel + 16 * h, v);
    }
}

double peak(int64_t rounds) {
  __m512i acc[16], a = _mm512_set1_epi32(0x01020304), b = _mm512_set1_epi32(0x04030201);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) acc[i] = _mm512_setzero_si512();
  for (int64_t n = 0; n < rounds; ++n) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      acc[i] = _mm512_dpbusd_epi32(acc[i], a, b);
      __asm__ volatile("" : "+v"(acc[i]));
    }
  }
  return static_cast<double>(rounds) * 16 * 64 * 2;
}

W8A8_TARGET_END

}  // namespace

const RowSteps kAvx512Steps = {{range<W8A8_F32>, range<W8A8_BF16>, range<W8A8_F16>},
                               {codes<W8A8_F32>, codes<W8A8_BF16>, codes<W8A8_F16>}, finish};

const Isa kAvx512Vnni = {"avx512vnni", usable, Left::kU8, 14, 14,
                         {nullptr, tile<1, 4>, tile<2, 4>, tile<3, 2>, tile<4, 1>, tile<5, 1>, tile<6, 1>, tile<7, 1>,
                          tile<8, 1>, tile<9, 1>, tile<10, 1>, tile<11, 1>, tile<12, 1>, tile<13, 1>, tile<14, 1>},
                         &kAvx512Steps, peak, &kAvx512Floats};

}  // namespace w8a8
#endif
