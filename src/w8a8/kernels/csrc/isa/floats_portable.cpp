// What lies between products in vectors of four floats, which every processor of ours has: SSE2 or NEON.
#include <cmath>
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "internal.h"

namespace w8a8 {
namespace {

constexpr int kWidth = 4, kColumns = 4, kQueries = 4;
typedef float Fours __attribute__((vector_size(16)));
static inline Fours all(float x) { return Fours{x, x, x, x}; }
static inline Fours least(Fours a, Fours b) { return a < b ? a : b; }   // the second where either is NaN, as in AVX
static inline Fours most(Fours a, Fours b) { return a > b ? a : b; }
static inline Fours fma(Fours a, Fours b, Fours c) {
#if defined(W8A8_ARM)
  return vfmaq_f32(c, a, b);
#else
  // One rounding here too: a library call where the compiler may not use the instruction, and so the slow path.
  for (int i = 0; i < kWidth; ++i) c[i] = std::fma(a[i], b[i], c[i]);
  return c;
#endif
}
static inline Fours load(const int8_t *p) {
  return Fours{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]), static_cast<float>(p[3])};
}

#include "floats.h"

typedef int32_t Sums __attribute__((vector_size(16)));
#if defined(W8A8_ARM)
typedef int16x8_t Pairs;
static inline Pairs pairs_of(const int8_t *p) { return vmovl_s8(vld1_s8(p)); }
static inline Pairs all_pairs(int32_t pair) { return vreinterpretq_s16_s32(vdupq_n_s32(pair)); }
static inline Sums dot(Sums sum, Pairs a, Pairs b) {
  return sum + vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b));
}
#elif defined(W8A8_X86)
typedef __m128i Pairs;
static inline Pairs pairs_of(const int8_t *p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(p));
  return _mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
}
static inline Pairs all_pairs(int32_t pair) { return _mm_set1_epi32(pair); }
static inline Sums dot(Sums sum, Pairs a, Pairs b) { return sum + reinterpret_cast<Sums>(_mm_madd_epi16(a, b)); }
#else
typedef int16_t Pairs __attribute__((vector_size(16)));
static inline Pairs pairs_of(const int8_t *p) { return Pairs{p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]}; }
static inline Pairs all_pairs(int32_t pair) {
  int16_t two[2];
  std::memcpy(two, &pair, 4);
  return Pairs{two[0], two[1], two[0], two[1], two[0], two[1], two[0], two[1]};
}
static inline Sums dot(Sums sum, Pairs a, Pairs b) {
  for (int i = 0; i < 4; ++i) sum[i] += a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return sum;
}
#endif
#include "cached.h"

static inline Fours widened(const uint16_t *p, bool brain) {
  Fours v;
  for (int i = 0; i < 4; ++i) v[i] = brain ? from_bf16(p[i]) : from_f16(p[i]);
  return v;
}
static inline Fours totals(const Lanes *sum) {
  Fours v;
  for (int i = 0; i < 4; ++i) {
    const Fours *const p = sum[i].part;
    const Fours s = (p[0] + p[2]) + (p[1] + p[3]);
    v[i] = (s[0] + s[2]) + (s[1] + s[3]);
  }
  return v;
}
#include "rows.h"

}  // namespace

const Floats kPortableFloats = {activate, norm_row, attend, rotate, best_steps, query, piece, rows, merge};

}  // namespace w8a8
