// Many steps in one call: what a model computes between two operations that are not of the kinds in w8a8.h.
//
//     attention | stage: product, sum and norm, product ... | attention | stage | ...
//
// Everything but attention goes row by row, so what lies between two attentions, a stage, is run a block of rows at a
// time: what only a stage needs stays in the second-level cache, however many rows there are.  With several threads every
// block is one task; where there are too few blocks the threads share each step instead.
//
// Padding: a token that is no key of any query matters to its own row of the outputs only.  Where masks say nothing but
// that, such rows are left out from the beginning, and what is left is packed, sequence after sequence.
#include <algorithm>
#include <climits>
#include <cstring>
#include <new>
#include <vector>

#include "internal.h"
#include "parallel.h"

namespace w8a8 {
namespace {

constexpr int64_t kBlockFloats = 192 << 10;   // of what a stage keeps of one block
constexpr int64_t kLeastBlock = 56;           // rows: below, reading the weights takes longer than the products
constexpr int64_t kWorthPacking = 16;         // one row in so many has to be padding

struct Slot {
  int64_t width = 0;
  int first = -1, last = -1;     // steps that write and read it
  bool local = false;            // to one stage
  int begin = 0, end = 0;        // when its memory is its own: by steps if it is local, else by stages
  int64_t offset = 0;            // floats of a row that lie before it
  float *base = nullptr;         // where it is not local
};

struct Sequence {
  int64_t first, rows;           // among the rows that are computed
  bool kept_all, unmasked;
};

class Run {
 public:
  Run(const w8a8_plan &plan, int threads) : p_(plan), threads_(threads <= 0 ? default_threads() : threads) {}

  int operator()() {
    if (!valid()) return W8A8_BAD_ARGUMENT;
    if (p_.batch == 0 || p_.length == 0) return W8A8_OK;
    look_at_masks();
    lay_out();
    if (!memory_) return W8A8_NO_MEMORY;
    const DefaultFloat contract;
    if (packed_) gather();
    for (int begin = 0; begin < p_.step_count;) {
      int end = begin;
      while (end < p_.step_count && p_.steps[end].kind != W8A8_STEP_ATTEND) ++end;
      if (end > begin) stage(begin, end);
      if (end < p_.step_count) attend(p_.steps[end]);
      begin = end + 1;
    }
    if (packed_) scatter();
    arena_.shrink();
    return status_.load(std::memory_order_relaxed);
  }

 private:
  // --- what is asked: every slot is written once, before it is read, and fits who reads it

  bool reads(int step, int slot, int64_t width) {
    if (slot < 0 || slot >= p_.slot_count || slots_[slot].first < 0 || slots_[slot].width != width) return false;
    slots_[slot].last = step;
    return true;
  }
  bool writes(int step, int slot, int64_t width) {
    if (slot < 0 || slot >= p_.slot_count || slots_[slot].first >= 0 || slots_[slot].width != width) return false;
    slots_[slot].first = slots_[slot].last = step;
    return !p_.slots[slot].given;
  }

  bool valid_step(int i) {
    const w8a8_step &s = p_.steps[i];
    if (s.kind == W8A8_STEP_ATTEND) {
      if (s.heads < 1 || s.shared < 1 || s.heads % s.shared || s.mask < -1 || s.mask >= p_.mask_count) return false;
      if (s.q < 0 || s.q >= p_.slot_count || slots_[s.q].width % s.heads) return false;
      const int64_t width = slots_[s.q].width;
      return reads(i, s.q, width) && reads(i, s.k, width / s.shared) && reads(i, s.v, width / s.shared) &&
             writes(i, s.out[0], width);
    }
    if (s.kind < W8A8_STEP_LINEAR || s.kind > W8A8_STEP_SUM || s.x < 0 || s.x >= p_.slot_count) return false;
    const int64_t width = slots_[s.x].width;
    if (!reads(i, s.x, width) || (s.add >= 0 && !reads(i, s.add, width))) return false;
    if (s.sum >= 0 && (s.add < 0 || !writes(i, s.sum, width))) return false;
    if (s.kind == W8A8_STEP_SUM) return s.sum >= 0;
    if (s.normed >= 0 && !writes(i, s.normed, width)) return false;
    if (s.kind == W8A8_STEP_NORM) return s.normed >= 0;
    if (s.count < 1 || s.count > 8 || (!s.has_norm && (s.add >= 0 || s.normed >= 0))) return false;
    for (int j = 0; j < s.count; ++j)
      if (s.layers[j].k != width || s.layers[j].mode == W8A8_TENSOR_SYM || s.layers[j].mode == W8A8_TENSOR_ASYM ||
          !writes(i, s.out[j], s.layers[j].n))   // rows that share a scale cannot be run in blocks
        return false;
    return true;
  }

