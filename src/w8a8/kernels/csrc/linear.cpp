// The driver of every instruction set: quantise the rows, walk the weights tile by tile, finish each tile while it is hot.
//
// The output is cut into tiles of up to isa().max_rows rows by one panel (32 columns); a tile runs over the whole of K
// with its sums in registers.  Tiles are visited so that what they share stays close:
//
//     group of panels (stays in L3) > block of rows (its codes stay in L2) > panel (stays in L2) > tile
//
// One task is one block of rows by one group of panels.  While a panel is used the next one is prefetched, a slice per
// tile: with few rows the product waits for memory, with many the prefetch is free.
#include <atomic>
#include <algorithm>
#include <memory>

#include "internal.h"
#include "parallel.h"
#include "quantize.h"
#include "scratch.h"

namespace w8a8 {
namespace {

// Tuned on Zen 4 (1 MiB L2, 32 MiB L3); a quarter of L2 for codes leaves room for the panel and the next.  A few rows of a
// large K are one block as long as that can be: two blocks read each panel twice.
constexpr int64_t kBlockBytes = 288 << 10;
constexpr int64_t kGroupBytes = 2 << 20;
constexpr int64_t kOutputBytes = 512 << 10;
constexpr int64_t kSerialQuantize = 16 << 10;   // elements: below, waking the other threads takes longer than the work
constexpr int64_t kSerialProduct = 96 << 10;    // multiplications, likewise
// A panel that only one tile reads is a stream.  Up to five rows the core keeps up with memory and the hardware's
// prefetchers do best (30 GB/s on one core, 2 MiB pages); a far prefetch takes the miss buffers from them (20 GB/s), a
// near one hardly and helps a little where pages are small.  From six rows on the product slows the stream down so much
// that they lose track, and a far prefetch wins (1.3-1.6x).
constexpr int kNearRows = 5;
constexpr int64_t kNearAhead = 512, kFarAhead = 12 << 10;

constexpr int kMaxLayers = 8;

struct Workspace {
  Scratch memory;
  Shares measure, quantize, product;
};

struct Job {
  const w8a8_layer *const *layers;
  int count;
  int dtype;
  void *const *y;
  const int64_t *ldy;
  const Isa *isa;
  Quantize q;
  Workspace *space;
  std::atomic<int> workers{0};

  int64_t ksteps;                        // groups of k that hold any of K: a panel may have more, all zeros
  int64_t panel_bytes;
  int64_t panel_begin[kMaxLayers + 1];   // of each layer, in the common numbering
  int64_t panels;
  int64_t tiles, tiles_per_block, blocks;
  int64_t group, groups;
  bool fetch_output;

