#include "quantize.h"

#include <cmath>
#include <cstdlib>
#include <limits>

#include "scratch.h"

namespace w8a8 {
namespace {

constexpr float kSmallestNormal = std::numeric_limits<float>::min();

int qmax_of(int bits) { return (1 << (bits - 1)) - 1; }
int qmin_of(int bits) { return -(1 << (bits - 1)); }

// scale = span / steps, 1 where there is nothing to scale, never subnormal.
float scale_of(float span, int steps) {
  if (span == 0.0f) return 1.0f;
  const float scale = span / static_cast<float>(steps);
  return scale < kSmallestNormal ? kSmallestNormal : scale;
}

Grid symmetric(float absmax, int bits) {
  const int qmax = qmax_of(bits);
  return {scale_of(absmax, qmax), 0, -qmax, qmax};
}

Grid asymmetric(float lo, float hi, int bits) {
  const int qmin = qmin_of(bits), qmax = qmax_of(bits);
  const float scale = scale_of(hi - lo, qmax - qmin);
  // nearbyint: half to even in the default mode, which DefaultFloat sets.
  const float zero = std::nearbyint(static_cast<float>(qmin) - lo / scale);
  const float low = static_cast<float>(qmin), high = static_cast<float>(qmax);
  return {scale, static_cast<int32_t>(zero < low ? low : zero > high ? high : zero), qmin, qmax};
}

Grid grid_of(const RowRange &r, bool asym, int bits) {
  return asym ? asymmetric(r.lo, r.hi, bits) : symmetric(bits_float(r.absbits), bits);
}

void count_rests(const Quantize &q, int64_t m) {
  const int64_t steps = q.pairs->count(q.codes + m * q.ld_bytes, div_up(q.k, kGroup), q.zx[m]);
  if (steps < 0) q.rests->no_room.store(true, std::memory_order_relaxed);
  else if (steps) q.rests->steps.fetch_add(steps, std::memory_order_relaxed);
  q.zx[m] = 0;
}

}  // namespace

void measure_row(const Quantize &q, int64_t m) {
  q.ranges[m] = q.isa->steps->range[q.dtype](row_of(q.x, q.dtype, q.ldx, m), q.k, q.asym());
}

Grid shared_grid(const Quantize &q) {
  if (q.mode == W8A8_STATIC_SYM || q.mode == W8A8_STATIC_ASYM) {
    // Values beyond a scale that was given saturate at both ends of the codes; a scale of the row's own never gets there.
    return {q.x_scale, q.asym() ? q.x_zero_point : 0, qmin_of(q.bits), qmax_of(q.bits)};
  }
  RowRange all{0, 0, 0};
  if (!q.shared_dynamic()) return grid_of(all, false, q.bits);
  for (int64_t m = 0; m < q.m; ++m) {
    const RowRange &r = q.ranges[m];
    if (!r.finite()) continue;   // this row's output is NaN whatever the scale, and the others must not suffer
    all.lo = r.lo < all.lo ? r.lo : all.lo;
    all.hi = r.hi > all.hi ? r.hi : all.hi;
    all.absbits = r.absbits > all.absbits ? r.absbits : all.absbits;
  }
  return grid_of(all, q.asym(), q.bits);
}

const float *norm_row_of(const Isa &isa, const w8a8_norm &norm, const float *x, int64_t m, int64_t k, float *spare) {
  float *const sum = norm.sum ? norm.sum + m * k : spare + k, *const out = norm.out ? norm.out + m * k : spare;
  isa.floats->norm({norm.add ? norm.add + m * k : nullptr, sum, out, norm.weight, norm.bias, norm.eps}, x, k);
  return out;
}

void quantize_row(const Quantize &q, int64_t m, const Grid &shared) {
  const char *row = row_of(q.x, q.dtype, q.ldx, m);
  if (q.before) {
    static thread_local Scratch spare;
    char *memory = spare.get(q.k * 8);
    if (!memory) std::abort();   // a row's worth of memory is nowhere to be had
    row = reinterpret_cast<const char *>(norm_row_of(*q.isa, *q.before, reinterpret_cast<const float *>(row), m, q.k,
                                                     reinterpret_cast<float *>(memory)));
  }
  char *out = q.codes + m * q.ld_bytes;
  const RowRange r = q.shared_dynamic() ? q.ranges[m] : q.isa->steps->range[q.dtype](row, q.k, q.asym());
  if (!r.finite()) {
    // Codes that mean zero, and a scale that makes every output of this row NaN.
    const int64_t padded = round_up(q.k, kGroup);
    if (q.left == Left::kS16)
      for (int64_t i = 0; i < padded; ++i) reinterpret_cast<int16_t *>(out)[i] = static_cast<int16_t>(q.offset);
    else
      std::memset(out, q.offset, static_cast<size_t>(padded));
    q.sx[m] = std::numeric_limits<float>::quiet_NaN();
    q.zx[m] = 0;
    if (q.pairs) count_rests(q, m);
    return;
  }
  const bool per_token = q.mode == W8A8_TOKEN_SYM || q.mode == W8A8_TOKEN_ASYM;
  const Grid g = per_token ? grid_of(r, q.asym(), q.bits) : shared;
  q.isa->steps->codes[q.dtype](row, q.k, g, q.left, q.offset, out);
  q.sx[m] = g.scale;
  q.zx[m] = g.zero_point;
  if (q.pairs) count_rests(q, m);
}

int reach_of(int mode, int bits) {
  if (mode & 1) return qmax_of(bits) - qmin_of(bits);
  return mode == W8A8_STATIC_SYM ? -qmin_of(bits) : qmax_of(bits);
}

bool valid(int dtype, int mode, int bits, float x_scale, int32_t x_zero_point) {
  if (dtype < W8A8_F32 || dtype > W8A8_F16 || mode < W8A8_TOKEN_SYM || mode > W8A8_STATIC_ASYM) return false;
  if (bits < 2 || bits > 8) return false;
  if (mode < W8A8_STATIC_SYM) return true;
  if (!(x_scale > 0) || std::isinf(x_scale)) return false;
  return mode == W8A8_STATIC_SYM || (x_zero_point >= qmin_of(bits) && x_zero_point <= qmax_of(bits));
}

}  // namespace w8a8
