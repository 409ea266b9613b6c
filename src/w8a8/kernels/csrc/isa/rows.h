// Attention of a few queries over keys and values as they came, row by row, written once for every width of vector.
//
// A file that includes this has cached.h before it, and says how sixteen-bit floats become floats (`widened`) and how the
// lanes of kWidth sums are added up (`totals`): lane i and i + 8, then 4, 2 and 1 apart, whatever the width.  A product of a
// query and a key is summed in sixteen lanes, the values token by token; all by fused multiply-adds.  So what is computed
// does not depend on the width.

// The rows first .. last of a tile as floats: where they are, or in `to`, in rows of `room`.  Zeros stand for the others and
// behind the last element: what is not seen may be anything, and nothing times a NaN is one.
static const float *floats_of_rows(const void *from, int dtype, int64_t ld, int64_t k, int64_t room, int64_t first, int64_t last, float *to,
                                   int64_t *ld_to) {
  if (dtype == W8A8_F32 && k == room && first == 0 && last == kCachedTile) {
    *ld_to = ld;
    return static_cast<const float *>(from);
  }
  *ld_to = room;
  for (int64_t r = 0; r < kCachedTile; ++r) {
    float *const row = to + r * room;
    int64_t i = 0;
    if (r < first || r >= last) {
      std::memset(row, 0, static_cast<size_t>(room) * 4);
      continue;
    }
    if (dtype == W8A8_F32) {
      std::memcpy(row, static_cast<const float *>(from) + r * ld, static_cast<size_t>(k) * 4);
      i = k;
    } else {
      const uint16_t *const halves = static_cast<const uint16_t *>(from) + r * ld;
      for (; i + kWidth <= k; i += kWidth) store(row + i, widened(halves + i, dtype == W8A8_BF16));
      for (; i < k; ++i) row[i] = dtype == W8A8_BF16 ? from_bf16(halves[i]) : from_f16(halves[i]);
    }
    for (; i < room; ++i) row[i] = 0;
  }
  return to;
}

// Scores of one query and a tile of keys.
static void score_tile(const float *q, const float *keys, int64_t ld, int64_t room, float factor, float *scores) {
  for (int first = 0; first < kCachedTile; first += kWidth) {
    Lanes sum[kWidth] = {};
    for (int64_t d = 0; d < room; d += 16)
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) {
        const Floats_ left = load(q + d + p * kWidth);
#pragma GCC unroll 16
        for (int key = 0; key < kWidth; ++key)
          sum[key].part[p] = fma(left, load(keys + (first + key) * ld + d + p * kWidth), sum[key].part[p]);
      }
    store(scores + first, totals(sum) * factor);
  }
}

// `tile`: floats of scratch, sixteen rows of the longer of a key and a value.
static void rows(const Piece &t, const Rows &r, float *tile, float *scores, Part *part, float *sums) {
  const int64_t room = round_up(r.key_dims, 16);
  const auto tile_of = [&](const void *from, int64_t at, int64_t k, int64_t to, int64_t place, int64_t *ld) {
    const int64_t first = r.first > place ? r.first - place : 0, last = r.last - place < kCachedTile ? r.last - place : kCachedTile;
    return floats_of_rows(row_of(from, r.dtype, at, place), r.dtype, at, k, to, first, last, tile, ld);
  };
  std::memset(sums, 0, static_cast<size_t>(t.rows * t.value_room) * 4);
  for (int first = 0; first < t.rows; first += kQueries) {
    const int count = t.rows - first < kQueries ? t.rows - first : kQueries;
    int64_t ld;
    for (int64_t place = 0; place < t.places; place += kCachedTile) {
      const float *keys = tile_of(r.keys, r.keys_at, r.key_dims, room, place, &ld);
      for (int row = 0; row < count; ++row)
        score_tile(r.q + (first + row) * room, keys, ld, room, t.factor[first + row], scores + row * kPiece + place);
    }
    for (int row = 0; row < count; ++row) part[first + row] = weigh_piece(t, t.bias[first + row], scores + row * kPiece);
    for (int64_t place = 0; place < t.places; place += kCachedTile) {
      const float *values = tile_of(r.values, r.values_at, r.value_dims, t.value_room, place, &ld);
      multiply_any<kQueries>(count, scores + place, kPiece, values, ld, kCachedTile, sums + first * t.value_room,
                             t.value_room, t.value_room, true);
    }
  }
}
