// From rows of floats to rows of codes: the first half of every entry point.
#pragma once

#include <atomic>

#include "internal.h"
#include "parallel.h"

namespace w8a8 {

// Of all rows: the steps that single ones take more than others, and whether one has no room for its own.
struct Rests {
  std::atomic<int64_t> steps{0};
  std::atomic<bool> no_room{false};
};

struct Quantize {
  const Isa *isa;
  const void *x;
  int dtype, mode, bits;
  float x_scale;
  int32_t x_zero_point;
  int64_t m, k, ldx;
  Left left;             // how the codes are stored
  int offset;
  char *codes;           // row stride ld_bytes; each row has room for round_up(k, 64) codes
  int64_t ld_bytes;
  float *sx;             // (M,)
  int32_t *zx;           // (M,)
  RowRange *ranges;      // (M,), only read and written where the whole tensor shares a dynamic scale
  const Pairs *pairs = nullptr;          // what the codes, then kS8, are to be made ready for
  Rests *rests = nullptr;                // what that takes
  const w8a8_norm *before = nullptr;   // what is done to a row of float32 first; then no dynamic scale is shared

  bool asym() const { return mode & 1; }
  bool shared_dynamic() const { return mode == W8A8_TENSOR_SYM || mode == W8A8_TENSOR_ASYM; }
};

// First pass over row m, needed for shared_dynamic() only.  Rows are independent.
void measure_row(const Quantize &q, int64_t m);

// The grid that all rows share, from the ranges of all rows or from what was given; unused for per-token modes.
Grid shared_grid(const Quantize &q);

// What the norm makes of row m of x: in the place that was given for it, or in `spare`, 2 k floats.
const float *norm_row_of(const Isa &isa, const w8a8_norm &norm, const float *x, int64_t m, int64_t k, float *spare);

// Codes, scale and zero point of row m.  Rows are independent.
void quantize_row(const Quantize &q, int64_t m, const Grid &shared);

// The largest |code - zero point| that can occur.
int reach_of(int mode, int bits);

bool valid(int dtype, int mode, int bits, float x_scale, int32_t x_zero_point);

}  // namespace w8a8
