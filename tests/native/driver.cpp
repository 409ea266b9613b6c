// Every kernel of every instruction set this machine can run, against naive loops.  Built plain, with the sanitizers
// (ASan + UBSan, TSan) and for AArch64 under qemu: no Python and no torch in the process, so what they report is ours.
//
//     driver [cases] [seed] [isa]        exit status 0: all equal
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <thread>
#include <vector>

#include "internal.h"

using namespace w8a8;

bool planned(uint64_t seed);   // plan.cpp
bool paired();                  // pairs.cpp

namespace {

// --- the contract, as plainly as it can be written --------------------------------------------------------------------

struct Naive {
  std::vector<int> codes;   // (M, K)
  std::vector<float> sx;
  std::vector<int> zx;
};

float safe_scale(float span, int steps) {
  if (span == 0) return 1;
  return std::max(span / static_cast<float>(steps), std::numeric_limits<float>::min());
}

Naive naive_quantize(const std::vector<float> &x, int64_t m, int64_t k, int mode, int bits, float scale, int zero) {
  const int qmax = (1 << (bits - 1)) - 1, qmin = -qmax - 1;
  const bool asym = mode & 1;
  const int low = asym || mode == W8A8_STATIC_SYM ? qmin : -qmax;
  Naive out{std::vector<int>(static_cast<size_t>(m * k)), {}, {}};
  std::vector<float> lo(static_cast<size_t>(m)), hi(lo);
  std::vector<char> finite(static_cast<size_t>(m), 1);
  float all_lo = 0, all_hi = 0;
  for (int64_t i = 0; i < m; ++i) {
    const size_t r = static_cast<size_t>(i);
    for (int64_t j = 0; j < k; ++j) {
      const float v = x[static_cast<size_t>(i * k + j)];
      if (!std::isfinite(v)) finite[r] = 0;
      else lo[r] = std::min(lo[r], v), hi[r] = std::max(hi[r], v);
    }
    if (finite[r]) all_lo = std::min(all_lo, lo[r]), all_hi = std::max(all_hi, hi[r]);
  }
  for (int64_t i = 0; i < m; ++i) {
    const size_t r = static_cast<size_t>(i);
    const bool shared = mode == W8A8_TENSOR_SYM || mode == W8A8_TENSOR_ASYM;
    const float l = shared ? all_lo : lo[r], h = shared ? all_hi : hi[r];
    float s = scale;
    int z = asym ? zero : 0;
    if (mode < W8A8_STATIC_SYM && asym) {
      s = safe_scale(h - l, qmax - qmin);
      z = static_cast<int>(std::clamp(std::nearbyint(static_cast<float>(qmin) - l / s), static_cast<float>(qmin),
                                      static_cast<float>(qmax)));
    } else if (mode < W8A8_STATIC_SYM) {
      s = safe_scale(std::max(-l, h), qmax);
    }
    for (int64_t j = 0; j < k; ++j) {
      const size_t e = static_cast<size_t>(i * k + j);
      const float q = std::nearbyint(x[e] / s) + static_cast<float>(z);
      out.codes[e] = finite[r] ? static_cast<int>(std::clamp(q, static_cast<float>(low),
                                                             static_cast<float>(qmax)))
                               : 0;
    }
    out.sx.push_back(finite[r] ? s : std::numeric_limits<float>::quiet_NaN());
    out.zx.push_back(finite[r] ? z : 0);
  }
  return out;
}

bool same(const void *a, const void *b, int dtype) {
  const float va = load_one(a, dtype, 0), vb = load_one(b, dtype, 0);
  return (std::isnan(va) && std::isnan(vb)) || std::memcmp(a, b, dtype_bytes(dtype)) == 0;
}

// --- one random case ---------------------------------------------------------------------------------------------------

struct Random {
  std::mt19937_64 engine;
  template <class T>
  T pick(std::initializer_list<T> l) { return l.begin()[engine() % l.size()]; }
  int below(int n) { return static_cast<int>(engine() % static_cast<uint64_t>(n)); }
  float normal() { return std::normal_distribution<float>()(engine); }
  float uniform() { return std::uniform_real_distribution<float>()(engine); }
};

#define CHECK(what)                                                                                              \
  if (!(what)) {                                                                                                 \
    std::printf("FAILED %s: isa %s seed %llu m %d n %d k %d dtype %d mode %d bits %d threads %d\n", #what,       \
                isa().name, static_cast<unsigned long long>(seed), m, n, k, dtype, mode, bits, threads);          \
    return false;                                                                                                \
  }

bool one_case(uint64_t seed) {
  Random rnd{std::mt19937_64(seed)};
  // Some are large enough for what only large products do: several blocks of rows, K in chunks and split, tasks that
  // quantise their own rows.
  const bool large = seed % 40 == 7, deep = seed % 80 == 7, many = seed % 97 == 13;
  const int m = many ? 20000 : large ? rnd.pick({33, 48, 65, 129, 200, 257, 300}) : rnd.pick({0, 1, 2, 3, 4, 5, 6, 7, 13, 14, 15, 16, 17, 29, 40});
  const int n = many ? 3 : large ? rnd.pick({1, 33, 70, 100}) : rnd.pick({0, 1, 7, 16, 31, 32, 33, 64, 100});
  const int k = many    ? rnd.pick({0, 3})
                : deep  ? rnd.pick({5001, 5632, 5700})
                : large ? rnd.pick({64, 700, 705, 1500})
                        : rnd.pick({0, 1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 100, 128, 200, 513});
  const int dtype = rnd.below(3), mode = rnd.below(6), bits = rnd.pick({8, 8, 8, 2, 3, 4, 7});
  const int threads = rnd.pick({0, 1, 2, 3, 7}), pad = rnd.pick({0, 0, 1, 5});
  const float x_scale = std::exp2(rnd.normal() * 4) * (rnd.below(8) ? 1.0f : 0x1p-110f);
  const int zero = rnd.below(1 << bits) - (1 << (bits - 1));
  const float order = std::exp2(static_cast<float>(rnd.pick({0, 0, 0, 10, -10, -130, 120})));

  // Exactly as large as promised, on the heap: a byte read or written beyond is seen by ASan.
  const size_t item = dtype_bytes(dtype);
  const int64_t ldx = k + pad, ldy = n + pad;
  const size_t x_items = m ? static_cast<size_t>((m - 1) * ldx + k) : 0, y_items = m ? static_cast<size_t>((m - 1) * ldy + n) : 0;
  std::vector<char> x(x_items * item), y(y_items * item, 42), want(y);
  std::vector<float> xf(static_cast<size_t>(m * k));
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < k; ++j) {
      float v = rnd.normal() * order;
      if (rnd.below(5) == 0) v = 0;
      if (rnd.below(400) == 0) v = rnd.pick({INFINITY, -INFINITY, std::nanf("")});
      store_one(x.data(), dtype, i * ldx + j, v);
      xf[static_cast<size_t>(i * k + j)] = load_one(x.data(), dtype, i * ldx + j);
    }
  std::vector<int8_t> w(static_cast<size_t>(n * k));
  const bool extreme = rnd.below(10) == 0;
  for (auto &v : w) v = static_cast<int8_t>(extreme ? -128 : rnd.below(256) - 128);
  std::vector<float> sw(static_cast<size_t>(n)), bias(sw);
  for (auto &v : sw) v = rnd.uniform();
  for (auto &v : bias) v = rnd.normal();
  const bool with_bias = rnd.below(2), per_tensor = n > 0 && rnd.below(4) == 0;

