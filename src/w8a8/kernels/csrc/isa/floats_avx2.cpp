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

W8A8_TARGET_END

}  // namespace

const Floats kAvx2Floats = {activate, norm_row, attend};

}  // namespace w8a8
#endif
