// Attention of a few queries over keys and values in int8, written once for every width of vector.
//
// A file that includes this has floats.h before it, and says how sixteen-bit integers are multiplied and added here:
// `Pairs`, two of each of kWidth keys, from codes (`pairs_of`) or all alike (`all_pairs`); `dot`, which adds their products
// to `Sums`, kWidth integers.
//
// Scores are exact integers times three scales.  The values are added up by fused multiply-adds, token by token, and what
// is rotated by sums and differences in an order of its own.  So what is computed does not depend on the width.

// Within sixteen elements a sum over them in their order, and from there on sums and differences of what lies further apart:
// nothing is moved across a register.
static void rotate(float *x, int64_t room, int64_t block) {
  static constexpr Hadamard kSigns = hadamard();
  const float *const signs = kSigns.at[__builtin_ctzll(static_cast<uint64_t>(block < 16 ? block : 16))][0];
  for (float *at = x; at < x + room; at += 16) {
    Floats_ sum[kParts] = {};
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j)
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) sum[p] += all(at[j]) * load(signs + 16 * j + p * kWidth);
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) store(at + p * kWidth, sum[p]);
  }
  for (int64_t apart = 16; apart < block; apart *= 2)
    for (float *at = x; at < x + room; at += 2 * apart)
      for (int64_t i = 0; i < apart; i += kWidth) {
        const Floats_ a = load(at + i), b = load(at + apart + i);
        store(at + i, a + b), store(at + apart + i, a - b);
      }
}

// A lane for each number of steps, and the sums in the order of the elements.  In units of a step, so that nothing overflows.
static float best_steps(const float *x, int64_t k, float top) {
  float each[kSteps], errors[kSteps];
  for (int i = 0; i < kSteps; ++i) each[i] = static_cast<float>(kMostSteps - i);
  Floats_ inverse[kParts], sum[kParts] = {};
  for (int p = 0; p < kParts; ++p) inverse[p] = load(each + p * kWidth) / top;
  for (int64_t j = 0; j < k; ++j) {
    const Floats_ left = all(x[j]);
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      const Floats_ scaled = left * inverse[p], shifted = scaled + 0x1.8p23f;   // rounded by the adder, half to even
      const Floats_ off = scaled - (shifted - 0x1.8p23f);
      sum[p] += off * off;
    }
  }
  for (int p = 0; p < kParts; ++p) store(errors + p * kWidth, sum[p]);
  float least = __builtin_inff(), found = each[0];
  for (int i = 0; i < kSteps; ++i) {
    const float error = errors[i] * (1.0f / (each[i] * each[i]));   // NaN where `top` is so small that its inverse is none
    if (error < least) least = error, found = each[i];
  }
  return found;
}

// Scores of R queries, (R, kPiece).
template <int R>
static void score(const Piece &t, int first, float *scores) {
  const int32_t *q[R];
  for (int r = 0; r < R; ++r) q[r] = reinterpret_cast<const int32_t *>(t.q + (first + r) * 2 * t.pairs);
  for (int64_t place = 0; place < t.places; place += kCachedTile) {
    const int8_t *keys = t.keys + place * 2 * t.pairs;
    Sums sum[R][kParts] = {};
    for (int64_t pair = 0; pair < t.pairs; ++pair, keys += 2 * kCachedTile) {
      Pairs key[kParts];
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) key[p] = pairs_of(keys + p * 2 * kWidth);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Pairs query = all_pairs(q[r][pair]);
#pragma GCC unroll 4
        for (int p = 0; p < kParts; ++p) sum[r][p] = dot(sum[r][p], key[p], query);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) {
        const int64_t i = place + p * kWidth;
        const Floats_ exact = __builtin_convertvector(reinterpret_cast<Ints_>(sum[r][p]), Floats_);
        store(scores + r * kPiece + i, exact * t.factor[first + r] * load(t.key_scale + i));
      }
  }
}

// cap * tanh(x / cap)
W8A8_INLINE Floats_ bent(Floats_ x, float cap) {
  const Floats_ e = exponential(least(x * (2.0f / cap), all(88.0f)));
  return x == x ? (1.0f - 2.0f / (e + 1.0f)) * cap : x;
}

