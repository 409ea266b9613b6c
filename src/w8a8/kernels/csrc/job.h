// One call of the product: what is multiplied, and how it is cut into tasks.
#pragma once

#include <algorithm>
#include <atomic>

#include "internal.h"
#include "parallel.h"
#include "quantize.h"
#include "scratch.h"

namespace w8a8 {

constexpr int kMaxLayers = 8;

struct Workspace {
  Scratch memory;
  Shares measure, quantize, settle, product;
};

struct Job {
  const w8a8_layer *const *layers;
  int dtype;
  void *const *y;
  const int64_t *ldy;
  const int32_t *activation;   // by layer, or null
  const Isa *isa;
  Quantize q;
  Workspace *space;
  std::atomic<int> workers{0};
  Rests rests;                           // q.rests

  int64_t panel_bytes;
  int64_t panel_begin[kMaxLayers + 1];   // of each layer, in the common numbering
  int64_t panels;

  // The plan.  A task is one block of rows by one group of panels; blocks of one group come one after the other.
  int64_t blocks, group, groups;
  bool quantizes_itself = false;         // a task its own rows, just before it multiplies them
  int64_t tiles, tiles_per_block;        // register tiles: product.cpp
  bool fetch_output;
  int64_t split, panels_at_once;         // matrix tiles: tile_product.cpp
  int32_t *sums = nullptr;
  int64_t sums_per_worker = 0;           // int32

  int64_t tasks() const { return groups * blocks; }
  // Whether the rows, once they are quantised, are multiplied as pairs of bytes: a step of one row alone takes twice as long
  // as its share of a tile's, and 16 bits a quarter longer than 8.
  bool paired() const {
    if (!q.pairs || rests.no_room.load(std::memory_order_relaxed)) return false;
    return rests.steps.load(std::memory_order_relaxed) <= q.m * div_up(q.k, kGroup) / 8;
  }

  struct Panel {
    const int8_t *data;
    int64_t n0;      // its first column
    int cols;
    Finish finish;
    int activation;
  };
  int layer_of(int64_t panel) const {
    int l = 0;
    while (panel >= panel_begin[l + 1]) ++l;
    return l;
  }
  const int8_t *data_of(int64_t panel) const {
    const int l = layer_of(panel);
    return layers[l]->packed + (panel - panel_begin[l]) * panel_bytes;
  }
  Panel at(int64_t panel) const {
    const int l = layer_of(panel);
    const w8a8_layer &layer = *layers[l];
    const int64_t n0 = (panel - panel_begin[l]) * kPanel;
    return {data_of(panel), n0, static_cast<int>(std::min<int64_t>(kPanel, layer.n - n0)),
            {&layer, q.sx, q.zx, q.offset, dtype, y[l], ldy[l]}, activation ? activation[l] : W8A8_IDENTITY};
  }
  // From sums to outputs, rows [m0, m0 + rows) of a panel.
  void finish(const Panel &panel, const int32_t *sums, int64_t m0, int rows) const {
    isa->steps->finish(panel.finish, sums, kPanel, m0, rows, panel.n0, panel.cols);
    if (panel.activation == W8A8_IDENTITY) return;
    for (int64_t m = m0; m < m0 + rows; ++m)
      isa->floats->activate(panel.activation, static_cast<float *>(panel.finish.y) + m * panel.finish.ldy + panel.n0,
                            panel.cols);
  }
};

// On register tiles: product.cpp.
void plan_product(Job &job, int threads);
void product_task(const Job &job, int64_t task);

// On matrix tiles: tile_product.cpp.  `row_tile` rows of codes more than there are may be read.
void plan_tile_product(Job &job, int threads);
void tile_product_task(const Job &job, int64_t task, int worker);

}  // namespace w8a8
