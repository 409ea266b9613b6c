// Many steps in one call are what the same steps are one after the other, sequence by sequence, on the tokens that are
// computed alone: to the last bit, whatever is left out, however many threads share it.
#include <algorithm>
#include <cstdio>
#include <random>
#include <vector>

#include "w8a8.h"

namespace {

using Floats = std::vector<float>;

struct Dense {   // a layer and what it points to
  std::vector<int8_t> packed;
  std::vector<int32_t> sums;
  Floats scale;
  w8a8_layer layer = {};

  Dense(std::mt19937_64 &random, int64_t n, int64_t k) {
    std::vector<int8_t> w(static_cast<size_t>(n * k));
    for (int8_t &c : w) c = static_cast<int8_t>(static_cast<int>(random() % 255) - 127);
    packed.resize(static_cast<size_t>(w8a8_packed_bytes(n, k)));
    sums.resize(static_cast<size_t>(n)), scale.assign(static_cast<size_t>(n), 0.01f);
    w8a8_pack(w.data(), k, n, k, packed.data(), sums.data(), 1);
    layer.packed = packed.data(), layer.scale = scale.data(), layer.colsum = sums.data(), layer.n = n, layer.k = k;
    layer.scale_stride = 1, layer.mode = W8A8_TOKEN_SYM, layer.bits = 8;
  }
};

// (rows, width) of the tokens in `kept`
Floats rows_of(const Floats &all, int64_t width, const std::vector<int64_t> &kept) {
  Floats found;
  for (const int64_t row : kept) found.insert(found.end(), all.begin() + row * width, all.begin() + (row + 1) * width);
  return found;
}

}  // namespace

