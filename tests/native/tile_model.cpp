// The tile instructions in plain C++, so that the product on tiles (tiles.h) is tested where no CPU has them.
//
// What the instructions refuse is an abort here: an operand beyond what is configured, shapes that do not fit each other,
// anything before the configuration.  What they leave undefined in practice is made visible: the configuration fills the
// tiles with garbage, though the hardware clears them.
#include <cstdio>
#include <cstdlib>

#include "tiles.h"

#if defined(W8A8_TILE_MODEL) && defined(W8A8_X86)   // elsewhere panels lie otherwise
namespace w8a8 {
namespace {

struct Registers {
  bool configured = false;
  TileConfig config;
  uint8_t tile[8][kTileRows][64];
};
thread_local Registers now;

void require(bool holds, const char *what) {
  if (holds) return;
  std::printf("FAILED tile model: %s\n", what);
  std::abort();
}

struct Model {
  static void configure(const TileConfig &c) {
    require(c.palette == 1 && c.start_row == 0, "palette 1 from row 0");
    for (int t = 0; t < 16; ++t) {
      require(c.row_bytes[t] <= 64 && c.rows[t] <= kTileRows, "a tile of at most 16 rows of 64 bytes");
      require((c.row_bytes[t] == 0) == (c.rows[t] == 0) && (t < 8 || c.rows[t] == 0), "eight tiles, whole or absent");
    }
    for (uint8_t byte : c.reserved) require(byte == 0, "reserved bytes are zero");
    now.config = c, now.configured = true;
    std::memset(now.tile, 0xa5, sizeof now.tile);
  }
  static void release() { now.configured = false; }
  template <int R>
  static void check() {
    static_assert(R >= 0 && R < 8, "eight registers");
    require(now.configured && now.config.rows[R] > 0, "a tile that is configured");
  }
  template <int R>
  static void zero() {
    check<R>();
    std::memset(now.tile[R], 0, sizeof now.tile[R]);
  }
  template <int R>
  static void load(const void *from, int64_t stride) {
    check<R>();
    std::memset(now.tile[R], 0, sizeof now.tile[R]);
    for (int r = 0; r < now.config.rows[R]; ++r)
      std::memcpy(now.tile[R][r], static_cast<const char *>(from) + r * stride, now.config.row_bytes[R]);
  }
  template <int R>
  static void load_far(const void *from, int64_t stride) {
    load<R>(from, stride);
  }
  template <int R>
  static void store(void *to, int64_t stride) {
    check<R>();
    for (int r = 0; r < now.config.rows[R]; ++r)
      std::memcpy(static_cast<char *>(to) + r * stride, now.tile[R][r], now.config.row_bytes[R]);
  }
  // Sums (m, n) += unsigned codes (m, 4 k) . signed weights (k, 4 n)
  template <int Sums, int Codes, int Weights>
  static void multiply() {
    check<Sums>(), check<Codes>(), check<Weights>();
    static_assert(Sums != Codes && Sums != Weights && Codes != Weights, "three different registers");
    const TileConfig &c = now.config;
    require(c.rows[Sums] == c.rows[Codes] && c.row_bytes[Sums] == c.row_bytes[Weights] &&
                c.row_bytes[Codes] == 4 * c.rows[Weights],
            "shapes that fit each other");
    for (int m = 0; m < c.rows[Sums]; ++m)
      for (int n = 0; n < c.row_bytes[Sums] / 4; ++n) {
        uint32_t sum;   // wraps around, as the instruction does
        std::memcpy(&sum, &now.tile[Sums][m][4 * n], 4);
        for (int k = 0; k < c.rows[Weights]; ++k)
          for (int i = 0; i < 4; ++i)
            sum += static_cast<uint32_t>(now.tile[Codes][m][4 * k + i] *
                                         static_cast<int8_t>(now.tile[Weights][k][4 * n + i]));
        std::memcpy(&now.tile[Sums][m][4 * n], &sum, 4);
      }
  }
};

void configure(int tile_rows, bool one_tile) { Model::configure(TileConfig::of(tile_rows, one_tile)); }

const Tiles kTiles = {configure, Model::release, TileProduct<Model>::run};

}  // namespace

const Isa kAmxModel = {"amx_model", [] { return true; }, Left::kU8, 0, 0, {}, &kPortableSteps,
                       [](int64_t) { return 0.0; }, &kPortableFloats, nullptr, &kTiles};

}  // namespace w8a8
#endif
