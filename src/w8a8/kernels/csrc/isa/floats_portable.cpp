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

#include "floats.h"

}  // namespace

const Floats kPortableFloats = {activate, norm_row, attend};

}  // namespace w8a8
