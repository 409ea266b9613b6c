// What lies between products, on its own: norms that no product follows, and attention.
#include <limits>

#include "internal.h"
#include "parallel.h"
#include "quantize.h"
#include "scratch.h"

namespace w8a8 {
namespace {

constexpr int64_t kSerialRows = 16 << 10;      // elements: below, waking the other threads takes longer than the work
constexpr int64_t kSerialScores = 32 << 10;    // multiplications, likewise

}  // namespace

const void *mask_row(const Attention &t, int64_t batch, int64_t head, int64_t query) {
  const int64_t at = batch * t.mask_at[0] + head * t.mask_at[1] + query * t.mask_at[2];
  return static_cast<const char *>(t.mask) + at * (t.mask_is_float ? 4 : 1);
}

float mask_at(const Attention &t, const void *row, int64_t key) {
  const int64_t at = key * t.mask_at[3];
  if (t.mask_is_float) return static_cast<const float *>(row)[at];
  return static_cast<const uint8_t *>(row)[at] ? 0.0f : -std::numeric_limits<float>::infinity();
}

// Where all queries share a row of the mask, its last keys may be padding: exp of a score so far below the others is zero.
// Where no key at all is seen, by large numbers instead of infinities, all have weight.
int64_t visible_keys(const Attention &t, int64_t batch, int64_t head) {
  if (!t.mask || t.mask_at[2]) return t.keys;
  const void *row = mask_row(t, batch, head, 0);
  int64_t keys = t.keys;
  while (keys > 0 && mask_at(t, row, keys - 1) <= kHidden) --keys;
  return keys > 0 ? keys : t.keys;
}

void write_bias(const Attention &t, int64_t batch, int64_t head, int64_t query, int64_t keys, int64_t room, float *bias) {
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
  std::atomic<bool> starved{false};
  for_each(div_up(m, step), threads, [&](int64_t task) {
    static thread_local Scratch scratch;
    char *spare = scratch.get(k * 8);
    if (!spare) return starved.store(true, std::memory_order_relaxed);
    for (int64_t row = task * step; row < std::min(m, (task + 1) * step); ++row)
      norm_row_of(isa(), *norm, x + row * k, row, k, reinterpret_cast<float *>(spare));
  });
  return starved.load(std::memory_order_relaxed) ? W8A8_NO_MEMORY : W8A8_OK;
}

extern "C" int w8a8_attend(const w8a8_attention *a, int32_t threads) {
  if (a->batch < 0 || a->heads < 0 || a->queries < 0 || a->keys < 1 || a->dims < 1 || a->shared < 1)
    return W8A8_BAD_ARGUMENT;
  auto heads = [](const float *data, const int64_t *at) {
    return Heads{const_cast<float *>(data), at[0], at[1], at[2]};
  };
  const Attention t = {heads(a->q, a->q_at), heads(a->k, a->k_at), heads(a->v, a->v_at), heads(a->out, a->out_at),
                       a->queries, a->keys, a->dims, a->shared, a->scale, a->causal != 0, a->mask, a->mask_is_float != 0,
                       {a->mask_at[0], a->mask_at[1], a->mask_at[2], a->mask_at[3]}};
  if (a->batch * a->heads * a->queries * a->keys * a->dims <= kSerialScores) threads = 1;
  std::atomic<bool> starved{false};
  for_each(a->batch * a->heads, threads, [&](int64_t task) {
    static thread_local Scratch scratch;
    char *memory = scratch.get(4 * attention_scratch(t));
    if (!memory) return starved.store(true, std::memory_order_relaxed);
    isa().floats->attend(t, task / a->heads, task % a->heads, reinterpret_cast<float *>(memory));
    scratch.shrink();
  });
  return starved.load(std::memory_order_relaxed) ? W8A8_NO_MEMORY : W8A8_OK;
}
