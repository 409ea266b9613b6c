// What lies between products in AVX2 with FMA.
#include "internal.h"

#ifdef W8A8_X86
namespace w8a8 {
namespace {

W8A8_TARGET_BEGIN("avx2,fma,f16c")

constexpr int kWidth = 8, kColumns = 2, kQueries = 6;
static inline __m256 all(float x) { return _mm256_set1_ps(x); }
static inline __m256 least(__m256 a, __m256 b) { return _mm256_min_ps(a, b); }
static inline __m256 most(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
static inline __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
static inline __m256 load(const int8_t *p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))));
}

#include "floats.h"

typedef __m256i Pairs;
static inline Pairs pairs_of(const int8_t *p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
static inline Pairs all_pairs(int32_t pair) { return _mm256_set1_epi32(pair); }
static inline __m256i dot(__m256i sum, Pairs a, Pairs b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
typedef __m256i Sums;
#include "cached.h"

static inline __m256 widened(const uint16_t *p, bool brain) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
  return brain ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16)) : _mm256_cvtph_ps(halves);
}
static inline __m256 totals(const Lanes *sum) {
  __m256 v[8];
  for (int i = 0; i < 8; ++i) v[i] = sum[i].part[0] + sum[i].part[1];
  for (int i = 0; i < 4; ++i) v[i] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x20) + _mm256_permute2f128_ps(v[i], v[i + 4], 0x31);
  for (int i = 0; i < 4; i += 2) {
    const __m256d a = _mm256_castps_pd(v[i]), b = _mm256_castps_pd(v[i + 1]);
    v[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b)) + _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
  }
  return _mm256_shuffle_ps(v[0], v[2], 0x88) + _mm256_shuffle_ps(v[0], v[2], 0xdd);
}
#include "rows.h"

W8A8_TARGET_END

}  // namespace

const Floats kAvx2Floats = {activate, norm_row, attend, rotate, best_steps, query, piece, rows, merge};

}  // namespace w8a8
#endif
