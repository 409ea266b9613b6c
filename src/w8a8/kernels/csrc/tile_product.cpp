// The product on matrix tiles: blocks of up to 128 rows by one panel, K in chunks, sums in the first-level cache.
//
// What limits it is where the operands come from, so a block's codes stay in L2 (768 KiB at most) and a chunk of the
// panel in L1 while the row tiles of the block take turns with it (tiles.h).  A large K is split once more, outside of the
// panels: a block of all of it would be too low for its weights.  The sums of as many panels as L2 holds wait meanwhile.
//
// Where every thread can have blocks of its own, it quantises their rows itself just before it multiplies them, and no
// thread waits for another.  With fewer rows the panels are dealt out instead.
#include "job.h"
#include "tiles.h"

namespace w8a8 {
namespace {

constexpr int64_t kBlockRows = 128;
constexpr int64_t kWholeK = 5000, kSplitK = 2816;
constexpr int64_t kWaitingBytes = 512 << 10;   // of sums
constexpr int64_t kGroupBytes = 512 << 10;     // of panels that two blocks of rows read after another

// Blocks begin at whole row tiles, dealt out evenly.
int64_t block_row(const Job &job, int64_t block) {
  return std::min(job.q.m, div_up(job.q.m, kTileRows) * block / job.blocks * kTileRows);
}

}  // namespace

void plan_tile_product(Job &job, int threads) {
  const int64_t m = job.q.m, k = job.q.k;
  const int64_t row_tiles = div_up(m, kTileRows);
  job.quantizes_itself = m >= kBlockRows * threads;
  job.blocks = div_up(m, kBlockRows);
  if (job.quantizes_itself) job.blocks = std::min(row_tiles, div_up(job.blocks, threads) * threads);
  job.group = job.panels;
  if (!job.quantizes_itself) {
    job.group = std::max<int64_t>(1, job.panels * job.blocks / (4 * threads));
    if (job.blocks > 1) job.group = std::min(job.group, std::max<int64_t>(1, kGroupBytes / job.panel_bytes));
    if (m <= kTileRows) job.group = div_up(job.group, 2) * 2;   // two panels at once
  }
  job.groups = div_up(job.panels, job.group);

  const int64_t steps = div_up(k, kTileBytes);
  job.split = k <= kWholeK ? steps : div_up(steps, div_up(k, kSplitK));
  const int64_t rows = std::min(div_up(row_tiles, job.blocks) * kTileRows, div_up(m, kTileRows) * kTileRows);
  const int64_t sums = rows * kPanel;   // of a panel
  job.panels_at_once = m <= kTileRows ? 2 : 1;
  if (job.split < steps)
    job.panels_at_once = std::clamp<int64_t>(kWaitingBytes / (4 * sums), 2, std::max<int64_t>(2, job.group));
  job.sums_per_worker = sums * job.panels_at_once;
}

void tile_product_task(const Job &job, int64_t task, int worker) {
  const int64_t group = task / job.blocks, block = task % job.blocks;
  const int64_t p0 = group * job.group, p1 = std::min(job.panels, p0 + job.group);
  const int64_t m0 = block_row(job, block), m1 = block_row(job, block + 1);
  const int rows = static_cast<int>(m1 - m0);
  if (job.quantizes_itself) {
    const Grid shared = shared_grid(job.q);
    for (int64_t m = m0; m < m1; ++m) quantize_row(job.q, m, shared);
  }

  TileBlock b;
  b.tiles = static_cast<int>(div_up(rows, kTileRows));
  b.tile_rows = static_cast<int>(div_up(rows, b.tiles));   // 17 rows are 9 + 8
  b.ld = job.q.ld_bytes;
  b.panel_bytes = job.panel_bytes;
  job.isa->tiles->configure(b.tile_rows, b.tiles == 1);

  const int64_t steps = div_up(job.q.k, kTileBytes), per_panel = int64_t{b.tiles} * b.tile_rows * kPanel;
  int32_t *const all_sums = job.sums + worker * job.sums_per_worker;
  const char *codes = job.q.codes + m0 * job.q.ld_bytes;
  for (int64_t q0 = p0; q0 < p1; q0 += job.panels_at_once) {
    const int64_t q1 = std::min(p1, q0 + job.panels_at_once);
    for (int64_t s0 = 0; s0 < steps; s0 += job.split) {
      b.steps = std::min(job.split, steps - s0);
      b.add = s0 > 0;
      b.left = reinterpret_cast<const uint8_t *>(codes) + s0 * kTileBytes;
      const bool whole = s0 + b.steps == steps;
      for (int64_t p = q0; p < q1; p += b.panels) {
        const Job::Panel panel = job.at(p);
        b.panels = b.tiles == 1 && p + 1 < q1 && job.layer_of(p + 1) == job.layer_of(p) ? 2 : 1;
        b.panel = panel.data + s0 * kTilePanel;
        b.sums = all_sums + (p - q0) * per_panel;
        const int64_t next = p + b.panels;   // of this part of K; then of the next part, or of the next panels
        b.ahead = next < q1 ? job.data_of(next) + s0 * kTilePanel
                  : !whole  ? job.data_of(q0) + (s0 + job.split) * kTilePanel
                  : next < job.panels ? job.data_of(next) : panel.data;
        job.isa->tiles->run(b);
        if (!whole) continue;
        for (int i = 0; i < b.panels; ++i) {
          job.finish(job.at(p + i), b.sums + i * per_panel, m0, rows);
        }
      }
    }
  }
}

}  // namespace w8a8
