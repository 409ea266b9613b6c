// Keys and values of the past in int8: written, read, and looked at by few queries, as are those that lie there as they
// came (w8a8/kernels/cached.py).
#include <limits>
#include <utility>

#include "internal.h"
#include "parallel.h"
#include "quantize.h"

namespace w8a8 {
namespace {

constexpr int64_t kSerial = 32 << 10;   // elements, or multiplications: below, waking other threads takes longer than the work
constexpr float kHidden = -std::numeric_limits<float>::infinity();

// The layout, by head: batch and head are one axis.
struct Cached {
  const w8a8_cached &c;
  int64_t pairs, value_room;
  int64_t key_room, block;   // a key as floats; the largest power of two that divides it

  explicit Cached(const w8a8_cached &cached)
      : c(cached), pairs(div_up(cached.key_dims, 2)), value_room(round_up(cached.value_dims, kCachedTile)),
        key_room(round_up(cached.key_dims, 16)), block(cached.key_dims & -cached.key_dims) {}
  bool valid() const {
    return c.batch >= 0 && c.heads >= 0 && c.room >= 0 && c.room % kCachedTile == 0 && c.key_dims > 0 && c.value_dims > 0;
  }
  bool codes() const { return c.keys != nullptr; }
  int8_t *keys(int64_t head, int64_t tile) const { return c.keys + (head * c.room + tile * kCachedTile) * 2 * pairs; }
  int8_t *values(int64_t head, int64_t place) const { return c.values + (head * c.room + place) * value_room; }
  float *key_scale(int64_t head) const { return c.key_scale + head * c.room; }
  float *value_scale(int64_t head) const { return c.value_scale + head * c.room; }
};

struct Strided {
  const void *data;
  int dtype;
  const int64_t *at;   // by batch, head, token
  const void *row(int64_t b, int64_t h, int64_t t) const { return row_of(data, dtype, 1, b * at[0] + h * at[1] + t * at[2]); }
};

// A key, or a query, as floats, rotated: `to` has room for `key_room`.
void rotated(const Cached &cached, const void *row, int dtype, float *to) {
  const int64_t dims = cached.c.key_dims;
  for (int64_t i = 0; i < dims; ++i) to[i] = load_one(row, dtype, i);
  std::fill(to + dims, to + cached.key_room, 0.0f);
  isa().floats->rotate(to, cached.key_room, cached.block);
}

// The codes of one row, of which `round_up(k, 64)` are written to; its scale, which is its own unless one is given.
float quantized(const void *row, int dtype, int64_t k, char *codes, float given = 0.0f) {
  Quantize q = {};
  float scale;
  int32_t zero;
  q.isa = &isa(), q.x = row, q.dtype = dtype, q.mode = W8A8_TOKEN_SYM, q.bits = 8, q.m = 1, q.k = k, q.ldx = k;
  q.left = Left::kS8, q.codes = codes, q.ld_bytes = round_up(k, 64), q.sx = &scale, q.zx = &zero;
  if (given != 0.0f) q.mode = W8A8_STATIC_SYM;
  quantize_row(q, 0, {given, 0, -127, 127});
  return scale;
}

// The same of a key that is rotated, with the scale that suits it best.
float quantized_key(const float *key, int64_t k, char *codes) {
  const RowRange range = isa().steps->range[W8A8_F32](key, k, false);
  float top;
  std::memcpy(&top, &range.absbits, sizeof top);
  if (!range.finite() || top == 0.0f) return quantized(key, W8A8_F32, k, codes);
  return quantized(key, W8A8_F32, k, codes, std::max(top / isa().floats->best_steps(key, k, top), std::numeric_limits<float>::min()));
}

// floats: room for a key; codes: for those of the longer of a key and a value.
void append_token(const Cached &to, int64_t head, int64_t place, const void *key, const void *value, int dtype, float *floats, char *codes) {
  const int64_t dims = to.c.key_dims, tile = place / kCachedTile, lane = place % kCachedTile;
  rotated(to, key, dtype, floats);
  to.key_scale(head)[place] = quantized_key(floats, dims, codes);
  if (dims % 2) codes[dims] = 0;
  int8_t *at = to.keys(head, tile) + lane * 2;
  for (int64_t pair = 0; pair < to.pairs; ++pair) std::memcpy(at + pair * 2 * kCachedTile, codes + 2 * pair, 2);
  to.value_scale(head)[place] = quantized(value, dtype, to.c.value_dims, codes);
  std::memset(codes + to.c.value_dims, 0, static_cast<size_t>(to.value_room - to.c.value_dims));
  std::memcpy(to.values(head, place), codes, static_cast<size_t>(to.value_room));
}

template <class Code>
void write_row(const Code *codes, float scale, int64_t k, int dtype, void *out) {
  if (dtype == W8A8_F32) {
    float *to = static_cast<float *>(out);
    for (int64_t i = 0; i < k; ++i) to[i] = static_cast<float>(codes[i]) * scale;
  } else if (dtype == W8A8_BF16) {
    uint16_t *to = static_cast<uint16_t *>(out);
    for (int64_t i = 0; i < k; ++i) to[i] = to_bf16(static_cast<float>(codes[i]) * scale);
  } else {
    for (int64_t i = 0; i < k; ++i) store_one(out, dtype, i, static_cast<float>(codes[i]) * scale);
  }
}

// A tile of keys as rows: to[lane][pair] = from[pair][lane], pairs being two bytes; `to` has rows of `pairs`.
void rows_of_tile(const int8_t *from, int64_t pairs, int16_t *to) {
  typedef int16_t Eight __attribute__((vector_size(16)));
#if defined(__clang__)
#define W8A8_ZIP(a, b, half) \
  (half ? __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15) : __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11))
#else
#define W8A8_ZIP(a, b, half) \
  (half ? __builtin_shuffle(a, b, Eight{4, 12, 5, 13, 6, 14, 7, 15}) : __builtin_shuffle(a, b, Eight{0, 8, 1, 9, 2, 10, 3, 11}))
#endif
  int64_t pair = 0;
  for (; pair + 8 <= pairs; pair += 8)
    for (int lane = 0; lane < kCachedTile; lane += 8) {
      Eight x[8], y[8];
      for (int i = 0; i < 8; ++i) std::memcpy(&x[i], from + (pair + i) * 2 * kCachedTile + lane * 2, 16);
      // three times the first half of the rows between the second: what was row 4i + 2j + k and column l is the reverse
      for (int round = 0; round < 3; ++round) {
        for (int i = 0; i < 4; ++i) y[2 * i] = W8A8_ZIP(x[i], x[i + 4], 0), y[2 * i + 1] = W8A8_ZIP(x[i], x[i + 4], 1);
        std::memcpy(x, y, sizeof x);
      }
      for (int i = 0; i < 8; ++i) std::memcpy(to + (lane + i) * pairs + pair, &x[i], 16);
    }
#undef W8A8_ZIP
  for (; pair < pairs; ++pair)
    for (int lane = 0; lane < kCachedTile; ++lane)
      std::memcpy(to + lane * pairs + pair, from + (pair * kCachedTile + lane) * 2, 2);
}