  bool valid() {
    for (int i = 0; i < p_.read_count; ++i)
      if (p_.read[i] < 0 || p_.read[i] >= p_.length) return false;
    if (p_.batch < 0 || p_.length < 0 || p_.step_count < 1 || p_.slot_count < 1) return false;
    slots_.resize(p_.slot_count);
    for (int i = 0; i < p_.slot_count; ++i) {
      slots_[i].width = p_.slots[i].width;
      if (slots_[i].width < 1 || (p_.slots[i].given && p_.slots[i].wanted)) return false;
      if (p_.slots[i].given) slots_[i].first = slots_[i].last = 0;
    }
    for (int i = 0; i < p_.step_count; ++i)
      if (!valid_step(i)) return false;
    for (const Slot &slot : slots_)
      if (slot.first < 0) return false;
    return true;
  }

  // --- who sees whom

  w8a8_attention masked(int mask) const {
    w8a8_attention t = {};
    const w8a8_mask &m = p_.masks[mask];
    t.mask = m.data, t.mask_is_float = m.is_float;
    for (int i = 0; i < 4; ++i) t.mask_at[i] = m.at[i];
    return t;
  }

  // Whether all queries of a sequence see the same keys, and nothing is added to what they see; then which: 0 where hidden.
  bool only_hides(int mask, int64_t batch, std::vector<uint8_t> &seen) const {
    const w8a8_attention t = masked(mask);
    if (t.mask_at[1]) return false;
    const void *row = mask_row(t, batch, 0, 0);
    for (int64_t key = 0; key < p_.length; ++key) {
      const float bias = mask_at(t, row, key);
      if (bias == 0.0f) continue;
      if (!(bias <= kHidden)) return false;
      seen[key] = 0;
    }
    if (!t.mask_at[2]) return true;
    const size_t bytes = static_cast<size_t>(p_.length) * (t.mask_is_float ? 4 : 1);
    for (int64_t query = 1; query < p_.length; ++query) {
      const void *other = mask_row(t, batch, 0, query);
      if (t.mask_at[3] == 1 ? std::memcmp(row, other, bytes) != 0 : !same(t, row, other)) return false;
    }
    return true;
  }
  bool same(const w8a8_attention &t, const void *a, const void *b) const {
    for (int64_t key = 0; key < p_.length; ++key)
      if (mask_at(t, a, key) != mask_at(t, b, key)) return false;
    return true;
  }

  void look_at_masks() {
    bool skips = p_.skip_padding != 0;
    for (int i = 0; i < p_.step_count; ++i) skips = skips && (p_.steps[i].kind != W8A8_STEP_ATTEND || p_.steps[i].mask >= 0);
    std::vector<uint8_t> seen(p_.length), other(p_.length);
    for (int64_t b = 0; b < p_.batch; ++b) {
      std::fill(seen.begin(), seen.end(), 1);
      bool plain = true;
      for (int m = 0; m < p_.mask_count && plain; ++m) {
        std::fill(other.begin(), other.end(), 1);
        plain = only_hides(m, b, other) && (m == 0 || seen == other);
        seen.swap(other);
      }
      const int64_t rows = std::count(seen.begin(), seen.end(), 1);
      const bool whole = plain && rows == p_.length;
      bool packs = plain && rows > 0 && skips;
      for (int i = 0; i < p_.read_count; ++i) packs = packs && seen[p_.read[i]];
      sequences_.push_back({static_cast<int64_t>(kept_.size()), packs ? rows : p_.length, !packs || whole, packs || whole});
      for (int64_t i = 0; i < p_.length; ++i)
        if (!packs || seen[i]) kept_.push_back(b * p_.length + i);
    }
    rows_ = static_cast<int64_t>(kept_.size());
    const int64_t all = p_.batch * p_.length;
    packed_ = (all - rows_) * kWorthPacking > all;
    if (packed_) return;
    rows_ = all;
    for (int64_t b = 0; b < p_.batch; ++b) {
      Sequence &s = sequences_[b];
      s.first = b * p_.length, s.rows = p_.length, s.unmasked = s.unmasked && s.kept_all;
    }
  }

