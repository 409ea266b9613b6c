// What lies between products, on its own: norms that no product follows, and attention.
#include <limits>

#include "internal.h"
#include "parallel.h"
#include "quantize.h"

namespace w8a8 {
namespace {

constexpr int64_t kSerialRows = 16 << 10;      // elements: below, waking the other threads takes longer than the work
constexpr int64_t kSerialScores = 32 << 10;    // multiplications, likewise

}  // namespace

const void *mask_row(const w8a8_attention &t, int64_t batch, int64_t head, int64_t query) {
  const int64_t at = batch * t.mask_at[0] + head * t.mask_at[1] + query * t.mask_at[2];
  return static_cast<const char *>(t.mask) + at * (t.mask_is_float ? 4 : 1);
}

float mask_at(const w8a8_attention &t, const void *row, int64_t key) {
  const int64_t at = key * t.mask_at[3];
  if (t.mask_is_float) return static_cast<const float *>(row)[at];
  return static_cast<const uint8_t *>(row)[at] ? 0.0f : -std::numeric_limits<float>::infinity();
}

// Where all queries share a row of the mask, its last keys may be padding: exp of a score so far below the others is zero.
// Where no key at all is seen, by large numbers instead of infinities, all have weight.
int64_t visible_keys(const w8a8_attention &t, int64_t batch, int64_t head) {
  if (!t.mask || t.mask_at[2]) return t.keys;
  const void *row = mask_row(t, batch, head, 0);
  int64_t keys = t.keys;
  while (keys > 0 && mask_at(t, row, keys - 1) <= kHidden) --keys;
  return keys > 0 ? keys : t.keys;
}

void write_bias(const w8a8_attention &t, int64_t batch, int64_t head, int64_t query, int64_t keys, int64_t room, float *bias) {
  const int64_t seen = t.causal ? std::min(keys, query + 1) : keys;
  if (t.mask) {
    const void *row = mask_row(t, batch, head, query);
    for (int64_t key = 0; key < seen; ++key) bias[key] = mask_at(t, row, key);
  } else {
    std::fill(bias, bias + seen, 0.0f);
  }
  std::fill(bias + seen, bias + room, -std::numeric_limits<float>::infinity());
}

}  // namespace w8a8

using namespace w8a8;

extern "C" int w8a8_normalize(const w8a8_norm *norm, const float *x, int64_t m, int64_t k, int32_t threads) {
  if (m < 0 || k < 1 || !norm->out) return W8A8_BAD_ARGUMENT;
  const int64_t step = std::max<int64_t>(1, 8192 / k);
  if (m * k <= kSerialRows) threads = 1;
  return for_each_with(k * 8, div_up(m, step), threads, [&](int64_t task, char *spare) {
    for (int64_t row = task * step; row < std::min(m, (task + 1) * step); ++row)
      norm_row_of(isa(), *norm, x + row * k, row, k, reinterpret_cast<float *>(spare));
  });
}

extern "C" int w8a8_attend(const w8a8_attention *a, int32_t threads) {
  if (a->batch < 0 || a->heads < 0 || a->queries < 0 || a->keys < 1 || a->dims < 1 || a->shared < 1)
    return W8A8_BAD_ARGUMENT;
  if (a->batch * a->heads * a->queries * a->keys * a->dims <= kSerialScores) threads = 1;
  return for_each_with(4 * attention_scratch(a->keys, a->dims), a->batch * a->heads, threads, [&](int64_t task, char *memory) {
    isa().floats->attend(*a, task / a->heads, task % a->heads, reinterpret_cast<float *>(memory));
  });
}