  std::vector<int8_t> packed(static_cast<size_t>(w8a8_packed_bytes(n, k)), 42);
  std::vector<int32_t> colsum(static_cast<size_t>(n));
  CHECK(w8a8_pack(w.data(), k, n, k, packed.data(), colsum.data(), threads) == W8A8_OK)
  for (int64_t at = 0; at < static_cast<int64_t>(packed.size()); ++at) {
    const int64_t in_panel = at % panel_bytes(k), column = at / panel_bytes(k) * kPanel + in_panel % kPanelStep / kGroup;
    const int64_t i = in_panel / kPanelStep * kGroup + in_panel % kGroup;
    CHECK(packed[static_cast<size_t>(at)] == (column < n && i < k ? w[static_cast<size_t>(column * k + i)] : 0))
  }

  const Naive q = naive_quantize(xf, m, k, mode, bits, x_scale, zero);
  std::vector<int32_t> acc(static_cast<size_t>(m * n));
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) {
      int64_t sum = 0, raw = 0;
      for (int e = 0; e < k; ++e) {
        const int code = q.codes[static_cast<size_t>(i * k + e)], weight = w[static_cast<size_t>(j * k + e)];
        sum += (code - q.zx[static_cast<size_t>(i)]) * weight, raw += code * weight;
      }
      acc[static_cast<size_t>(i * n + j)] = static_cast<int32_t>(raw);
      float v = static_cast<float>(static_cast<int32_t>(sum)) * q.sx[static_cast<size_t>(i)];
      v = v * sw[static_cast<size_t>(per_tensor ? 0 : j)];
      if (with_bias) v = v + bias[static_cast<size_t>(j)];
      store_one(want.data(), dtype, i * ldy + j, v);
    }

  const w8a8_layer layer = {packed.data(), sw.data(), colsum.data(), with_bias ? bias.data() : nullptr, n, k,
                            !per_tensor, mode, bits, zero, x_scale};
  CHECK(w8a8_linear(&layer, x.data(), dtype, m, ldx, y.data(), ldy, threads) == W8A8_OK)
  for (size_t e = 0; e < y_items; ++e) CHECK(same(&y[e * item], &want[e * item], dtype))   // the gaps too

  std::vector<uint8_t> codes(static_cast<size_t>(m * k));
  std::vector<float> sx(static_cast<size_t>(m));
  std::vector<int32_t> zx(static_cast<size_t>(m));
  CHECK(w8a8_quantize_rows(x.data(), dtype, m, k, ldx, mode, bits, x_scale, zero, 0, codes.data(), k, sx.data(),
                           zx.data(), threads) == W8A8_OK)
  for (size_t e = 0; e < codes.size(); ++e) CHECK(static_cast<int8_t>(codes[e]) == q.codes[e])
  std::fill(y.begin(), y.end(), 42);
  CHECK(w8a8_finish(&layer, acc.data(), n, m, 0, sx.data(), zx.data(), dtype, y.data(), ldy, threads) == W8A8_OK)
  for (size_t e = 0; e < y_items; ++e) CHECK(same(&y[e * item], &want[e * item], dtype))

  // Three layers on one x.
  const w8a8_layer *three[3] = {&layer, &layer, &layer};
  std::vector<char> y1(y.size()), y2(y.size()), y3(y.size());
  void *ys[3] = {y1.data(), y2.data(), y3.data()};
  const int64_t lds[3] = {ldy, ldy, ldy};
  CHECK(w8a8_linear_many(three, 3, x.data(), dtype, m, ldx, ys, lds, threads) == W8A8_OK)
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) {
      const size_t e = static_cast<size_t>(i * ldy + j) * item;
      for (void *one : ys) CHECK(same(static_cast<char *>(one) + e, &want[e], dtype))
    }
  return true;
}