// Which places a sequence looks at, and of which sequence of the cache.
struct Range {
  int64_t of, start, end;
  int64_t first() const { return start / kCachedTile * kCachedTile; }   // where its first piece begins
};

Range range_of(const w8a8_cached_attention &a, int64_t batch) {
  if (!a.ranges) return {batch, a.start, a.end};
  return {a.ranges[3 * batch], a.ranges[3 * batch + 1], a.ranges[3 * batch + 2]};
}

// What is added to the scores of a query over the places [first, first + places).
void write_seen(const w8a8_cached_attention &a, const Range &range, int64_t batch, int64_t head, int64_t query, int64_t first, int64_t places,
                float *bias) {
  const int64_t last = a.causal ? range.end - a.queries + query + 1 : range.end;
  const int64_t from = std::min(std::max(range.start, first), first + places), to = std::max(std::min(last, first + places), from);
  std::fill(bias, bias + (from - first), kHidden);
  std::fill(bias + (to - first), bias + places, kHidden);
  float *const seen = bias + (from - first);
  if (!a.mask) return std::fill(seen, seen + (to - from), 0.0f);
  const int64_t at = batch * a.mask_at[0] + head * a.mask_at[1] + query * a.mask_at[2] + (from - a.start) * a.mask_at[3];
  for (int64_t i = 0; i < to - from; ++i)
    if (a.mask_is_float) seen[i] = static_cast<const float *>(a.mask)[at + i * a.mask_at[3]];
    else seen[i] = static_cast<const uint8_t *>(a.mask)[at + i * a.mask_at[3]] ? 0.0f : kHidden;
}