  // --- where the slots lie

  // Slots that live at the same time lie beside one another; gives the floats of a row that all of them take.
  int64_t place(const std::vector<int> &which) {
    int64_t all = 0;
    for (size_t i = 0; i < which.size(); ++i) {
      Slot &slot = slots_[which[i]];
      int64_t at = 0;
      for (bool moved = true; moved;) {
        moved = false;
        for (size_t j = 0; j < i; ++j) {
          const Slot &other = slots_[which[j]];
          const bool together = other.begin <= slot.end && slot.begin <= other.end;
          const bool overlap = at < other.offset + round_up(other.width, 16) && other.offset < at + round_up(slot.width, 16);
          if (together && overlap) at = other.offset + round_up(other.width, 16), moved = true;
        }
      }
      slot.offset = at;
      all = std::max(all, at + round_up(slot.width, 16));
    }
    return all;
  }

  void lay_out() {
    std::vector<int> full, local, stage_of(p_.step_count);
    for (int i = 0, stage = 0; i < p_.step_count; ++i) {
      if (p_.steps[i].kind == W8A8_STEP_ATTEND) stage += 2;
      stage_of[i] = p_.steps[i].kind == W8A8_STEP_ATTEND ? stage - 1 : stage;
    }
    for (int i = 0; i < p_.slot_count; ++i) {
      Slot &slot = slots_[i];
      const bool outside = p_.slots[i].given || p_.slots[i].wanted;
      slot.local = !outside && stage_of[slot.first] == stage_of[slot.last] && p_.steps[slot.first].kind != W8A8_STEP_ATTEND;
      if (slot.local) local.push_back(i);
      else if (!outside || packed_) full.push_back(i);
      slot.begin = slot.local ? slot.first : stage_of[slot.first];
      slot.end = slot.local ? slot.last : p_.slots[i].wanted ? INT_MAX : stage_of[slot.last];   // until they are put back
      if (!packed_) slot.base = p_.slots[i].wanted ? p_.slots[i].wanted : const_cast<float *>(p_.slots[i].given);
    }
    const int64_t per_row = place(full);
    local_per_row_ = place(local);
    tasks_ = div_up(rows_, std::max<int64_t>(kLeastBlock, kBlockFloats / std::max<int64_t>(1, local_per_row_)));
    if (threads_ > 1) tasks_ = tasks_ < threads_ ? 1 : div_up(tasks_, threads_) * threads_;
    block_ = div_up(rows_, tasks_);
    const int64_t workers = tasks_ == 1 ? 1 : threads_;
    memory_ = reinterpret_cast<float *>(arena_.get(4 * (per_row * rows_ + workers * local_per_row_ * block_) + 64));
    if (!memory_) return;
    for (const int i : full) slots_[i].base = memory_ + slots_[i].offset * rows_;
    local_ = memory_ + per_row * rows_;
  }

  // --- the steps

  struct Block {
    int64_t first, rows;
    float *local;
    int threads;
  };

  float *at(int slot, const Block &b) const {
    if (slot < 0) return nullptr;
    const Slot &s = slots_[slot];
    return s.local ? b.local + s.offset * block_ : s.base + b.first * s.width;
  }

  void step(const w8a8_step &s, const Block &b) {
    float *const x = at(s.x, b), *const add = at(s.add, b), *const sum = at(s.sum, b);
    const int64_t k = slots_[s.x].width;
    if (s.kind == W8A8_STEP_SUM) {
      for (int64_t i = 0; i < b.rows * k; ++i) sum[i] = x[i] + add[i];
      return;
    }
    const w8a8_norm norm = {add, sum, at(s.normed, b), s.weight, s.bias, s.eps};
    if (s.kind == W8A8_STEP_NORM) return note(w8a8_normalize(&norm, x, b.rows, k, b.threads));
    const w8a8_layer *layers[8];
    void *y[8];
    int64_t ld[8];
    for (int i = 0; i < s.count; ++i) layers[i] = &s.layers[i], y[i] = at(s.out[i], b), ld[i] = s.layers[i].n;
    note(w8a8_linear_fused(s.has_norm ? &norm : nullptr, layers, s.count, x, W8A8_F32, b.rows, k, y, ld, s.activation,
                           b.threads));
  }