  // Rows are dealt to tiles evenly: 16 rows are 8 + 8, not 14 + 2.
  int64_t tile_row(int64_t t) const { return q.m * t / tiles; }
};

void plan(Job &job, int threads) {
  const int64_t m = job.q.m;
  job.tiles = div_up(m, job.isa->max_rows);
  job.blocks = std::min(job.tiles, div_up(m * job.q.ld_bytes, kBlockBytes));
  job.tiles_per_block = div_up(job.tiles, job.blocks);
  job.blocks = div_up(job.tiles, job.tiles_per_block);
  job.group = 1;
  if (job.blocks > 1) {
    // As wide as L3 likes, but several tasks for every thread.
    const int64_t enough = std::max<int64_t>(1, job.panels * job.blocks / (8 * threads));
    job.group = std::clamp<int64_t>(kGroupBytes / job.panel_bytes, 1, std::min<int64_t>(16, enough));
  }
  job.groups = div_up(job.panels, job.group);
  // Where the output is too large to wait in L2, its lines are asked for before the product of a tile, which takes longer
  // than they do: 5 % at K = 768.  Where it is there already, asking costs 2 %.
  job.fetch_output = m * job.panels * kPanel * static_cast<int64_t>(dtype_bytes(job.dtype)) > kOutputBytes;
}

int layer_of(const Job &job, int64_t panel) {
  int l = 0;
  while (panel >= job.panel_begin[l + 1]) ++l;
  return l;
}

void product_task(const Job &job, int64_t task) {
  const int64_t group = task / job.blocks, block = task % job.blocks;
  const int64_t p0 = group * job.group, p1 = std::min(job.panels, p0 + job.group);
  const int64_t t0 = block * job.tiles_per_block, t1 = std::min(job.tiles, t0 + job.tiles_per_block);
  const bool single = job.tiles == 1 && job.q.m <= job.isa->stream_rows;
  const int64_t stream = job.q.m <= kNearRows ? kNearAhead : kFarAhead;
  const int lines = static_cast<int>(div_up(8, t1 - t0));   // per eight of the panel's own
  const int64_t slice = div_up(job.ksteps * kPanelStep, 4 * kAheadStep) * lines * 64;   // what one tile prefetches
  alignas(64) int32_t sums[kMaxRows * kPanel];
  for (int64_t p = p0; p < p1; ++p) {
    const int l = layer_of(job, p);
    const w8a8_layer &layer = *job.layers[l];
    const int64_t within = p - job.panel_begin[l];
    const int8_t *panel = layer.packed + within * job.panel_bytes;
    // The panel after this one; after the last of a group the next block of rows starts over with its first.
    const int64_t next = p + 1 < p1 || job.blocks == 1 ? p + 1 : p0;
    const int8_t *ahead = panel;
    if (next < job.panels) {
      const int nl = layer_of(job, next);
      ahead = job.layers[nl]->packed + (next - job.panel_begin[nl]) * job.panel_bytes;
    }
    const int64_t n0 = within * kPanel;
    const int cols = static_cast<int>(std::min<int64_t>(kPanel, layer.n - n0));
    const int64_t item = static_cast<int64_t>(dtype_bytes(job.dtype));
    const Finish f = {&layer, job.q.sx, job.q.zx, job.q.offset, job.dtype, job.y[l], job.ldy[l]};
    for (int64_t t = t0; t < t1; ++t) {
      const int64_t m0 = job.tile_row(t);
      const int rows = static_cast<int>(job.tile_row(t + 1) - m0);
      if (job.fetch_output) {
        const char *y = static_cast<const char *>(f.y) + (m0 * f.ldy + n0) * item;
        for (int r = 0; r < rows; ++r)
          for (int64_t line = 0; line < cols * item; line += 64) __builtin_prefetch(y + r * f.ldy * item + line, 1);
      }
      const int8_t *fetch = single ? panel + stream : ahead + (t - t0) * slice;
      job.isa->tile[rows](job.q.codes + m0 * job.q.ld_bytes, job.q.ld_bytes, panel, job.ksteps, sums, fetch, lines);
      job.isa->finish(f, sums, kPanel, m0, rows, n0, cols);
    }
  }
}

int64_t rows_per_task(const Job &job) { return std::max<int64_t>(1, 8192 / std::max<int64_t>(1, job.q.k)); }

void quantize_task(const Job &job, int64_t task, const Grid &shared) {
  const int64_t step = rows_per_task(job), end = std::min(job.q.m, (task + 1) * step);
  for (int64_t m = task * step; m < end; ++m) quantize_row(job.q, m, shared);
}

void measure_task(const Job &job, int64_t task) {
  const int64_t step = rows_per_task(job), end = std::min(job.q.m, (task + 1) * step);
  for (int64_t m = task * step; m < end; ++m) measure_row(job.q, m);
}

void work(void *data) {
  Job &job = *static_cast<Job *>(data);
  const DefaultFloat contract;
  const int me = job.workers.fetch_add(1, std::memory_order_relaxed);
  Workspace &s = *job.space;
  if (s.measure.total() > 0) {
    for (int64_t t; (t = s.measure.take(me)) >= 0; s.measure.done()) measure_task(job, t);
    s.measure.wait();
  }
  if (s.quantize.total() > 0) {
    const Grid shared = shared_grid(job.q);   // cheap beside the rows; every worker gets the same
    for (int64_t t; (t = s.quantize.take(me)) >= 0; s.quantize.done()) quantize_task(job, t, shared);
    s.quantize.wait();
  }
  for (int64_t t; (t = s.product.take(me)) >= 0;) product_task(job, t);
}

// Rows one cache line longer than an even number of lines: rows at a stride of 4096 would all fall into the same few
// sets of the first-level cache, and a tile reads fourteen rows at once.
int64_t left_stride(int64_t k, Left left) {
  const int64_t lines = div_up(k, 64) * left_bytes(left);
  return (lines | 1) * 64;
}

int check(const w8a8_layer *const *layers, int count, int dtype, int64_t m, int64_t ldx, const int64_t *ldy) {
  if (count < 1 || count > kMaxLayers || m < 0) return W8A8_BAD_ARGUMENT;
  const w8a8_layer &a = *layers[0];
  if (!valid(dtype, a.mode, a.bits, a.x_scale, a.x_zero_point)) return W8A8_BAD_ARGUMENT;
  for (int i = 0; i < count; ++i) {
    const w8a8_layer &b = *layers[i];
    if (b.n < 0 || b.k < 0 || (b.scale_stride != 0 && b.scale_stride != 1)) return W8A8_BAD_ARGUMENT;
    if (b.k != a.k || b.mode != a.mode || b.bits != a.bits) return W8A8_BAD_ARGUMENT;
    if (a.mode >= W8A8_STATIC_SYM && (b.x_scale != a.x_scale || b.x_zero_point != a.x_zero_point))
      return W8A8_BAD_ARGUMENT;
    if (m > 1 && ldy[i] < b.n) return W8A8_BAD_ARGUMENT;
  }
  if (ldx < 0) return W8A8_BAD_ARGUMENT;   // 0 is a row that is expanded to many
  return a.k > INT32_MAX / (reach_of(a.mode, a.bits) * 128) ? W8A8_K_TOO_LARGE : W8A8_OK;   // |weight| <= 128
}

}  // namespace
}  // namespace w8a8

