// The product on matrix tiles, written once for whatever executes them: the CPU (isa/amx.cpp), or a software model of the
// instructions (tests/native/tile_model.h), so that it is tested where there are none.
//
// A tile holds 16 rows of 64 bytes.  One instruction multiplies a tile of codes (rows x 64 k) by a tile of weights
// (16 x 4 k, 16 columns) into a tile of 16 x 16 sums, and a panel is two such tiles wide as it lies: 16 of its steps
// (64 k), at a stride of 128 bytes.  Of the eight registers four hold sums.
//
// What is measured of the blocking, on a CPU that has tiles, is in docs/log.md.
#pragma once

#include "internal.h"

namespace w8a8 {

constexpr int kTileRows = 16;
constexpr int64_t kTileBytes = 64;                                  // of k, one row of a tile
constexpr int64_t kTilePanel = kTileBytes / kGroup * kPanelStep;         // bytes of a panel for one step of 64 k
constexpr int64_t kChunkSteps = 11;   // 64 k each: so much of a panel stays in L1 (22 KiB) while the row tiles take turns

// LDTILECFG's operand.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  // Sums 0..3 and codes 4..5 have `rows` rows.  With one row tile, 5 is a third tile of weights: it is wanted whole then.
  static TileConfig of(int tile_rows, bool one_tile) {
    TileConfig c;
    for (int t = 0; t < 8; ++t) {
      c.row_bytes[t] = 64;
      const bool weights = t >= 6 || (t == 5 && one_tile);
      c.rows[t] = static_cast<uint8_t>(weights ? kTileRows : tile_rows);
    }
    return c;
  }
};
static_assert(sizeof(TileConfig) == 64, "as the instruction reads it");

// What one call multiplies: row tiles of codes by one panel, or by two where there is one row tile.
struct TileBlock {
  const uint8_t *left;      // tiles * tile_rows rows, each of steps * 64 codes + 128
  int64_t ld;
  int tiles, tile_rows;
  const int8_t *panel;
  int64_t panel_bytes;      // to the second panel
  int panels;               // 1, or 2 if tiles == 1
  int64_t steps;            // of 64 k
  bool add;                 // to what `sums` holds
  int32_t *sums;            // of each panel (tiles * tile_rows, 32)
  const int8_t *ahead;      // what is wanted next, as many bytes as this call multiplies
};

template <class T>
class TileProduct {
 public:
  static void run(const TileBlock &b) {
    if (b.tiles == 1) return one_tile(b);
    const int pairs = (b.tiles + 1) / 2;
    const int lines = static_cast<int>(div_up(kTilePanel / 128, pairs));   // every second line: its neighbour comes along
    const bool cached = b.tiles * b.tile_rows * b.ld <= (32 << 10);
    const int8_t *ahead = b.ahead;
    const int64_t chunk = b.tiles > 2 ? div_up(b.steps, div_up(b.steps, kChunkSteps)) : b.steps;
    for (int64_t s0 = 0; s0 < b.steps; s0 += chunk) {
      const int64_t steps = s0 + chunk < b.steps ? chunk : b.steps - s0;
      const uint8_t *left = b.left + s0 * kTileBytes;
      const int8_t *panel = b.panel + s0 * kTilePanel;
      const bool add = b.add || s0 > 0;
      for (int t = 0; t < b.tiles; t += 2) {
        const uint8_t *rows = left + t * b.tile_rows * b.ld;
        int32_t *sums = b.sums + t * b.tile_rows * kPanel;
        if (t + 1 == b.tiles) last(rows, b.ld, panel, steps, add, sums, ahead, lines);
        else if (cached) pair<false>(rows, b.ld, b.tile_rows, panel, steps, add, sums, ahead, lines);
        else pair<true>(rows, b.ld, b.tile_rows, panel, steps, add, sums, ahead, lines);
      }
    }
  }

 private:
  static inline void fetch(const int8_t *&ahead, int lines) {
    for (int i = 0; i < lines; ++i, ahead += 128) __builtin_prefetch(ahead, 0, 2);
  }