  void stage(int begin, int end) {
    auto task = [&](int64_t i, float *local, int threads) {
      const int64_t first = rows_ * i / tasks_;
      const Block block = {first, rows_ * (i + 1) / tasks_ - first, local, threads};
      for (int s = begin; s < end; ++s) step(p_.steps[s], block);
    };
    if (tasks_ == 1) return task(0, local_, threads_);
    for_each_by_worker(tasks_, threads_,
                       [&](int64_t i, int worker) { task(i, local_ + worker * local_per_row_ * block_, 1); });
  }

  void attend(const w8a8_step &s) {
    const int64_t width = slots_[s.q].width, narrow = slots_[s.k].width, dims = width / s.heads;
    const int64_t work = rows_ * p_.length * width;
    const int threads = work <= kSerialScores ? 1 : threads_;
    note(for_each_with(4 * attention_scratch(p_.length, dims), p_.batch * s.heads, threads, [&](int64_t task, char *memory) {
      const int64_t batch = task / s.heads;
      const Sequence &q = sequences_[batch];
      w8a8_attention t = {};
      if (s.mask >= 0 && !q.unmasked) {
        t = masked(s.mask);
        t.mask = mask_row(t, batch, 0, 0);
      }
      t.q = slots_[s.q].base + q.first * width, t.out = slots_[s.out[0]].base + q.first * width;
      t.k = slots_[s.k].base + q.first * narrow, t.v = slots_[s.v].base + q.first * narrow;
      t.q_at[1] = t.k_at[1] = t.v_at[1] = t.out_at[1] = dims;
      t.q_at[2] = t.out_at[2] = width, t.k_at[2] = t.v_at[2] = narrow;
      t.queries = t.keys = q.rows, t.dims = dims, t.shared = s.shared, t.scale = s.scale, t.causal = s.causal;
      isa().floats->attend(t, 0, task % s.heads, reinterpret_cast<float *>(memory));
    }));
  }

  // --- padding out and in

  void gather() {
    for (int i = 0; i < p_.slot_count; ++i) {
      if (!p_.slots[i].given) continue;
      const int64_t width = slots_[i].width;
      for (int64_t r = 0; r < rows_; ++r)
        std::memcpy(slots_[i].base + r * width, p_.slots[i].given + kept_[r] * width, static_cast<size_t>(width) * 4);
    }
  }

  void scatter() {
    for (int i = 0; i < p_.slot_count; ++i) {
      float *const to = p_.slots[i].wanted;
      if (!to) continue;
      const int64_t width = slots_[i].width, all = p_.batch * p_.length;
      for (int64_t row = 0, r = 0; row < all; ++row) {
        if (r < rows_ && kept_[r] == row) std::memcpy(to + row * width, slots_[i].base + r++ * width, static_cast<size_t>(width) * 4);
        else std::memset(to + row * width, 0, static_cast<size_t>(width) * 4);
      }
    }
  }

  void note(int status) {
    if (status != W8A8_OK) status_.store(status, std::memory_order_relaxed);
  }

  static constexpr int64_t kSerialScores = 32 << 10;
  const w8a8_plan &p_;
  const int threads_;
  std::vector<Slot> slots_;
  std::vector<Sequence> sequences_;
  std::vector<int64_t> kept_;
  bool packed_ = false;
  int64_t rows_ = 0, tasks_ = 1, block_ = 0, local_per_row_ = 0;
  float *memory_ = nullptr, *local_ = nullptr;
  std::atomic<int> status_{W8A8_OK};
  static thread_local Scratch arena_;
};

thread_local Scratch Run::arena_;

}  // namespace
}  // namespace w8a8

extern "C" int w8a8_run(const w8a8_plan *plan, int32_t threads) {
  try {
    return w8a8::Run(*plan, threads)();
  } catch (const std::bad_alloc &) {
    return W8A8_NO_MEMORY;
  }
}