bool every_f16_and_bf16() {
  for (int i = 0; i < 65536; ++i) {
    const uint16_t h = static_cast<uint16_t>(i);
    const float a = from_f16(h), b = from_bf16(h);
    if (!std::isnan(a) && to_f16(a) != h) return false;
    if (!std::isnan(b) && to_bf16(b) != h) return false;
  }
  return true;
}

// A grid of quotients around every half, the places where a reciprocal could round to another code.
bool halves(uint64_t seed) {
  std::mt19937_64 engine(seed);
  constexpr int kRow = 4096;
  std::vector<float> x(kRow), scale(1);
  std::vector<uint8_t> codes(kRow);
  std::vector<int32_t> zero(1);
  const float s = bits_float(static_cast<uint32_t>((engine() % (230u << 23)) + (12u << 23)));   // 2**-115 .. 2**115
  for (int i = 0; i < kRow; ++i) {
    const float half = static_cast<float>(static_cast<int>(engine() % 260) - 130) + 0.5f;
    const float near = half * s;   // and up to four floats away from it
    x[static_cast<size_t>(i)] = bits_float(float_bits(near) + static_cast<uint32_t>(engine() % 9) - 4u);
  }
  w8a8_quantize_rows(x.data(), W8A8_F32, 1, kRow, kRow, W8A8_STATIC_SYM, 8, s, 0, 0, codes.data(), kRow, scale.data(),
                     zero.data(), 1);
  for (int i = 0; i < kRow; ++i) {
    const float q = std::clamp(std::nearbyint(x[static_cast<size_t>(i)] / s), -128.0f, 127.0f);
    if (static_cast<int8_t>(codes[static_cast<size_t>(i)]) != static_cast<int>(q)) {
      std::printf("FAILED half: isa %s x %a scale %a\n", isa().name, static_cast<double>(x[static_cast<size_t>(i)]),
                  static_cast<double>(s));
      return false;
    }
  }
  return true;
}