using namespace w8a8;

extern "C" int w8a8_linear_many(const w8a8_layer *const *layers, int32_t count, const void *x, int32_t dtype, int64_t m,
                                int64_t ldx, void *const *y, const int64_t *ldy, int32_t threads) {
  const int status = check(layers, count, dtype, m, ldx, ldy);
  if (status != W8A8_OK || m == 0) return status;
  static thread_local Workspace space;
  const w8a8_layer &first = *layers[0];
  const Isa &use = isa();

  Job job;
  job.layers = layers, job.count = count, job.dtype = dtype, job.y = y, job.ldy = ldy, job.isa = &use;
  job.space = &space;
  job.ksteps = div_up(first.k, kGroup);
  job.panel_bytes = panel_bytes(first.k);
  job.panel_begin[0] = 0;
  for (int i = 0; i < count; ++i) job.panel_begin[i + 1] = job.panel_begin[i] + div_up(layers[i]->n, kPanel);
  job.panels = job.panel_begin[count];
  if (job.panels == 0) return W8A8_OK;

  Quantize &q = job.q;
  q.isa = &use, q.x = x, q.dtype = dtype, q.mode = first.mode, q.bits = first.bits;
  q.x_scale = first.x_scale, q.x_zero_point = first.x_zero_point;
  q.m = m, q.k = first.k, q.ldx = ldx;
  q.left = use.left, q.offset = left_offset(use.left), q.ld_bytes = left_stride(first.k, use.left);
  const int64_t code_bytes = m * q.ld_bytes, sx_bytes = round_up(4 * m, 64);
  const int64_t range_bytes = q.shared_dynamic() ? m * static_cast<int64_t>(sizeof(RowRange)) : 0;
  char *memory = space.memory.get(code_bytes + 2 * sx_bytes + range_bytes);
  if (!memory) return W8A8_NO_MEMORY;
  q.codes = memory;
  q.sx = reinterpret_cast<float *>(memory + code_bytes);
  q.zx = reinterpret_cast<int32_t *>(memory + code_bytes + sx_bytes);
  q.ranges = reinterpret_cast<RowRange *>(memory + code_bytes + 2 * sx_bytes);

  if (threads <= 0) threads = default_threads();
  if (m * first.k * job.panels * kPanel < kSerialProduct) threads = 1;
  plan(job, threads);
  const int64_t tasks = job.groups * job.blocks;
  threads = static_cast<int>(std::min<int64_t>(threads, std::max(tasks, m)));

  const DefaultFloat contract;
  int64_t row_tasks = div_up(m, rows_per_task(job));
  if (m * first.k <= kSerialQuantize || threads == 1) {
    if (q.shared_dynamic())
      for (int64_t r = 0; r < m; ++r) measure_row(q, r);
    const Grid shared = shared_grid(q);
    for (int64_t r = 0; r < m; ++r) quantize_row(q, r, shared);
    row_tasks = 0;
  }
  space.measure.reset(q.shared_dynamic() ? row_tasks : 0, threads);
  space.quantize.reset(row_tasks, threads);
  space.product.reset(tasks, threads);
  run_on_threads(work, &job, threads);
  space.memory.shrink();
  return W8A8_OK;
}

extern "C" int w8a8_linear(const w8a8_layer *layer, const void *x, int32_t dtype, int64_t m, int64_t ldx, void *y,
                           int64_t ldy, int32_t threads) {
  return w8a8_linear_many(&layer, 1, x, dtype, m, ldx, &y, &ldy, threads);
}

