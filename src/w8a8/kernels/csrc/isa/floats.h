// What lies between products, written once for every width of vector: activations, LayerNorm, attention.
//
// A file that includes this is one instruction set: within its target region it defines `kWidth` (floats in a vector), how
// one float fills a vector (`all`), `least`, `most` and `fma`, how kWidth codes become floats (`load`), and then instantiates.
// Activations and norms use no fused multiply-add, and every sum runs in sixteen lanes that are added up in one fixed order,
// however wide the vectors are; so all instruction sets give the same bits.  The products of attention are fused
// multiply-adds in the order of the axis that is summed over, which no width changes either.
//
// Exponentials: 2**n times a polynomial, relative error below 2e-7.  The error function of GELU: an odd rational function
// on |x| <= 5.6, beyond which it is one; its relative error is below 5e-7.  (The coefficients are a weighted least-squares
// fit, exchanged until the error is level.)

typedef float Floats_ __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints_ __attribute__((vector_size(4 * kWidth)));
#define W8A8_INLINE static inline __attribute__((always_inline))

constexpr int kParts = 16 / kWidth;   // vectors that hold sixteen lanes

W8A8_INLINE Floats_ load(const float *p) {
  Floats_ v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
W8A8_INLINE void store(float *p, Floats_ v) { std::memcpy(p, &v, sizeof v); }

// a * b + c, rounded once or twice
template <bool Once>
W8A8_INLINE Floats_ multiplied(Floats_ a, Floats_ b, Floats_ c) {
  return Once ? fma(a, b, c) : a * b + c;
}

// exp(x) for x <= 88; zero from -87 down.  NaN stays.
template <bool Once = false>
W8A8_INLINE Floats_ exponential(Floats_ x) {
  const Floats_ shifted = multiplied<Once>(x, all(0x1.715476p0f), all(0x1.8p23f));   // x / ln 2, rounded by the adder
  Ints_ n;
  std::memcpy(&n, &shifted, sizeof n);
  const Floats_ whole = shifted - 0x1.8p23f;
  // ln 2 in two pieces, the first short enough for an exact product
  const Floats_ r = multiplied<Once>(whole, all(-0x1.0bfbe8p-15f), multiplied<Once>(whole, all(-0x1.62ep-1f), x));
  Floats_ p = multiplied<Once>(r, all(1.3981999e-3f), all(8.3334519e-3f));
  p = multiplied<Once>(p, r, all(4.1665796e-2f));
  p = multiplied<Once>(p, r, all(0.16666666f));
  p = multiplied<Once>(p, r, all(0.5f));
  p = (Once ? fma(p, r * r, r) : p * r * r + r) + 1.0f;
  const Ints_ power = (n - 0x4b400000 + 127) << 23;
  Floats_ two;
  std::memcpy(&two, &power, sizeof two);
  return x < -87.0f ? Floats_{} : p * two;
}

W8A8_INLINE Floats_ gelu(Floats_ x) {
  const Floats_ t = most(least(x, all(5.6f)), all(-5.6f)), u = t * t;
  Floats_ p = u * 4.459478475e-8f + 1.2579560461745132e-5f;
  p = p * u + 3.378592664375901e-4f;
  p = p * u + 9.354705922305584e-3f;
  p = p * u + 6.785813719034195e-2f;
  p = p * u + 0.7978845238685608f;
  Floats_ q = u * 1.1796565786426072e-6f + 7.334431475145572e-5f;
  q = q * u + 1.8854942172765732e-3f;
  q = q * u + 2.8677579015493393e-2f;
  q = q * u + 0.2517138719558716f;
  q = q * u + 1.0f;
  const Floats_ e = most(least(t * (p / q), all(1.0f)), all(-1.0f));
  return x * 0.5f * (e + 1.0f);
}

// x * sigmoid(2 z), what GELU's tanh form is with its z, and SiLU with z = x / 2
W8A8_INLINE Floats_ gated(Floats_ x, Floats_ twice) {
  const Floats_ e = exponential(least(-twice, all(88.0f)));
  return x / (e + 1.0f);
}

template <int Kind>
W8A8_INLINE Floats_ activated(Floats_ x) {
  if (Kind == W8A8_RELU) return x < 0.0f ? Floats_{} : x;
  if (Kind == W8A8_GELU) return gelu(x);
  if (Kind == W8A8_GELU_TANH) return gated(x, x * (x * x * 0.0713548163f + 1.5957691216f));
  return gated(x, x);
}

template <int Kind>
static void activate_as(float *y, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(y + i, activated<Kind>(load(y + i)));
  if (i == n) return;
  float rest[kWidth] = {};
  std::memcpy(rest, y + i, static_cast<size_t>(n - i) * 4);
  store(rest, activated<Kind>(load(rest)));
  std::memcpy(y + i, rest, static_cast<size_t>(n - i) * 4);
}

static void activate(int kind, float *y, int64_t n) {
  switch (kind) {
    case W8A8_RELU: return activate_as<W8A8_RELU>(y, n);
    case W8A8_GELU: return activate_as<W8A8_GELU>(y, n);
    case W8A8_GELU_TANH: return activate_as<W8A8_GELU_TANH>(y, n);
    case W8A8_SILU: return activate_as<W8A8_SILU>(y, n);
  }
}

// Sixteen lanes of a sum.
struct Lanes {
  Floats_ part[kParts];
};
W8A8_INLINE float total(const Lanes &lanes) {
  float v[16];
  for (int i = 0; i < kParts; ++i) store(v + i * kWidth, lanes.part[i]);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}

// The sum over i < n of of(x[i]), where lanes beyond n add what `of` makes of them with `valid` false: nothing.
template <class Of>
W8A8_INLINE float summed(int64_t n, const Of &of) {
  Lanes sum = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int p = 0; p < kParts; ++p) sum.part[p] += of(i + p * kWidth, kWidth);
  for (int p = 0; i < n; i += kWidth, ++p) sum.part[p] += of(i, n - i < kWidth ? static_cast<int>(n - i) : kWidth);
  return total(sum);
}