// Rows that are normalised in the pass that quantises them are what they are on their own, and so are the products; and
// attention is that of double precision, whoever sees whom.
bool between(uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  auto some = [&](int64_t count) {
    std::vector<float> v(static_cast<size_t>(count));
    for (float &f : v) f = normal(random);
    return v;
  };
  auto size = [&](int most) { return static_cast<int64_t>(1 + random() % static_cast<uint64_t>(most)); };
  const int64_t m = size(40), k = size(200), n = size(90);
  const auto x = some(m * k), add = some(m * k), weight = some(k), bias = some(k), scale = some(n);
  std::vector<int8_t> w(static_cast<size_t>(n * k));
  for (int8_t &c : w) c = static_cast<int8_t>(static_cast<int>(random() % 255) - 127);
  std::vector<int8_t> packed(static_cast<size_t>(w8a8_packed_bytes(n, k)));
  std::vector<int32_t> sums(static_cast<size_t>(n));
  w8a8_pack(w.data(), k, n, k, packed.data(), sums.data(), 1);
  w8a8_layer layer = {};
  layer.packed = packed.data(), layer.scale = scale.data(), layer.colsum = sums.data(), layer.n = n, layer.k = k;
  layer.scale_stride = 1, layer.mode = W8A8_TOKEN_ASYM, layer.bits = 8;
  const w8a8_layer *both[2] = {&layer, &layer};
  std::vector<float> sum(x.size()), out(x.size()), sum2(x.size()), out2(x.size());
  w8a8_norm norm = {add.data(), sum.data(), out.data(), weight.data(), bias.data(), 1e-5f};
  w8a8_norm again = {add.data(), sum2.data(), out2.data(), weight.data(), bias.data(), 1e-5f};
  std::vector<float> y(static_cast<size_t>(m * n)), y2(y.size()), gelu(y.size());
  void *ys[2] = {y.data(), gelu.data()};
  const int64_t ld[2] = {n, n};
  const int32_t activation[2] = {W8A8_IDENTITY, W8A8_GELU};
  if (w8a8_linear_fused(&norm, both, 2, x.data(), W8A8_F32, m, k, ys, ld, activation, 3) != W8A8_OK) return false;
  if (w8a8_normalize(&again, x.data(), m, k, 2) != W8A8_OK) return false;
  if (w8a8_linear(&layer, out2.data(), W8A8_F32, m, k, y2.data(), n, 2) != W8A8_OK) return false;
  bool ok = sum == sum2 && out == out2 && y == y2;
  for (size_t i = 0; i < y.size(); ++i) {
    const double v = y[i], exact = 0.5 * v * (1 + std::erf(v * std::sqrt(0.5)));
    ok = ok && std::fabs(gelu[i] - exact) <= 1e-6 * std::fabs(v);
  }
  const int64_t b = size(2), h = size(3), t = size(30), s = size(40), d = size(40);
  const auto q = some(b * h * t * d), key = some(b * h * s * d), v = some(b * h * s * d), mask = some(b * t * s);
  std::vector<float> o(q.size());
  w8a8_attention a = {q.data(), key.data(), v.data(), o.data(), mask.data(), b, h, 1, t, s, d, {}, {}, {}, {}, {}, 0.5f, 0, 1};
  for (int64_t *at : {a.q_at, a.out_at}) at[0] = h * t * d, at[1] = t * d, at[2] = d;
  for (int64_t *at : {a.k_at, a.v_at}) at[0] = h * s * d, at[1] = s * d, at[2] = d;
  a.mask_at[0] = t * s, a.mask_at[2] = s, a.mask_at[3] = 1, a.causal = static_cast<int32_t>(random() & 1);
  if (w8a8_attend(&a, 3) != W8A8_OK) return false;
  for (int64_t i = 0; i < b * h * t; ++i) {
    const int64_t query = i % t, head = i / t, seen = a.causal ? std::min(s, query + 1) : s;
    std::vector<double> p(static_cast<size_t>(seen));
    double top = -1e300, total = 0;
    for (int64_t j = 0; j < seen; ++j) {
      double dot = 0;
      for (int64_t c = 0; c < d; ++c) dot += double{q[i * d + c]} * key[(head * s + j) * d + c];
      p[j] = 0.5 * dot + mask[(head / h * t + query) * s + j];
      top = std::max(top, p[j]);
    }
    for (double &e : p) total += e = std::exp(e - top);
    for (int64_t c = 0; c < d; ++c) {
      double exact = 0;
      for (int64_t j = 0; j < seen; ++j) exact += p[j] / total * v[(head * s + j) * d + c];
      ok = ok && std::fabs(o[i * d + c] - exact) <= 2e-5;
    }
  }
  if (!ok) std::printf("FAILED between: isa %s seed %d\n", w8a8_isa_name(), static_cast<int>(seed));
  return ok;
}

