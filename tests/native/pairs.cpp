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
  std::vector<int> codes;   // less the zero point
  int64_t steps;
  int zero_point;
  alignas(64) char memory[4096] = {};

  Row(const std::vector<int8_t> &given, int zero)
      : steps(div_up(static_cast<int64_t>(given.size()), kGroup)), zero_point(zero) {
    std::copy(given.begin(), given.end(), reinterpret_cast<int8_t *>(memory));
    for (const int8_t code : given) codes.push_back(code - zero);
  }
  int64_t count(const Pairs &pairs) { return pairs.count(memory, steps, zero_point); }
  bool widens(const Pairs &pairs) const {
    Row wide = *this;
    pairs.widen(wide.memory, steps);
    for (size_t i = 0; i < codes.size(); ++i)
      if (reinterpret_cast<const int16_t *>(wide.memory)[i] != codes[i]) return false;
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
  for (const int zero : {0, -128, 127, 5})
    for (int a = -128; a < 128; a += 3)
      for (int b = -128; b < 128; b += 6) {
        std::vector<Row> rows;
        for (int other = b; other < b + 6; ++other) {
          const int8_t first = static_cast<int8_t>(a), second = static_cast<int8_t>(std::min(other, 127));
          std::vector<int8_t> codes(64, static_cast<int8_t>(zero));   // a row with room for six rests
          codes[20] = codes[63] = first, codes[21] = codes[62] = second;
          rows.emplace_back(codes, zero);
          const int x = first - zero, y = second - zero;
          const bool safe = std::max(x, 0) + std::max(y, 0) <= 127 && std::min(x, 0) + std::min(y, 0) >= -128;
          const bool beyond = std::max(x, y) > 127 || std::min(x, y) < -128;
          ok = ok && rows.back().count(pairs) == (safe ? 0 : beyond ? 6 : 2);
        }
        for (Row &row : rows) {
          ok = ok && row.widens(pairs);
          pairs.split(row.memory, row.steps);
        }
        ok = ok && exact(pairs, rows, panel);
      }
  // as many groups as there is room for, and one more
  for (int64_t many : {6, 7}) {
    std::vector<int8_t> codes(64);
    for (size_t i = 0; i < static_cast<size_t>(4 * many); ++i) codes[i] = 127;
    Row row(codes, 0);
    ok = ok && row.count(pairs) == (many == 6 ? 6 : -1) && row.widens(pairs);
    if (many == 7) continue;
    pairs.split(row.memory, row.steps);
    ok = ok && exact(pairs, {row}, panel);
  }
  if (!ok) std::puts("FAILED pairs");
  return ok;
}
#else
bool paired() { return true; }
#endif
