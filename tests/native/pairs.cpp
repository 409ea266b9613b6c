// Products of pairs of bytes are exact for every pair of codes and the weights that bring them furthest, and a row that is
// not multiplied so is widened to what it was.
#include <algorithm>
#include <cstdio>
#include <random>
#include <vector>

#include "internal.h"

#ifdef W8A8_X86
namespace w8a8 {
namespace {

struct Row {
  std::vector<int8_t> codes;
  int64_t steps;
  alignas(64) char memory[4096] = {};

  explicit Row(std::vector<int8_t> given) : codes(std::move(given)), steps(div_up(static_cast<int64_t>(codes.size()), kGroup)) {
    std::copy(codes.begin(), codes.end(), reinterpret_cast<int8_t *>(memory));
  }
  bool widens(const Pairs &pairs) {
    pairs.widen(memory, steps);
    for (size_t i = 0; i < codes.size(); ++i)
      if (reinterpret_cast<const int16_t *>(memory)[i] != codes[i]) return false;
    return true;
  }
};

// Rows of the same length, in every height of tile that they fill, by a panel of weights.
bool exact(const Pairs &pairs, const std::vector<Row> &rows, const std::vector<int8_t> &panel) {
  const int64_t steps = rows[0].steps;
  alignas(64) int32_t sums[kMaxRows * kPanel];
  std::vector<char> left(rows.size() * sizeof rows[0].memory + 64);
  char *at = left.data() + (64 - reinterpret_cast<uintptr_t>(left.data()) % 64);
  for (size_t r = 0; r < rows.size(); ++r) std::copy_n(rows[r].memory, sizeof rows[r].memory, at + r * sizeof rows[r].memory);
  for (size_t height = 1; height <= rows.size(); ++height) {
    pairs.tile[height](at, sizeof rows[0].memory, panel.data(), steps, sums, panel.data(), 1);
    for (size_t r = 0; r < height; ++r)
      for (int c = 0; c < kPanel; ++c) {
        int32_t sum = 0;
        for (size_t i = 0; i < rows[r].codes.size(); ++i)
          sum += rows[r].codes[i] * panel[i / kGroup * kPanelStep + static_cast<size_t>(kGroup * c) + i % kGroup];
        if (sums[r * kPanel + static_cast<size_t>(c)] != sum) return false;
      }
  }
  return true;
}

}  // namespace
}  // namespace w8a8

bool paired() {
  using namespace w8a8;
  const Pairs &pairs = kAvx2Pairs;
  if (!kAvx2.usable()) return true;
  std::mt19937_64 random(0);
  // the ends of the weights, and any others, in each place of a group
  const int ends[] = {-128, 127, 0, -1};
  std::vector<int8_t> panel(static_cast<size_t>(panel_bytes(64)));
  for (size_t i = 0; i < panel.size(); ++i) {
    const size_t column = i % kPanelStep / kGroup, place = i % kGroup;
    panel[i] = static_cast<int8_t>(column < 16 ? ends[place % 2 ? column / 4 : column % 4] : static_cast<int>(random() % 256) - 128);
  }
  bool ok = true;
  for (int a = -128; a < 128; ++a)
    for (int b = -128; b < 128; b += 6) {
      std::vector<Row> rows;
      for (int other = b; other < b + 6; ++other) {
        const int8_t first = static_cast<int8_t>(a), second = static_cast<int8_t>(std::min(other, 127));
        rows.emplace_back(std::vector<int8_t>{first, second, 0, 1, 2, -3, second, first});
        const bool safe = std::max(a, 0) + std::max<int>(second, 0) <= 128 && std::min(a, 0) + std::min<int>(second, 0) >= -128;
        ok = ok && pairs.pair(rows.back().memory, rows.back().steps) == (safe ? 0 : 2);
      }
      ok = ok && exact(pairs, rows, panel);
      for (Row &row : rows) ok = ok && row.widens(pairs);
    }
  // as many groups as a row has room for, and one more
  for (int64_t many : {7, 8}) {
    std::vector<int8_t> codes(64);
    for (size_t i = 0; i < static_cast<size_t>(4 * many); ++i) codes[i] = 127;
    Row row(codes);
    ok = ok && pairs.pair(row.memory, row.steps) == (many == 7 ? 7 : -1);
    ok = ok && (many == 8 || exact(pairs, {row}, panel)) && row.widens(pairs);
  }
  if (!ok) std::puts("FAILED pairs");
  return ok;
}
#else
bool paired() { return true; }
#endif