W8A8_INLINE Floats_ load_some(const float *p, int count) {
  if (count == kWidth) return load(p);
  float v[kWidth] = {};
  std::memcpy(v, p, static_cast<size_t>(count) * 4);
  return load(v);
}
W8A8_INLINE void store_some(float *p, Floats_ v, int count) {
  if (count == kWidth) return store(p, v);
  float all_[kWidth];
  store(all_, v);
  std::memcpy(p, all_, static_cast<size_t>(count) * 4);
}
// v in the first `count` lanes, zero beyond
W8A8_INLINE Floats_ only(Floats_ v, int count) {
  if (count == kWidth) return v;
  float all_[kWidth] = {};
  store(all_, v);
  for (int i = count; i < kWidth; ++i) all_[i] = 0;
  return load(all_);
}

template <class Body>
W8A8_INLINE void each(int64_t n, const Body &body) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) body(i, kWidth);
  if (i < n) body(i, static_cast<int>(n - i));
}

static void norm_row(const w8a8_norm &r, const float *x, int64_t n) {
  if (r.add) {
    each(n, [&](int64_t i, int c) { store_some(r.sum + i, load_some(x + i, c) + load_some(r.add + i, c), c); });
    x = r.sum;
  }
  const float k = static_cast<float>(n);
  const float mean = summed(n, [&](int64_t i, int c) { return load_some(x + i, c); }) / k;
  const float square = summed(n, [&](int64_t i, int c) {
    const Floats_ d = load_some(x + i, c) - mean;
    return only(d * d, c);
  });
  const float inverse = 1.0f / __builtin_sqrtf(square / k + r.eps);
  each(n, [&](int64_t i, int c) {
    Floats_ v = (load_some(x + i, c) - mean) * inverse;
    if (r.weight) v = v * load_some(r.weight + i, c);
    if (r.bias) v = v + load_some(r.bias + i, c);
    store_some(r.out + i, v, c);
  });
}

// --- attention ----------------------------------------------------------------------------------------------------

// c[r][j] (+)= sum_d a[r][d] b[d][j] for R rows and V vectors of columns, d ascending; b: floats, or codes.
template <int R, int V, class T>
W8A8_INLINE void multiply(const float *a, int64_t lda, const T *b, int64_t ldb, int64_t depth, float *c, int64_t ldc,
                          bool adds) {
  Floats_ sum[R][V] = {};
  if (adds)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] = load(c + r * ldc + v * kWidth);