// One head of keys and values, with all queries that look at it: rows are its heads of q, and in each the queries.
struct Attended {
  const w8a8_cached_attention &a;
  const Cached cached;
  int64_t batch, rows, pieces = 0, places = 0;   // pieces: of the sequence that has most; places: that are looked at by all
  Part *part = nullptr;                 // (heads, pieces, rows)
  float *sums = nullptr;         // (heads, pieces, rows, value_room)

  explicit Attended(const w8a8_cached_attention &asked)
      : a(asked), cached(asked.cached), batch(asked.ranges ? asked.batch : asked.cached.batch), rows(asked.shared * asked.queries) {
    for (int64_t b = 0; b < batch; ++b) {
      const Range r = range_of(a, b);
      pieces = std::max(pieces, div_up(r.end - r.first(), kPiece)), places += r.end - r.start;
    }
  }
  bool valid() const {
    const w8a8_cached &c = a.cached;
    if (a.dtype < W8A8_F32 || a.dtype > W8A8_F16 || a.shared < 1 || a.queries < 1 || a.softcap < 0 || batch < 0) return false;
    if (cached.codes() ? !cached.valid() || c.key_dims > 512 : c.key_dims < 1 || c.value_dims < 1 || c.heads < 0) return false;
    if (a.ranges && (a.queries != 1 || a.mask || a.causal)) return false;
    for (int64_t b = 0; b < batch; ++b) {
      const Range r = range_of(a, b);
      if (r.of < 0 || r.of >= c.batch || r.start < 0 || r.start >= r.end || r.end > c.room) return false;
    }
    return true;
  }
  int64_t heads() const { return batch * a.cached.heads; }
  int64_t biases() const { return a.mask && a.mask_at[1] ? rows : a.queries; }
  int64_t partial_bytes() const {
    return round_up(heads() * pieces * rows * static_cast<int64_t>(sizeof(Part)), 64) + heads() * pieces * rows * cached.value_room * 4;
  }
  void take(char *memory) {
    part = reinterpret_cast<Part *>(memory);
    sums = reinterpret_cast<float *>(memory + round_up(heads() * pieces * rows * static_cast<int64_t>(sizeof(Part)), 64));
  }
  // scores, biases, a query as floats, factors, pointers to biases, then codes, or queries as floats and a tile of them:
  // each a multiple of 64 bytes
  int64_t scratch_bytes() const {
    const int64_t own = cached.codes() ? 4 * rows * cached.pairs : 4 * (rows * cached.key_room + kCachedTile * std::max(cached.key_room, cached.value_room));
    return 4 * kPiece * (kMostQueries + biases()) + 4 * cached.key_room + round_up(4 * rows, 64) + round_up(8 * rows, 64) + own;
  }