bool planned(uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  auto below = [&](int most) { return static_cast<int64_t>(random() % static_cast<uint64_t>(most)); };
  const int64_t shared = 1 + below(2), heads = shared * (1 + below(2)), dims = 1 + below(20), width = heads * dims;
  const int64_t batch = seed % 8 ? 1 + below(4) : 16, length = 1 + below(seed % 8 ? 40 : 70), narrow = width / shared;
  Floats x(static_cast<size_t>(batch * length * width)), weight(static_cast<size_t>(width)), bias(weight.size());
  for (Floats *v : {&x, &weight, &bias})
    for (float &f : *v) f = normal(random);

  // padding: behind the tokens, or every other one; a text may be nothing else, and is computed then
  const bool scattered = below(2), is_float = below(2), by_query = below(2), skips = below(4);
  std::vector<uint8_t> seen(static_cast<size_t>(batch * length));
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t tokens = scattered ? length : below(static_cast<int>(length) + 1);
    for (int64_t i = 0; i < length; ++i) seen[b * length + i] = scattered ? (i + b) % 2 == 0 || length == 1 : i < tokens;
  }
  const int64_t queries = by_query ? length : 1;
  Floats floats(static_cast<size_t>(batch * queries * length));
  std::vector<uint8_t> bools(floats.size());
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t q = 0; q < queries; ++q)
      for (int64_t i = 0; i < length; ++i) {
        const size_t at = static_cast<size_t>((b * queries + q) * length + i);
        bools[at] = seen[b * length + i], floats[at] = bools[at] ? 0.0f : -3.4e38f;
      }
  const void *mask_data = is_float ? static_cast<const void *>(floats.data()) : bools.data();
  const w8a8_mask mask = {mask_data, is_float, {queries * length, 0, by_query ? length : 0, 1}};

  const Dense q(random, width, width), k(random, narrow, width), v(random, narrow, width), o(random, width, width);
  const Dense up(random, 3 * width, width), down(random, width, 3 * width);
  const w8a8_layer first[3] = {q.layer, k.layer, v.layer};
  const int32_t slots_of_first[3] = {1, 2, 3}, four = 4, five = 5, six = 6, nine = 9, ten = 10;
  const int32_t plain[3] = {}, gelu = W8A8_GELU;
  w8a8_step steps[8] = {};
  for (w8a8_step &s : steps) s.x = s.add = s.sum = s.normed = s.mask = -1, s.activation = plain, s.count = 1, s.eps = 1e-5f;
  auto linear = [&](int i, int x_slot, const w8a8_layer *layer, const int32_t *out) {
    steps[i].kind = W8A8_STEP_LINEAR, steps[i].x = x_slot, steps[i].layers = layer, steps[i].out = out;
  };
  auto attend = [&](int i, int q_slot, const int32_t *out) {
    w8a8_step &s = steps[i];
    s.kind = W8A8_STEP_ATTEND, s.q = q_slot, s.k = 2, s.v = 3, s.mask = 0, s.out = out;
    s.heads = static_cast<int32_t>(heads), s.shared = static_cast<int32_t>(shared), s.scale = 0.3f;
  };
  linear(0, 0, first, slots_of_first), steps[0].count = 3;
  attend(1, 1, &four), attend(2, 4, &five);   // one right behind the other
  linear(3, 5, &o.layer, &six);
  linear(4, 6, &up.layer, &nine), steps[4].add = 0, steps[4].sum = 7, steps[4].normed = 8, steps[4].activation = &gelu;
  steps[4].has_norm = 1, steps[4].weight = weight.data(), steps[4].bias = bias.data();
  linear(5, 9, &down.layer, &ten);
  steps[6].kind = W8A8_STEP_SUM, steps[6].x = 10, steps[6].add = 7, steps[6].sum = 11;
  steps[7].kind = W8A8_STEP_NORM, steps[7].x = 11, steps[7].add = 8, steps[7].normed = 12;
  w8a8_slot slots[13] = {};
  for (w8a8_slot &slot : slots) slot.width = width;
  slots[2].width = slots[3].width = narrow, slots[9].width = 3 * width;
  Floats attended(x.size(), 7.0f), between(x.size(), 7.0f), last(x.size(), 7.0f);
  slots[0].given = x.data();
  slots[4].wanted = attended.data(), slots[7].wanted = between.data(), slots[12].wanted = last.data();
  const int64_t read = below(static_cast<int>(length));
  w8a8_plan plan = {batch, length, steps, slots, &mask, 8, 13, 1, skips, &read, static_cast<int32_t>(below(2))};
  if (w8a8_run(&plan, 1 + static_cast<int32_t>(below(3))) != W8A8_OK) return std::puts("FAILED plan: status"), false;

  // which tokens are computed
  std::vector<std::vector<int64_t>> kept(static_cast<size_t>(batch));
  int64_t all = 0;
  for (int pass = 0; pass < 2; ++pass) {
    const bool packs = pass == 0 ? skips : (batch * length - all) * 16 > batch * length;
    all = 0;
    for (int64_t b = 0; b < batch; ++b) {
      const auto *const own = &seen[static_cast<size_t>(b * length)];
      bool whole = !packs || (plan.read_count && !own[read]);
      whole = whole || std::count(own, own + length, 1) == 0;
      kept[b].clear();
      for (int64_t i = 0; i < length; ++i)
        if (whole || own[i]) kept[b].push_back(b * length + i);
      all += static_cast<int64_t>(kept[b].size());
    }
    if (!skips) break;
  }
  // the steps by themselves
  bool ok = true;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t rows = static_cast<int64_t>(kept[b].size());
    const Floats own = rows_of(x, width, kept[b]);
    auto room = [&](int64_t columns) { return Floats(static_cast<size_t>(rows * columns)); };
    Floats qs = room(width), ks = room(narrow), vs = room(narrow), a = room(width), c = room(width), d = room(width);
    Floats sum = room(width), normed = room(width), wide = room(3 * width), e = room(width), f = room(width);
    auto product = [&](const w8a8_norm *before, const Dense &dense, const Floats &from, Floats &to, const int32_t *activation) {
      const w8a8_layer *one = &dense.layer;
      void *y = to.data();
      ok = ok && w8a8_linear_fused(before, &one, 1, from.data(), W8A8_F32, rows, one->k, &y, &one->n, activation, 1) == W8A8_OK;
    };
    auto attention = [&](const Floats &from, Floats &to) {
      const bool hides = rows == length;
      w8a8_attention t = {from.data(), ks.data(), vs.data(), to.data(), nullptr, 1, heads, shared, rows, rows, dims, {}, {}, {},
                          {}, {}, 0.3f, 0, is_float};
      for (int64_t *at : {t.q_at, t.out_at}) at[1] = dims, at[2] = width;
      for (int64_t *at : {t.k_at, t.v_at}) at[1] = dims, at[2] = narrow;
      if (hides) t.mask = is_float ? static_cast<const void *>(&floats[b * queries * length]) : &bools[b * queries * length];
      t.mask_at[2] = mask.at[2], t.mask_at[3] = 1;
      ok = ok && w8a8_attend(&t, 1) == W8A8_OK;
    };
    product(nullptr, q, own, qs, plain), product(nullptr, k, own, ks, plain), product(nullptr, v, own, vs, plain);
    attention(qs, a), attention(a, c);
    product(nullptr, o, c, d, plain);
    const w8a8_norm norm = {own.data(), sum.data(), normed.data(), weight.data(), bias.data(), 1e-5f};
    product(&norm, up, d, wide, &gelu);
    product(nullptr, down, wide, e, plain);
    for (size_t i = 0; i < e.size(); ++i) e[i] += sum[i];
    const w8a8_norm end = {normed.data(), nullptr, f.data(), nullptr, nullptr, 1e-5f};
    ok = ok && w8a8_normalize(&end, e.data(), rows, width, 1) == W8A8_OK;
    ok = ok && rows_of(attended, width, kept[b]) == a && rows_of(between, width, kept[b]) == sum && rows_of(last, width, kept[b]) == f;
    for (int64_t i = 0, next = 0; i < length; ++i) {
      if (next < rows && kept[b][next] == b * length + i) ++next;
      else
        for (int64_t j = 0; j < width; ++j) ok = ok && last[(b * length + i) * width + j] == 0 && attended[(b * length + i) * width + j] == 0;
    }
  }
  // what cannot be, is refused before anything is written
  const w8a8_step before = steps[6];
  const int32_t wrong[][3] = {{99, 7, 11}, {-1, 7, 11}, {10, 9, 11}, {10, 12, 11}, {10, 7, 10}, {10, 7, 0}, {10, 7, 99}, {10, -1, 11}};
  for (const auto &one : wrong) {
    steps[6].x = one[0], steps[6].add = one[1], steps[6].sum = one[2];
    ok = ok && w8a8_run(&plan, 1) == W8A8_BAD_ARGUMENT;
  }
  steps[6] = before, steps[1].heads = static_cast<int32_t>(width) + 1;
  ok = ok && w8a8_run(&plan, 1) == W8A8_BAD_ARGUMENT;
  if (!ok) std::printf("FAILED plan: isa %s seed %d\n", w8a8_isa_name(), static_cast<int>(seed));
  return ok;
}