  template <int R>
  static inline void begin(bool add, const int32_t *sums) {
    if (add) T::template load<R>(sums, kPanel * 4);
    else T::template zero<R>();
  }

  // Two row tiles by a panel.  Codes from the second-level cache are not worth a place in the first.
  template <bool Far>
  static void pair(const uint8_t *left, int64_t ld, int tile_rows, const int8_t *panel, int64_t steps, bool add,
                   int32_t *sums, const int8_t *&ahead, int lines) {
    const uint8_t *below = left + tile_rows * ld;
    int32_t *sums_below = sums + tile_rows * kPanel;
    begin<0>(add, sums), begin<1>(add, sums + 16), begin<2>(add, sums_below), begin<3>(add, sums_below + 16);
    for (int64_t s = 0; s < steps; ++s) {
      fetch(ahead, lines);
      T::template load<6>(panel, kPanelStep);
      codes<4, Far>(left, ld);
      T::template multiply<0, 4, 6>();
      T::template load<7>(panel + 64, kPanelStep);
      T::template multiply<1, 4, 7>();
      codes<5, Far>(below, ld);
      T::template multiply<2, 5, 6>();
      T::template multiply<3, 5, 7>();
      left += kTileBytes, below += kTileBytes, panel += kTilePanel;
    }
    T::template store<0>(sums, kPanel * 4), T::template store<1>(sums + 16, kPanel * 4);
    T::template store<2>(sums_below, kPanel * 4), T::template store<3>(sums_below + 16, kPanel * 4);
  }

  template <int R, bool Far>
  static inline void codes(const uint8_t *from, int64_t ld) {
    if (Far) T::template load_far<R>(from, ld);
    else T::template load<R>(from, ld);
  }

  // The last of an odd number of row tiles.
  static void last(const uint8_t *left, int64_t ld, const int8_t *panel, int64_t steps, bool add, int32_t *sums,
                   const int8_t *&ahead, int lines) {
    begin<0>(add, sums), begin<1>(add, sums + 16);
    for (int64_t s = 0; s < steps; ++s) {
      fetch(ahead, lines);
      T::template load<4>(left, ld);
      T::template load<6>(panel, kPanelStep);
      T::template multiply<0, 4, 6>();
      T::template load<7>(panel + 64, kPanelStep);
      T::template multiply<1, 4, 7>();
      left += kTileBytes, panel += kTilePanel;
    }
    T::template store<0>(sums, kPanel * 4), T::template store<1>(sums + 16, kPanel * 4);
  }

  // Up to 16 rows: the weights are a stream, and two panels at once hide the latency of a product.
  static void one_tile(const TileBlock &b) {
    const uint8_t *left = b.left;
    const int8_t *panel = b.panel, *second = b.panel + b.panel_bytes, *ahead = b.ahead;
    int32_t *sums = b.sums, *sums2 = b.sums + b.tile_rows * kPanel;
    const int lines = static_cast<int>(kTilePanel / 128);
    if (b.panels == 1) return last(left, b.ld, panel, b.steps, b.add, sums, ahead, lines);
    begin<0>(b.add, sums), begin<1>(b.add, sums + 16), begin<2>(b.add, sums2), begin<3>(b.add, sums2 + 16);
    for (int64_t s = 0; s < b.steps; ++s) {
      fetch(ahead, 2 * lines);
      T::template load<4>(left, b.ld);
      T::template load<6>(panel, kPanelStep);
      T::template multiply<0, 4, 6>();
      T::template load<7>(panel + 64, kPanelStep);
      T::template multiply<1, 4, 7>();
      T::template load<5>(second, kPanelStep);
      T::template multiply<2, 4, 5>();
      T::template load<6>(second + 64, kPanelStep);
      T::template multiply<3, 4, 6>();
      left += kTileBytes, panel += kTilePanel, second += kTilePanel;
    }
    T::template store<0>(sums, kPanel * 4), T::template store<1>(sums + 16, kPanel * 4);
    T::template store<2>(sums2, kPanel * 4), T::template store<3>(sums2 + 16, kPanel * 4);
  }
};

}  // namespace w8a8
