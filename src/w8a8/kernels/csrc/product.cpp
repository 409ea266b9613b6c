// The product on register tiles: up to isa().max_rows rows by one panel, the whole of K with its sums in registers.
//
// Tiles are visited so that what they share stays close:
//
//     group of panels (stays in L3) > block of rows (its codes stay in L2) > panel (stays in L2) > tile
//
// While a panel is used the next one is prefetched, a slice per tile: with few rows the product waits for memory, with
// many the prefetch is free.
#include "job.h"

namespace w8a8 {
namespace {

// Tuned on Zen 4 (1 MiB L2, 32 MiB L3); a quarter of L2 for codes leaves room for the panel and the next.  A few rows of a
// large K are one block as long as that can be: two blocks read each panel twice.
constexpr int64_t kBlockBytes = 288 << 10;
constexpr int64_t kGroupBytes = 2 << 20;
constexpr int64_t kOutputBytes = 512 << 10;
// A panel that only one tile reads is a stream, prefetched from the same panel ahead of its use.  How far is the
// processor's: measured (docs/log.md), and told by w8a8_stream_name.
struct Stream {
  const char *name;
  int near_rows;        // up to so many rows the near distance
  int64_t near, far;    // bytes
};
// Zen 4: up to five rows the core keeps up with memory and the hardware's prefetchers do best (30 GB/s on one core, 2 MiB
// pages); a far prefetch takes the miss buffers from them (20 GB/s), a near one hardly and helps a little where pages are
// small.  From six rows on the product slows the stream down so much that they lose track, and a far one wins (1.3-1.6x).
constexpr Stream kAmd = {"near up to 5 rows, far beyond", 5, 512, 12 << 10};
// Emerald Rapids: far wins from one row on, 1.1 to 1.5 times.
constexpr Stream kOthers = {"far", 0, 512, 12 << 10};

const Stream &stream() {
#ifdef W8A8_X86
  static const bool amd = [] {
    __builtin_cpu_init();
    return __builtin_cpu_is("amd") != 0;
  }();
  if (amd) return kAmd;
#endif
  return kOthers;
}

// Rows are dealt to tiles evenly: 16 rows are 8 + 8, not 14 + 2.
int64_t tile_row(const Job &job, int64_t t) { return job.q.m * t / job.tiles; }

}  // namespace

void plan_product(Job &job, int threads) {
  const int64_t m = job.q.m;
  job.tiles = div_up(m, job.isa->max_rows);
  job.blocks = std::min(job.tiles, div_up(m * job.q.ld_bytes, kBlockBytes));
  job.tiles_per_block = div_up(job.tiles, job.blocks);
  job.blocks = div_up(job.tiles, job.tiles_per_block);
  job.group = 1;
  if (job.blocks > 1) {
    // As wide as L3 likes, but several tasks for every thread.
    const int64_t enough = std::max<int64_t>(1, job.panels * job.blocks / (8 * threads));
    job.group = std::clamp<int64_t>(kGroupBytes / std::max<int64_t>(1, job.panel_bytes), 1, std::min<int64_t>(16, enough));
  }
  job.groups = div_up(job.panels, job.group);
  // Where the output is too large to wait in L2, its lines are asked for before the product of a tile, which takes longer
  // than they do: 5 % at K = 768.  Where it is there already, asking costs 2 %.
  job.fetch_output = m * job.panels * kPanel * static_cast<int64_t>(dtype_bytes(job.dtype)) > kOutputBytes;
}

void product_task(const Job &job, int64_t task) {
  const int64_t group = task / job.blocks, block = task % job.blocks;
  const int64_t p0 = group * job.group, p1 = std::min(job.panels, p0 + job.group);
  const int64_t t0 = block * job.tiles_per_block, t1 = std::min(job.tiles, t0 + job.tiles_per_block);
  const bool paired = job.paired();
  const TileFn *const tile = paired ? job.q.pairs->tile : job.isa->tile;
  const bool single = job.tiles == 1 && job.q.m <= (paired ? job.q.pairs->stream_rows : job.isa->stream_rows);
  const Stream &distance = stream();
  const int64_t stream_ahead = job.q.m <= distance.near_rows ? distance.near : distance.far;
  const int64_t ksteps = div_up(job.q.k, kGroup);   // groups that hold any of K: a panel may have more, all zeros
  const int lines = static_cast<int>(div_up(8, t1 - t0));   // per eight of the panel's own
  const int64_t slice = div_up(ksteps * kPanelStep, 4 * kAheadStep) * lines * 64;   // what one tile prefetches
  const int64_t item = static_cast<int64_t>(dtype_bytes(job.dtype));
  alignas(64) int32_t sums[kMaxRows * kPanel];
  for (int64_t p = p0; p < p1; ++p) {
    const Job::Panel panel = job.at(p);
    // The panel after this one; after the last of a group the next block of rows starts over with its first.
    const int64_t next = p + 1 < p1 || job.blocks == 1 ? p + 1 : p0;
    const int8_t *ahead = next < job.panels ? job.data_of(next) : panel.data;
    for (int64_t t = t0; t < t1; ++t) {
      const int64_t m0 = tile_row(job, t);
      const int rows = static_cast<int>(tile_row(job, t + 1) - m0);
      if (job.fetch_output) {
        const char *y = static_cast<const char *>(panel.finish.y) + (m0 * panel.finish.ldy + panel.n0) * item;
        for (int r = 0; r < rows; ++r)
          for (int64_t line = 0; line < panel.cols * item; line += 64)
            __builtin_prefetch(y + r * panel.finish.ldy * item + line, 1);
      }
      const int8_t *fetch = single ? panel.data + stream_ahead : ahead + (t - t0) * slice;
      tile[rows](job.q.codes + m0 * job.q.ld_bytes, job.q.ld_bytes, panel.data, ksteps, sums, fetch, lines);
      job.finish(panel, sums, m0, rows);
    }
  }
}

}  // namespace w8a8

extern "C" const char *w8a8_stream_name(void) { return w8a8::stream().name; }