// Scores of one query -> weights of the values' codes, or of values as they came, in their place.
static Part weigh_piece(const Piece &t, const float *bias, float *s) {
  const float none = -__builtin_inff();
  Floats_ top = all(none), odd = {};
  for (int64_t i = 0; i < t.places; i += kWidth) {
    const Floats_ b = load(bias + i), x = load(s + i);
    const Floats_ v = b == none ? all(none) : (t.softcap != 0.0f ? bent(x, t.softcap) : x) + b;
    store(s + i, v);
    top = most(v, top);
    odd += v == v ? Floats_{} : v;   // NaN as soon as one is
  }
  Part part = {greatest_of(top), 0.0f};
  float spoiled = 0;
  for (int i = 0; i < kWidth; ++i) spoiled += odd[i];
  if (part.top == none) std::memset(s, 0, static_cast<size_t>(t.places) * 4);
  else {
    Lanes sum = {};
    for (int64_t i = 0; i < t.places; i += 16)
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) {
        const int64_t at = i + p * kWidth;
        const Floats_ e = exponential(load(s + at) - part.top);
        // what has no weight may be anything
        store(s + at, !t.value_scale ? e : e == 0.0f ? Floats_{} : e * load(t.value_scale + at));
        sum.part[p] += e;
      }
    part.whole = total(sum);
  }
  if (spoiled != spoiled) part.whole = spoiled;
  return part;
}

template <int R>
static void rows_of_piece(const Piece &t, int first, float *scores, Part *part, float *sums) {
  score<R>(t, first, scores);
  for (int r = 0; r < R; ++r) part[r] = weigh_piece(t, t.bias[first + r], scores + r * kPiece);
  multiply_rows<R>(scores, kPiece, t.values, t.value_room, t.places, sums, t.value_room, t.value_room, false);
}

template <int R>
static void any_rows_of_piece(int rows, const Piece &t, int first, float *scores, Part *part, float *sums) {
  if (rows == R) return rows_of_piece<R>(t, first, scores, part, sums);
  if constexpr (R > 1) any_rows_of_piece<R - 1>(rows, t, first, scores, part, sums);
}

static void piece(const Piece &t, float *scores, Part *part, float *sums) {
  const int tiles = static_cast<int>(div_up(t.rows, kQueries));   // dealt out evenly
  for (int tile = 0; tile < tiles; ++tile) {
    const int first = t.rows * tile / tiles, rows = t.rows * (tile + 1) / tiles - first;
    any_rows_of_piece<kQueries>(rows, t, first, scores, part + first, sums + first * t.value_room);
  }
}

static float query(const float *x, int64_t k, int64_t pairs, int16_t *codes) {
  constexpr int kMost = 32767;
  Floats_ top = {}, odd = {};
  for (int64_t i = 0; i < k; i += kWidth) {
    const Floats_ v = load(x + i), size = most(v, -v);
    top = most(size, top);
    odd += v - v;   // NaN for what is not finite
  }
  float span = 0, spoiled = 0;
  for (int i = 0; i < kWidth; ++i) span = top[i] > span ? top[i] : span, spoiled += odd[i];
  if (spoiled != spoiled) {
    std::memset(codes, 0, static_cast<size_t>(pairs) * 4);
    return spoiled;
  }
  float scale = span == 0.0f ? 1.0f : span / kMost;
  if (scale < 0x1p-126f) scale = 0x1p-126f;
  int64_t i = 0;
  for (; i < k; i += kWidth) {
    const Floats_ shifted = load(x + i) / scale + 0x1.8p23f;   // rounded by the adder, half to even
    Ints_ n;
    std::memcpy(&n, &shifted, sizeof n);
    n -= 0x4b400000;
    for (int64_t j = 0; j < kWidth && i + j < 2 * pairs; ++j) codes[i + j] = static_cast<int16_t>(n[j]);
  }
  return scale;
}

static void merge(const Part *part, const float *sums, int64_t pieces, int64_t stride, int64_t value_room, float sink, float *out) {
  float top = sink;
  for (int64_t c = 0; c < pieces; ++c) top = part[c * stride].top > top ? part[c * stride].top : top;
  if (top == -__builtin_inff()) top = 0;
  float whole = exponential(all(sink - top))[0];
  std::memset(out, 0, static_cast<size_t>(value_room) * 4);
  for (int64_t c = 0; c < pieces; ++c) {
    const float factor = exponential(all(part[c * stride].top - top))[0];
    whole += part[c * stride].whole * factor;
    for (int64_t j = 0; j < value_room; j += kWidth)
      store(out + j, load(out + j) + load(sums + c * stride * value_room + j) * factor);
  }
  for (int64_t j = 0; j < value_room; j += kWidth)
    store(out + j, whole == 0.0f ? Floats_{} : load(out + j) / whole);
}
