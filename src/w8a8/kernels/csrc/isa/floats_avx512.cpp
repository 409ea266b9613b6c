// What lies between products in AVX-512.
#include "internal.h"

#ifdef W8A8_X86
namespace w8a8 {
namespace {

W8A8_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

constexpr int kWidth = 16, kColumns = 4, kQueries = 6;
static inline __m512 all(float x) { return _mm512_set1_ps(x); }
static inline __m512 least(__m512 a, __m512 b) { return _mm512_min_ps(a, b); }
static inline __m512 most(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
static inline __m512 fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
static inline __m512 load(const int8_t *p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))));
}

#include "floats.h"

typedef __m512i Pairs;
static inline Pairs pairs_of(const int8_t *p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
}
static inline Pairs all_pairs(int32_t pair) { return _mm512_set1_epi32(pair); }
static inline __m512i dot(__m512i sum, Pairs a, Pairs b) { return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b)); }
typedef __m512i Sums;
#include "cached.h"

static inline __m512 widened(const uint16_t *p, bool brain) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
  return brain ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)) : _mm512_cvtph_ps(halves);
}
static inline __m512 totals(const Lanes *sum) {
  __m512 v[16];
  for (int i = 0; i < 16; ++i) v[i] = sum[i].part[0];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {   // the keys 4 apart
    const int k = (i & 3) | (i & 4) << 1;
    v[i] = _mm512_shuffle_f32x4(v[k], v[k + 4], 0x44) + _mm512_shuffle_f32x4(v[k], v[k + 4], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) v[i] = _mm512_shuffle_f32x4(v[i], v[i + 4], 0x88) + _mm512_shuffle_f32x4(v[i], v[i + 4], 0xdd);
  for (int i = 0; i < 4; i += 2) {
    const __m512d a = _mm512_castps_pd(v[i]), b = _mm512_castps_pd(v[i + 1]);
    v[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)) + _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  }
  return _mm512_shuffle_ps(v[0], v[2], 0x88) + _mm512_shuffle_ps(v[0], v[2], 0xdd);
}
#include "rows.h"

W8A8_TARGET_END

}  // namespace

const Floats kAvx512Floats = {activate, norm_row, attend, rotate, best_steps, query, piece, rows, merge};

}  // namespace w8a8
#endif