// Attention over keys and values in int8 is that of double precision over what they stand for, but for the sixteen bits of
// a query; and has the same bits in every instruction set and with any threads.
bool remembered(uint64_t seed) {
  static std::map<uint64_t, std::vector<float>> first;
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  auto some = [&](int64_t count) {
    std::vector<float> v(static_cast<size_t>(count));
    for (float &f : v) f = normal(random);
    return v;
  };
  auto size = [&](int most) { return static_cast<int64_t>(1 + random() % static_cast<uint64_t>(most)); };
  const int64_t b = size(2), h = size(3), shared = size(4), t = size(3), s = t + size(700), d = size(80), e = size(80);
  const int64_t room = (s + 15) / 16 * 16, pairs = (d + 1) / 2, e_room = (e + 15) / 16 * 16;
  const auto key = some(b * h * s * d), value = some(b * h * s * e), q = some(b * h * shared * t * d);
  std::vector<int8_t> key_codes(static_cast<size_t>(b * h * room * 2 * pairs)), value_codes(static_cast<size_t>(b * h * room * e_room));
  std::vector<float> key_scale(static_cast<size_t>(b * h * room)), value_scale(key_scale);
  w8a8_cached cached = {key_codes.data(), key_scale.data(), value_codes.data(), value_scale.data(), b, h, room, d, e};
  const int64_t keys_at[3] = {h * s * d, s * d, d}, values_at[3] = {h * s * e, s * e, e};
  std::vector<float> k(key.size()), v(value.size()), out(static_cast<size_t>(b * t * h * shared * e)), again(out.size());
  if (w8a8_cached_append(&cached, key.data(), keys_at, value.data(), values_at, W8A8_F32, 0, s, 2) != W8A8_OK) return false;
  if (w8a8_cached_read(&cached, 1, 0, s, W8A8_F32, k.data(), 2) != W8A8_OK) return false;
  if (w8a8_cached_read(&cached, 0, 0, s, W8A8_F32, v.data(), 1) != W8A8_OK) return false;
  w8a8_cached_attention a = {};
  a.cached = cached, a.q = q.data(), a.out = out.data(), a.shared = shared, a.queries = t, a.end = s, a.scale = 0.3f;
  a.q_at[0] = h * shared * t * d, a.q_at[1] = t * d, a.q_at[2] = d, a.dtype = W8A8_F32, a.causal = 1;
  if (w8a8_cached_attend(&a, 1) != W8A8_OK) return false;
  a.out = again.data();
  if (w8a8_cached_attend(&a, 3) != W8A8_OK) return false;
  const auto &bits = first.emplace(seed, out).first->second;
  bool ok = std::memcmp(out.data(), again.data(), out.size() * sizeof(float)) == 0 &&
            std::memcmp(out.data(), bits.data(), out.size() * sizeof(float)) == 0;
  // what is rotated back has at most the error of a code, half of its scale
  for (int64_t i = 0; i < b * h * s * d; ++i)
    ok = ok && std::fabs(k[i] - key[i]) <= 0.50001f * key_scale[i / (s * d) * room + i / d % s];
  for (int64_t i = 0; i < b * h * shared * t; ++i) {
    const int64_t query = i % t, head = i / t, seen = s - t + query + 1, from = head / shared;
    std::vector<double> p(static_cast<size_t>(seen));
    double top = -1e300, total = 0;
    for (int64_t j = 0; j < seen; ++j) {
      double dot = 0;
      for (int64_t c = 0; c < d; ++c) dot += double{q[i * d + c]} * k[(from * s + j) * d + c];
      p[j] = 0.3 * dot;
      top = std::max(top, p[j]);
    }
    for (double &x : p) total += x = std::exp(x - top);
    const int64_t batch = head / (h * shared), place = ((batch * t + query) * h * shared + head % (h * shared)) * e;
    for (int64_t c = 0; c < e; ++c) {
      double exact = 0;
      for (int64_t j = 0; j < seen; ++j) exact += p[j] / total * v[(from * s + j) * e + c];
      ok = ok && std::fabs(out[place + c] - exact) <= 1e-3;
    }
  }
  if (!ok) std::printf("FAILED remembered: isa %s seed %d\n", w8a8_isa_name(), static_cast<int>(seed));
  return ok;
}

}  // namespace