extern "C" int w8a8_quantize_rows(const void *x, int32_t dtype, int64_t m, int64_t k, int64_t ldx, int32_t mode,
                                  int32_t bits, float x_scale, int32_t x_zero_point, int32_t offset, uint8_t *codes,
                                  int64_t ldq, float *scale, int32_t *zero_point, int32_t threads) {
  if (!valid(dtype, mode, bits, x_scale, x_zero_point) || m < 0 || k < 0 || (offset != 0 && offset != 128))
    return W8A8_BAD_ARGUMENT;
  if (m == 0) return W8A8_OK;
  struct Rows {
    Quantize q;
    Shares measure, quantize;
    std::atomic<int> workers{0};
    uint8_t *codes;
    int64_t ldq;
  };
  const std::unique_ptr<Rows> rows(new (std::nothrow) Rows);
  if (!rows) return W8A8_NO_MEMORY;
  Quantize &q = rows->q;
  q = Quantize{&isa(), x, dtype, mode, bits, x_scale, x_zero_point, m, k, ldx, Left::kU8, offset, nullptr, 0,
               scale, zero_point, nullptr};
  std::unique_ptr<RowRange[]> ranges;
  if (q.shared_dynamic()) {
    ranges.reset(new (std::nothrow) RowRange[static_cast<size_t>(m)]);
    if (!ranges) return W8A8_NO_MEMORY;
    q.ranges = ranges.get();
  }
  rows->codes = codes, rows->ldq = ldq;
  if (threads <= 0) threads = default_threads();
  if (m * k <= kSerialQuantize) threads = 1;
  rows->measure.reset(q.shared_dynamic() ? m : 0, threads);
  rows->quantize.reset(m, threads);
  run_on_threads(
      [](void *data) {
        Rows &r = *static_cast<Rows *>(data);
        const DefaultFloat contract;
        const int me = r.workers.fetch_add(1, std::memory_order_relaxed);
        for (int64_t t; (t = r.measure.take(me)) >= 0; r.measure.done()) measure_row(r.q, t);
        r.measure.wait();
        const Grid shared = shared_grid(r.q);
        // The kernels write whole vectors; the caller's rows end at k.
        static thread_local Scratch scratch;
        char *room = scratch.get(round_up(r.q.k, 64) + 64);
        for (int64_t t; (t = r.quantize.take(me)) >= 0; r.quantize.done()) {
          Quantize one = r.q;
          one.codes = room - t * one.ld_bytes;
          quantize_row(one, t, shared);
          if (r.q.k > 0) std::memcpy(r.codes + t * r.ldq, room, static_cast<size_t>(r.q.k));
        }
      },
      rows.get(), threads);
  return W8A8_OK;
}

extern "C" int w8a8_finish(const w8a8_layer *layer, const int32_t *acc, int64_t lda, int64_t m, int32_t offset,
                           const float *scale, const int32_t *zero_point, int32_t dtype, void *y, int64_t ldy,
                           int32_t threads) {
  if (dtype < W8A8_F32 || dtype > W8A8_F16 || m < 0 || layer->n < 0) return W8A8_BAD_ARGUMENT;
  if (m == 0 || layer->n == 0) return W8A8_OK;
  struct Rows {
    Finish f;
    const Isa *isa;
    const int32_t *acc;
    int64_t lda, m, step;
    Shares shares;
    std::atomic<int> workers{0};
  };
  const std::unique_ptr<Rows> rows(new (std::nothrow) Rows);
  if (!rows) return W8A8_NO_MEMORY;
  rows->f = Finish{layer, scale, zero_point, offset, dtype, y, ldy};
  rows->isa = &isa(), rows->acc = acc, rows->lda = lda, rows->m = m;
  rows->step = std::max<int64_t>(1, 16384 / layer->n);
  if (threads <= 0) threads = default_threads();
  if (m * layer->n <= kSerialQuantize) threads = 1;
  rows->shares.reset(div_up(m, rows->step), threads);
  run_on_threads(
      [](void *data) {
        Rows &r = *static_cast<Rows *>(data);
        const DefaultFloat contract;
        const int me = r.workers.fetch_add(1, std::memory_order_relaxed);
        for (int64_t t; (t = r.shares.take(me)) >= 0;) {
          const int64_t m0 = t * r.step, m1 = std::min(r.m, m0 + r.step);
          const int64_t n = r.f.layer->n;
          for (int64_t row = m0; row < m1; ++row)   // by rows, in pieces of int range
            for (int64_t n0 = 0; n0 < n; n0 += 1 << 20)
              r.isa->finish(r.f, r.acc + row * r.lda + n0, r.lda, row, 1, n0,
                            static_cast<int>(std::min<int64_t>(1 << 20, n - n0)));
        }
      },
      rows.get(), threads);
  return W8A8_OK;
}
