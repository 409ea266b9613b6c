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

#include "floats.h"

W8A8_TARGET_END

}  // namespace

const Floats kAvx512Floats = {activate, norm_row, attend};

}  // namespace w8a8
#endif
