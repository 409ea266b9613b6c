// Plain C++: runs on any CPU, is the fallback of every other instruction set, and is what the sanitizers see best.
#include <cfloat>

#include "internal.h"

namespace w8a8 {
namespace {

template <int DT>
RowRange range(const void *row, int64_t k, bool) {
  float lo = 0, hi = 0;
  uint32_t absbits = 0;
  for (int64_t i = 0; i < k; ++i) {
    const float v = load_one(row, DT, i);
    const uint32_t a = float_bits(v) & 0x7fffffffu;
    lo = v < lo ? v : lo;
    hi = v > hi ? v : hi;
    absbits = a > absbits ? a : absbits;
  }
  return {lo, hi, absbits};
}

// Half to even without a call into libm: at this magnitude the adder's own rounding leaves an integer.  |v| < 2**22.
static_assert(FLT_EVAL_METHOD == 0, "float arithmetic must round to float");
inline int32_t rint_small(float v) {
  const float shifted = v + 0x1.8p23f;
  return static_cast<int32_t>(float_bits(shifted) - 0x4b400000u);
}

template <int DT>
void codes(const void *row, int64_t k, const Grid &g, Left left, int offset, void *out) {
  const int64_t padded = round_up(k, kGroup);
  for (int64_t i = 0; i < padded; ++i) {
    float v = i < k ? load_one(row, DT, i) / g.scale : 0.0f;
    v = v < -kBound ? -kBound : v > kBound ? kBound : v;
    int32_t q = rint_small(v) + g.zero_point;
    q = q < g.qmin ? g.qmin : q > g.qmax ? g.qmax : q;
    q += offset;
    if (left == Left::kS16) static_cast<int16_t *>(out)[i] = static_cast<int16_t>(q);
    else static_cast<uint8_t *>(out)[i] = static_cast<uint8_t>(q);
  }
}

// Wrapping arithmetic: the shifted sums may leave int32 on the way, the corrected one does not.
void finish(const Finish &f, const int32_t *sums, int64_t ld, int64_t m0, int rows, int64_t n0, int cols) {
  const w8a8_layer &w = *f.layer;
  for (int r = 0; r < rows; ++r) {
    const int64_t m = m0 + r;
    const uint32_t shift = static_cast<uint32_t>(f.offset + f.zx[m]);
    char *y = static_cast<char *>(f.y) + m * f.ldy * static_cast<int64_t>(dtype_bytes(f.dtype));
    for (int c = 0; c < cols; ++c) {
      const int64_t n = n0 + c;
      const uint32_t acc =
          static_cast<uint32_t>(sums[r * ld + c]) - shift * static_cast<uint32_t>(shift ? w.colsum[n] : 0);
      float v = static_cast<float>(static_cast<int32_t>(acc)) * f.sx[m];
      v = v * w.scale[n * w.scale_stride];
      if (w.bias) v = v + w.bias[n];
      store_one(y, f.dtype, n, v);
    }
  }
}

template <int MR>
void tile(const void *left, int64_t ld, const int8_t *panel, int64_t ksteps, int32_t *sums, const int8_t *, int) {
  int32_t acc[MR][kPanel] = {};
  for (int64_t s = 0; s < ksteps; ++s, panel += kPanelStep) {
    for (int r = 0; r < MR; ++r) {
      const int8_t *a = static_cast<const int8_t *>(left) + r * ld + kGroup * s;
      for (int c = 0; c < kPanel; ++c) {
        const int8_t *b = panel + kGroup * c;
        int32_t sum = 0;
        for (int i = 0; i < kGroup; ++i) sum += a[i] * b[i];
        acc[r][c] += sum;
      }
    }
  }
  std::memcpy(sums, acc, sizeof acc);
}

double peak(int64_t rounds) {
  alignas(64) int8_t a[64] = {1, 2, 3, 4}, b[kPanel * 64] = {1, 2, 3};
  int32_t sums[kPanel] = {};
  for (int64_t i = 0; i < rounds; ++i) tile<1>(a, 64, b, 64 / kGroup, sums, nullptr, 0);
  volatile int32_t sink = sums[0];
  (void)sink;
  return static_cast<double>(rounds) * 2 * 64 * kPanel;
}

}  // namespace

const RowSteps kPortableSteps = {{range<W8A8_F32>, range<W8A8_BF16>, range<W8A8_F16>},
                                 {codes<W8A8_F32>, codes<W8A8_BF16>, codes<W8A8_F16>}, finish};

const Isa kPortable = {"portable", [] { return true; }, Left::kS8, 4, 4,
                       {nullptr, tile<1>, tile<2>, tile<3>, tile<4>},
                       &kPortableSteps, peak, &kPortableFloats};

}  // namespace w8a8