#pragma GCC unroll 4
  for (int64_t d = 0; d < depth; ++d) {
    Floats_ right[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) right[v] = load(b + d * ldb + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Floats_ left = all(a[r * lda + d]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] = fma(left, right[v], sum[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(c + r * ldc + v * kWidth, sum[r][v]);
}

// Rows of `c` in whole vectors: `columns` is a multiple of the width, and b and c have that much room.
template <int R, class T>
W8A8_INLINE void multiply_rows(const float *a, int64_t lda, const T *b, int64_t ldb, int64_t depth, float *c,
                               int64_t ldc, int64_t columns, bool adds) {
  int64_t j = 0;
  for (; j + kColumns * kWidth <= columns; j += kColumns * kWidth)
    multiply<R, kColumns>(a, lda, b + j, ldb, depth, c + j, ldc, adds);
  for (; j + 2 * kWidth <= columns; j += 2 * kWidth) multiply<R, 2>(a, lda, b + j, ldb, depth, c + j, ldc, adds);
  for (; j < columns; j += kWidth) multiply<R, 1>(a, lda, b + j, ldb, depth, c + j, ldc, adds);
}

template <int R>
static void multiply_any(int rows, const float *a, int64_t lda, const float *b, int64_t ldb, int64_t depth, float *c,
                         int64_t ldc, int64_t columns, bool adds) {
  if (rows == R) return multiply_rows<R>(a, lda, b, ldb, depth, c, ldc, columns, adds);
  if constexpr (R > 1) multiply_any<R - 1>(rows, a, lda, b, ldb, depth, c, ldc, columns, adds);
}

// The same for any number of rows, in tiles that are as even as can be.
static void multiply_all(int64_t rows, const float *a, int64_t lda, const float *b, int64_t ldb, int64_t depth, float *c,
                         int64_t ldc, int64_t columns, bool adds) {
  const int64_t tiles = div_up(rows, kQueries);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = rows * tile / tiles;
    multiply_any<kQueries>(static_cast<int>(rows * (tile + 1) / tiles - first), a + first * lda, lda, b, ldb, depth,
                           c + first * ldc, ldc, columns, adds);
  }
}

// to[d][i] = from[i][d]; `from` has rows of `ld`, `to` of `room`.
static void transpose(const float *from, int64_t ld, int64_t rows, int64_t columns, float *to, int64_t room) {
  typedef float Four __attribute__((vector_size(16)));
  typedef int32_t Order __attribute__((vector_size(16)));
#if defined(__clang__)
#define W8A8_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define W8A8_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, Order{i, j, k, l})
#endif
  const int64_t whole_rows = rows / 4 * 4, whole = columns / 4 * 4;
  for (int64_t i = 0; i < whole_rows; i += 4)
    for (int64_t d = 0; d < whole; d += 4) {
      Four x[4];
      for (int r = 0; r < 4; ++r) std::memcpy(&x[r], from + (i + r) * ld + d, 16);
      const Four ab = W8A8_SHUFFLE(x[0], x[1], 0, 4, 1, 5), cd = W8A8_SHUFFLE(x[2], x[3], 0, 4, 1, 5);
      const Four ab2 = W8A8_SHUFFLE(x[0], x[1], 2, 6, 3, 7), cd2 = W8A8_SHUFFLE(x[2], x[3], 2, 6, 3, 7);
      const Four y[4] = {W8A8_SHUFFLE(ab, cd, 0, 1, 4, 5), W8A8_SHUFFLE(ab, cd, 2, 3, 6, 7),
                         W8A8_SHUFFLE(ab2, cd2, 0, 1, 4, 5), W8A8_SHUFFLE(ab2, cd2, 2, 3, 6, 7)};
      for (int r = 0; r < 4; ++r) std::memcpy(to + (d + r) * room + i, &y[r], 16);
    }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t d = i < whole_rows ? whole : 0; d < columns; ++d) to[d * room + i] = from[i * ld + d];
#undef W8A8_SHUFFLE
}

// The greatest of some lanes, none of which is NaN.
W8A8_INLINE float greatest_of(Floats_ lanes) {
  float v[kWidth];
  store(v, lanes);
  for (int half = kWidth / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) v[i] = v[i] < v[i + half] ? v[i + half] : v[i];
  return v[0];
}

// Scores of one query -> weights in its place, less their common divisor, which is returned: NaN where a score is NaN, and
// 0 where no key may be seen.  `bias` is added to the scaled scores; it is minus infinity where there is no key to see.
static float weigh(float *s, const float *bias, int64_t room, float scale) {
  const float none = -__builtin_inff();
  Floats_ top = all(none);
  for (int64_t i = 0; i < room; i += kWidth) {
    const Floats_ v = fma(load(s + i), all(scale), load(bias + i));
    store(s + i, v);
    top = most(v, top);   // the second where v is NaN
  }
  const float greatest = greatest_of(top);
  if (greatest == none) {
    for (int64_t i = 0; i < room; ++i)
      if (s[i] != s[i]) return s[i];
    std::memset(s, 0, static_cast<size_t>(room) * 4);
    return 0.0f;
  }
  Lanes sum = {};
  for (int64_t i = 0; i < room; i += 16)
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      const Floats_ e = exponential<true>(load(s + i + p * kWidth) - greatest);
      store(s + i + p * kWidth, e);
      sum.part[p] += e;
    }
  return total(sum);
}