int main(int argc, char **argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 300;
  const uint64_t seed0 = argc > 2 ? static_cast<uint64_t>(std::atoll(argv[2])) : 0;
  if (!every_f16_and_bf16()) return std::puts("FAILED float16 conversions"), 1;
  if (!paired()) return 1;
  std::printf("chosen: %s\n", w8a8_isa_name());
  for (int i = 0; i < w8a8_isa_count(); ++i) {
    int usable = 0;
    const char *name = w8a8_isa_at(i, &usable);
    if (argc > 3 && std::strcmp(argv[3], name) != 0) continue;
    if (!usable) {
      std::printf("%-14s cannot be used: %s\n", name, w8a8_isa_why_not(i));
      continue;
    }
    if (w8a8_isa_use(name) != W8A8_OK) return 1;
    for (int c = 0; c < cases; ++c)
      if (!one_case(seed0 + static_cast<uint64_t>(c)) || !halves(seed0 + static_cast<uint64_t>(c)) ||
          !between(seed0 + static_cast<uint64_t>(c)) || !remembered(seed0 + static_cast<uint64_t>(c)) ||
          !planned(seed0 + static_cast<uint64_t>(c)))
        return 1;
    // Several callers at once, each with threads of its own.
    std::vector<std::thread> callers;
    std::atomic<bool> ok{true};
    for (int t = 0; t < 4; ++t)
      callers.emplace_back([&, t] {
        for (int c = 0; c < cases / 8; ++c)
          if (!one_case(seed0 + 1000000u * static_cast<uint64_t>(t + 1) + static_cast<uint64_t>(c))) ok = false;
      });
    for (auto &t : callers) t.join();
    if (!ok) return 1;
    std::printf("%-14s %d cases and %d quotients equal (%s)\n", name, cases + cases / 8 * 4, cases * 4096,
                w8a8_parallel_name());
    std::fflush(stdout);
  }
  w8a8_isa_use(nullptr);
  std::printf("the table:");
  int64_t rows, least;
  for (int i = 0; const char *name = w8a8_choice_at(i, &rows, &least); ++i)
    std::printf(" %s from %d rows and K = %d;", name, static_cast<int>(rows), static_cast<int>(least));
  std::printf("\n");
  // A forked child has none of the parent's threads and must still finish.
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    bool ok = true;
    for (int c = 0; c < 20; ++c) ok = one_case(static_cast<uint64_t>(c)) && ok;
    _exit(ok ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  std::printf("forked child: %s\n", status == 0 ? "equal" : "FAILED");
  return status != 0;
}