  void run(int64_t task, char *memory) const {
    const int64_t head = task / pieces, piece = task % pieces, of_batch = head / a.cached.heads, of_cache = head % a.cached.heads;
    const Range range = range_of(a, of_batch);
    const int64_t dims = a.cached.key_dims, begin = range.first() + piece * kPiece, kept = range.of * a.cached.heads + of_cache;
    if (begin >= range.end) {   // another sequence has more
      std::fill(part + task * rows, part + (task + 1) * rows, Part{kHidden, 0.0f});
      std::fill(sums + task * rows * cached.value_room, sums + (task + 1) * rows * cached.value_room, 0.0f);
      return;
    }
    float *const scores = reinterpret_cast<float *>(memory), *const bias = scores + kPiece * kMostQueries;
    float *const spare = bias + kPiece * biases(), *const factor = spare + round_up(dims, 16);
    const float **const biases_of = reinterpret_cast<const float **>(reinterpret_cast<char *>(factor) + round_up(4 * rows, 64));
    int16_t *const codes = reinterpret_cast<int16_t *>(reinterpret_cast<char *>(biases_of) + round_up(8 * rows, 64));
    Piece t = {};
    t.places = round_up(std::min<int64_t>(kPiece, range.end - begin), kCachedTile);
    if (cached.codes()) {
      t.keys = cached.keys(kept, begin / kCachedTile), t.values = cached.values(kept, begin);
      t.key_scale = cached.key_scale(kept) + begin, t.value_scale = cached.value_scale(kept) + begin;
    }
    t.pairs = cached.pairs, t.value_room = cached.value_room, t.rows = static_cast<int>(rows);
    t.q = codes, t.factor = factor, t.bias = biases_of, t.softcap = a.softcap;
    const Floats &floats = *isa().floats;
    float *const queries = reinterpret_cast<float *>(codes);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t of_head = row / a.queries, query = row % a.queries, q_head = of_cache * a.shared + of_head;
      const Strided q{a.q, a.dtype, a.q_at};
      const void *x = q.row(of_batch, q_head, query);
      if (cached.codes()) {
        rotated(cached, x, a.dtype, spare);
        factor[row] = floats.query(spare, dims, t.pairs, codes + row * 2 * t.pairs) * (a.scale / static_cast<float>(cached.block));
      } else {
        float *const to = queries + row * cached.key_room;
        for (int64_t i = 0; i < cached.key_room; ++i) to[i] = i < dims ? load_one(x, a.dtype, i) : 0.0f;
        factor[row] = a.scale;
      }
      float *const own = bias + kPiece * (biases() == rows ? row : query);
      if (biases() == rows || row < a.queries) write_seen(a, range, of_batch, q_head, query, begin, t.places, own);
      biases_of[row] = own;
    }
    if (cached.codes()) return floats.piece(t, scores, part + task * rows, sums + task * rows * t.value_room);
    const Strided k{a.keys, a.dtype, a.keys_at}, v{a.values, a.dtype, a.values_at};
    const Rows r = {k.row(range.of, of_cache, begin), v.row(range.of, of_cache, begin), a.keys_at[2], a.values_at[2], dims,
                    a.cached.value_dims, std::max<int64_t>(range.start - begin, 0), std::min(range.end - begin, t.places), a.dtype, queries};
    floats.rows(t, r, queries + rows * cached.key_room, scores, part + task * rows, sums + task * rows * t.value_room);
  }

  void finish(int64_t index, float *out) const {   // of a head's row
    const int64_t head = index / rows, row = index % rows, of_batch = head / a.cached.heads;
    const int64_t q_head = head % a.cached.heads * a.shared + row / a.queries, heads = a.cached.heads * a.shared;
    const int64_t at = head * pieces * rows + row;
    isa().floats->merge(part + at, sums + at * cached.value_room, pieces, rows, cached.value_room,
                        a.sinks ? a.sinks[q_head] : kHidden, out);
    const int64_t to = ((of_batch * a.queries + row % a.queries) * heads + q_head) * a.cached.value_dims;
    for (int64_t i = 0; i < a.cached.value_dims; ++i) store_one(a.out, a.dtype, to + i, out[i]);
  }
};

}  // namespace
}  // namespace w8a8

using namespace w8a8;

namespace {

// batch: sequences of keys and values; place_of(b, h, t): which head of the cache, counted through, and which place there.
template <class PlaceOf>
int append(const Cached &cached, int64_t batch, const Strided &k, const Strided &v, int dtype, int64_t tokens, int threads,
           const PlaceOf &place_of) {
  const w8a8_cached *const to = &cached.c;
  const int64_t dims = to->key_dims + to->value_dims, heads = batch * to->heads, codes_room = round_up(std::max(to->key_dims + 1, cached.value_room), 64);
  const int64_t step = std::max<int64_t>(1, 8192 / dims), steps = div_up(tokens, step);
  if (heads * tokens * dims <= kSerial) threads = 1;
  return for_each_with(codes_room + 4 * cached.key_room, heads * steps, threads, [&](int64_t task, char *codes) {
    const int64_t head = task / steps, b = head / to->heads, h = head % to->heads;
    for (int64_t t = task % steps * step; t < std::min(tokens, (task % steps + 1) * step); ++t) {
      const std::pair<int64_t, int64_t> place = place_of(b, h, t);
      append_token(cached, place.first, place.second, k.row(b, h, t), v.row(b, h, t), dtype, reinterpret_cast<float *>(codes + codes_room),
                   codes);
    }
  });
}

}  // namespace

extern "C" int w8a8_cached_append(const w8a8_cached *to, const void *keys, const int64_t *keys_at, const void *values,
                                  const int64_t *values_at, int32_t dtype, int64_t at, int64_t tokens, int32_t threads) {
  const Cached cached(*to);
  if (!cached.valid() || dtype < W8A8_F32 || dtype > W8A8_F16 || at < 0 || tokens < 0 || at + tokens > to->room)
    return W8A8_BAD_ARGUMENT;
  return append(cached, to->batch, {keys, dtype, keys_at}, {values, dtype, values_at}, dtype, tokens, threads,
                [&](int64_t b, int64_t h, int64_t t) { return std::make_pair(b * to->heads + h, at + t); });
}