// not std::min: a copy of it that was compiled for one instruction set could become everybody's
W8A8_INLINE int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

// Queries are taken some tiles at a time: what a tile reads of the keys, or of the values, is then in the first cache for
// the tiles after it, and the scores of all of them are in the second.
static void attend(const w8a8_attention &t, int64_t batch, int64_t head, float *scratch) {
  constexpr int64_t kPanelKeys = 64;
  static_assert(4 * kQueries <= kMostQueries, "room for the scores");
  const float *q = head_of(t.q, t.q_at, batch, head), *k = head_of(t.k, t.k_at, batch, head / t.shared);
  const float *v = head_of(t.v, t.v_at, batch, head / t.shared);
  const int64_t keys = visible_keys(t, batch, head), room = round_up(keys, 16), dims = round_up(t.dims, 16);
  float *const bias = scratch;                     // (room)
  float *const across = bias + room;               // the keys, a column each, in panels: (room / 64, t.dims, 64)
  float *const scores = across + room * t.dims;    // (kMostQueries, room)
  float *const sums = scores + kMostQueries * room;    // (kMostQueries, dims)
  float *const values = sums + kMostQueries * dims;    // the values in whole vectors, one behind the other: (keys, dims)
  for (int64_t first = 0; first < room; first += kPanelKeys) {
    const int64_t width = lesser(kPanelKeys, room - first), here = lesser(width, keys - first);
    float *const panel = across + first * t.dims;
    transpose(k + first * t.k_at[2], t.k_at[2], here, t.dims, panel, width);
    for (int64_t key = here; key < width; ++key)
      for (int64_t d = 0; d < t.dims; ++d) panel[d * width + key] = 0;
  }
  int64_t ldv = t.v_at[2];
  if (t.dims % kWidth || (t.queries > kMostQueries && ldv != t.dims)) {
    for (int64_t key = 0; key < keys; ++key) {
      std::memcpy(values + key * dims, v + key * t.v_at[2], static_cast<size_t>(t.dims) * 4);
      for (int64_t d = t.dims; d < dims; ++d) values[key * dims + d] = 0;
    }
    v = values, ldv = dims;
  }
  const bool each_its_own = t.causal || (t.mask && t.mask_at[2]);
  if (!each_its_own) write_bias(t, batch, head, 0, keys, room, bias);
  const int64_t columns = round_up(t.dims, kWidth), depth = 4096 / columns < 16 ? 16 : 4096 / columns;
  const int64_t blocks = div_up(t.queries, 4 * kQueries);   // dealt out evenly
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = t.queries * block / blocks, rows = t.queries * (block + 1) / blocks - begin;
    for (int64_t first = 0; first < room; first += kPanelKeys) {
      const int64_t width = lesser(kPanelKeys, room - first);
      multiply_all(rows, q + begin * t.q_at[2], t.q_at[2], across + first * t.dims, width, t.dims, scores + first, room,
                   width, false);
    }
    float divisor[kMostQueries];
    for (int64_t r = 0; r < rows; ++r) {
      if (each_its_own) write_bias(t, batch, head, begin + r, keys, room, bias);
      divisor[r] = weigh(scores + r * room, bias, room, t.scale);
    }
    for (int64_t first = 0; first < keys; first += depth)
      multiply_all(rows, scores + first, room, v + first * ldv, ldv, lesser(depth, keys - first), sums, dims, columns,
                   first > 0);
    for (int64_t r = 0; r < rows; ++r) {
      float *to = t.out + batch * t.out_at[0] + head * t.out_at[1] + (begin + r) * t.out_at[2];
      const float by = divisor[r];
      each(t.dims, [&](int64_t i, int c) {
        const Floats_ o = load(sums + r * dims + i);
        store_some(to + i, by == 0.0f ? Floats_{} : o / by, c);
      });
    }
  }
}
