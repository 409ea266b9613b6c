// What lies between products in AVX2 with FMA.
#include "internal.h"

#ifdef W8A8_X86
namespace w8a8 {
namespace {

W8A8_TARGET_BEGIN("avx2,fma,f16c")

constexpr int kWidth = 8, kColumns = 2, kQueries = 4;
static inline __m256 all(float x) { return _mm256_set1_ps(x); }
static inline __m256 least(__m256 a, __m256 b) { return _mm256_min_ps(a, b); }
static inline __m256 most(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
static inline __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }

#include "floats.h"

typedef __m256i Pairs;
static inline Pairs pairs_of(const int8_t *p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
static inline Pairs all_pairs(int32_t pair) { return _mm256_set1_epi32(pair); }
static inline __m256i dot(__m256i sum, Pairs a, Pairs b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
static inline __m256 floats_of(const int8_t *p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))));
}
static inline __m256 floats_of(__m256i sums) { return _mm256_cvtepi32_ps(sums); }
typedef __m256i Sums;
#include "cached.h"

W8A8_TARGET_END

}  // namespace

const Floats kAvx2Floats = {activate, norm_row, attend, query, piece, merge};

}  // namespace w8a8
#endif