extern "C" int w8a8_cached_deal(const w8a8_cached *to, const void *keys, const int64_t *keys_at, const void *values,
                                const int64_t *values_at, int32_t dtype, const int32_t *where, int64_t tokens, int32_t threads) {
  const Cached cached(*to);
  if (!cached.valid() || dtype < W8A8_F32 || dtype > W8A8_F16 || tokens < 0) return W8A8_BAD_ARGUMENT;
  for (int64_t t = 0; t < tokens; ++t)
    if (where[2 * t] < 0 || where[2 * t] >= to->batch || where[2 * t + 1] < 0 || where[2 * t + 1] >= to->room) return W8A8_BAD_ARGUMENT;
  return append(cached, 1, {keys, dtype, keys_at}, {values, dtype, values_at}, dtype, tokens, threads,
                [&](int64_t, int64_t h, int64_t t) { return std::make_pair(where[2 * t] * to->heads + h, int64_t{where[2 * t + 1]}); });
}

extern "C" int w8a8_cached_read(const w8a8_cached *from, int32_t keys, int64_t start, int64_t tokens, int32_t dtype, void *out,
                                int32_t threads) {
  const Cached cached(*from);
  if (!cached.valid() || dtype < W8A8_F32 || dtype > W8A8_F16 || start < 0 || tokens < 0 || start + tokens > from->room)
    return W8A8_BAD_ARGUMENT;
  const int64_t dims = keys ? from->key_dims : from->value_dims, heads = from->batch * from->heads;
  const int64_t first = start / kCachedTile, tiles = tokens ? div_up(start + tokens, kCachedTile) - first : 0;
  const int64_t step = std::max<int64_t>(1, 8192 / (kCachedTile * dims)), steps = div_up(tiles, step);
  if (heads * tokens * dims <= kSerial) threads = 1;
  const int64_t tile_bytes = 4 * kCachedTile * cached.pairs;
  return for_each_with(tile_bytes + 4 * cached.key_room, heads * steps, threads, [&](int64_t task, char *rows) {
    float *const spare = reinterpret_cast<float *>(rows + tile_bytes);
    const int64_t head = task / steps;
    for (int64_t tile = first + task % steps * step; tile < first + std::min(tiles, (task % steps + 1) * step); ++tile) {
      if (keys) rows_of_tile(cached.keys(head, tile), cached.pairs, reinterpret_cast<int16_t *>(rows));
      for (int64_t lane = 0; lane < kCachedTile; ++lane) {
        const int64_t place = tile * kCachedTile + lane, t = place - start;
        if (t < 0 || t >= tokens) continue;
        void *const to = const_cast<char *>(row_of(out, dtype, dims, head * tokens + t));
        if (!keys) {
          write_row(cached.values(head, place), cached.value_scale(head)[place], dims, dtype, to);
          continue;
        }
        const int8_t *codes = reinterpret_cast<int8_t *>(rows) + lane * 2 * cached.pairs;
        for (int64_t i = 0; i < cached.key_room; ++i) spare[i] = i < dims ? codes[i] : 0.0f;
        isa().floats->rotate(spare, cached.key_room, cached.block);   // exact: sums of codes
        write_row(spare, cached.key_scale(head)[place] / static_cast<float>(cached.block), dims, dtype, to);
      }
    }
  });
}

extern "C" int w8a8_cached_attend(const w8a8_cached_attention *a, int32_t threads) {
  Attended t(*a);
  if (!t.valid()) return W8A8_BAD_ARGUMENT;
  if (a->cached.heads * t.rows * t.places * (a->cached.key_dims + a->cached.value_dims) <= kSerial) threads = 1;
  static thread_local Scratch partial;
  char *memory = partial.get(t.partial_bytes());
  if (!memory) return W8A8_NO_MEMORY;
  t.take(memory);
  int status = for_each_with(t.scratch_bytes(), t.heads() * t.pieces, threads,
                             [&](int64_t task, char *own) { t.run(task, own); });
  if (status != W8A8_OK) return status;
  if (t.heads() * t.rows * t.pieces * t.cached.value_room <= kSerial) threads = 1;
  status = for_each_with(4 * t.cached.value_room, t.heads() * t.rows, threads,
                         [&](int64_t index, char *own) { t.finish(index, reinterpret_cast<float *>(own)); });
  partial.shrink();
  return status;
}
