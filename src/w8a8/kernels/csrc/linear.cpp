// The driver of every instruction set: quantise the rows, multiply them by the panels of the weights, finish the sums
// while they are hot.  How the product is cut and in what order is product.cpp, and for matrix tiles tile_product.cpp.
#include <memory>

#include "job.h"
#include "tiles.h"

namespace w8a8 {
namespace {

constexpr int64_t kSerialQuantize = 16 << 10;   // elements: below, waking the other threads takes longer than the work
constexpr int64_t kSerialProduct = 96 << 10;    // multiplications, likewise

int64_t rows_per_task(const Job &job) { return std::max<int64_t>(1, 8192 / std::max<int64_t>(1, job.q.k)); }

// Calls row(m) for every row, a task at a time, and waits for the others.
template <class Row>
void all_rows(const Job &job, Shares &tasks, int worker, const Row &row) {
  if (tasks.total() == 0) return;
  const int64_t step = rows_per_task(job);
  for (int64_t t; (t = tasks.take(worker)) >= 0; tasks.done())
    for (int64_t m = t * step; m < std::min(job.q.m, (t + 1) * step); ++m) row(m);
  tasks.wait();
}

// Codes to what the product reads, when those of all rows are known.
void settle_row(const Job &job, int64_t m) {
  const Quantize &q = job.q;
  (job.paired() ? q.pairs->split : q.pairs->widen)(q.codes + m * q.ld_bytes, div_up(q.k, kGroup));
}

void work(void *data) {
  Job &job = *static_cast<Job *>(data);
  const DefaultFloat contract;
  const int me = job.workers.fetch_add(1, std::memory_order_relaxed);
  Workspace &s = *job.space;
  all_rows(job, s.measure, me, [&](int64_t m) { measure_row(job.q, m); });
  const Grid shared = s.quantize.total() ? shared_grid(job.q) : Grid{};   // cheap beside the rows, alike for every worker
  all_rows(job, s.quantize, me, [&](int64_t m) { quantize_row(job.q, m, shared); });
  all_rows(job, s.settle, me, [&](int64_t m) { settle_row(job, m); });
  if (!job.isa->tiles) {
    for (int64_t t; (t = s.product.take(me)) >= 0;) product_task(job, t);
    return;
  }
  for (int64_t t; (t = s.product.take(me)) >= 0;) tile_product_task(job, t, me);
  job.isa->tiles->release();
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

extern "C" int w8a8_linear_fused(const w8a8_norm *before, const w8a8_layer *const *layers, int32_t count, const void *x,
                                 int32_t dtype, int64_t m, int64_t ldx, void *const *y, const int64_t *ldy,
                                 const int32_t *activation, int32_t threads) {
  const int status = check(layers, count, dtype, m, ldx, ldy);
  if (status != W8A8_OK) return status;
  if ((before || activation) && dtype != W8A8_F32) return W8A8_BAD_ARGUMENT;
  if (before && (layers[0]->mode == W8A8_TENSOR_SYM || layers[0]->mode == W8A8_TENSOR_ASYM)) return W8A8_BAD_ARGUMENT;
  for (int i = 0; activation && i < count; ++i)
    if (activation[i] < W8A8_IDENTITY || activation[i] > W8A8_SILU) return W8A8_BAD_ARGUMENT;
  if (m == 0) return W8A8_OK;
  static thread_local Workspace space;
  const w8a8_layer &first = *layers[0];

  Job job;
  job.layers = layers, job.dtype = dtype, job.y = y, job.ldy = ldy, job.activation = activation;
  job.space = &space;
  job.panel_bytes = panel_bytes(first.k);
  job.panel_begin[0] = 0;
  for (int i = 0; i < count; ++i) job.panel_begin[i + 1] = job.panel_begin[i] + div_up(layers[i]->n, kPanel);
  job.panels = job.panel_begin[count];
  if (job.panels == 0) return W8A8_OK;
  const Isa &use = first.k > 0 ? isa_for(m, first.k) : kPortable;   // without K there is no product
  job.isa = &use;

  Quantize &q = job.q;
  q.isa = &use, q.x = x, q.dtype = dtype, q.mode = first.mode, q.bits = first.bits;
  q.before = before;
  q.x_scale = first.x_scale, q.x_zero_point = first.x_zero_point;
  q.m = m, q.k = first.k, q.ldx = ldx;
  q.left = use.pairs ? Left::kS8 : use.left, q.offset = left_offset(q.left), q.ld_bytes = left_stride(first.k, use.left);
  q.pairs = use.pairs, q.rests = &job.rests;
  if (threads <= 0) threads = default_threads();
  if (m * first.k * job.panels * kPanel < kSerialProduct) threads = 1;
  if (use.tiles) plan_tile_product(job, threads);
  else plan_product(job, threads);
  threads = static_cast<int>(std::min<int64_t>(threads, std::max(job.tasks(), m)));

  const int64_t spare = use.tiles ? kTileRows : 0;   // rows that the last tile reads beyond, and multiplies for nothing
  const int64_t code_bytes = (m + spare) * q.ld_bytes, sx_bytes = round_up(4 * m, 64);
  const int64_t range_bytes = round_up(q.shared_dynamic() ? m * static_cast<int64_t>(sizeof(RowRange)) : 0, 64);
  char *memory = space.memory.get(code_bytes + 2 * sx_bytes + range_bytes + 4 * threads * job.sums_per_worker);
  if (!memory) return W8A8_NO_MEMORY;
  q.codes = memory;
  q.sx = reinterpret_cast<float *>(memory + code_bytes);
  q.zx = reinterpret_cast<int32_t *>(memory + code_bytes + sx_bytes);
  q.ranges = reinterpret_cast<RowRange *>(memory + code_bytes + 2 * sx_bytes);
  job.sums = reinterpret_cast<int32_t *>(memory + code_bytes + 2 * sx_bytes + range_bytes);

  const DefaultFloat contract;
  int64_t row_tasks = div_up(m, rows_per_task(job));
  const bool serial = m * first.k <= kSerialQuantize || threads == 1;
  if (serial && q.shared_dynamic())
    for (int64_t r = 0; r < m; ++r) measure_row(q, r);
  if (serial && !job.quantizes_itself) {
    const Grid shared = shared_grid(q);
    for (int64_t r = 0; r < m; ++r) quantize_row(q, r, shared);
    if (q.pairs)
      for (int64_t r = 0; r < m; ++r) settle_row(job, r);
  }
  if (serial) row_tasks = 0;
  space.measure.reset(q.shared_dynamic() ? row_tasks : 0, threads);
  space.quantize.reset(job.quantizes_itself ? 0 : row_tasks, threads);
  space.settle.reset(q.pairs ? row_tasks : 0, threads);
  space.product.reset(job.tasks(), threads);
  run_on_threads(work, &job, threads);
  space.memory.shrink();
  return W8A8_OK;
}

extern "C" int w8a8_linear_many(const w8a8_layer *const *layers, int32_t count, const void *x, int32_t dtype, int64_t m,
                                int64_t ldx, void *const *y, const int64_t *ldy, int32_t threads) {
  return w8a8_linear_fused(nullptr, layers, count, x, dtype, m, ldx, y, ldy, nullptr, threads);
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
  Quantize q = {&isa(), x, dtype, mode, bits, x_scale, x_zero_point, m, k, ldx, Left::kU8, offset, nullptr, 0,
                scale, zero_point, nullptr};
  if (m * k <= kSerialQuantize) threads = 1;
  std::unique_ptr<RowRange[]> ranges;
  if (q.shared_dynamic()) {
    ranges.reset(new (std::nothrow) RowRange[static_cast<size_t>(m)]);
    if (!ranges) return W8A8_NO_MEMORY;
    q.ranges = ranges.get();
    for_each(m, threads, [&](int64_t row) { measure_row(q, row); });
  }
  const DefaultFloat contract;
  const Grid shared = shared_grid(q);
  // The kernels write whole vectors; the caller's rows end at k.
  return for_each_with(round_up(k, 64) + 64, m, threads, [&](int64_t row, char *room) {
    Quantize one = q;
    one.codes = room - row * one.ld_bytes;
    quantize_row(one, row, shared);
    if (k > 0) std::memcpy(codes + row * ldq, room, static_cast<size_t>(k));
  });
}

extern "C" int w8a8_finish(const w8a8_layer *layer, const int32_t *acc, int64_t lda, int64_t m, int32_t offset,
                           const float *scale, const int32_t *zero_point, int32_t dtype, void *y, int64_t ldy,
                           int32_t threads) {
  if (dtype < W8A8_F32 || dtype > W8A8_F16 || m < 0 || layer->n < 0) return W8A8_BAD_ARGUMENT;
  if (m == 0 || layer->n == 0) return W8A8_OK;
  const Finish f{layer, scale, zero_point, offset, dtype, y, ldy};
  const Isa &use = isa();
  const int64_t n = layer->n, step = std::max<int64_t>(1, 16384 / n);
  if (m * n <= kSerialQuantize) threads = 1;
  for_each(div_up(m, step), threads, [&](int64_t task) {
    const int64_t end = std::min(m, (task + 1) * step);
    for (int64_t row = task * step; row < end; ++row)   // by rows, in pieces of int range
      for (int64_t n0 = 0; n0 < n; n0 += 1 << 20)
        use.steps->finish(f, acc + row * lda + n0, lda, row, 1, n0,
                          static_cast<int>(std::min<int64_t>(1 << 20, n - n0)));
  });
  return W8A8_OK;
}
