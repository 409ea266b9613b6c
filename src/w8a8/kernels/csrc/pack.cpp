// Weights from the file's layout to panels, and their column sums.
//
// A panel is 32 output columns by all of K: [K / kGroup][32][kGroup] (internal.h).  A group of consecutive k of a column
// is what one product instruction adds up; 32 of them are whole cache lines, and a panel is read from beginning to end.
#include "parallel.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

using namespace w8a8;

extern "C" int64_t w8a8_packed_bytes(int64_t n, int64_t k) {
  return n < 0 || k < 0 ? 0 : div_up(n, kPanel) * panel_bytes(k);
}

extern "C" int32_t w8a8_panel_group(void) { return kGroup; }

extern "C" int w8a8_pack(const int8_t *w, int64_t ldw, int64_t n, int64_t k, int8_t *packed, int32_t *colsum,
                         int32_t threads) {
  if (n < 0 || k < 0 || (n > 1 && ldw < k)) return W8A8_BAD_ARGUMENT;
  constexpr int64_t kLine = 64;
  const int64_t bytes_of_panel = panel_bytes(k);
  for_each(div_up(n, kPanel), threads, [=](int64_t p) {
    int8_t *panel = packed + p * bytes_of_panel;
    const int columns = static_cast<int>(std::min<int64_t>(kPanel, n - p * kPanel));
    const int8_t *rows = w + p * kPanel * ldw;
    if (k > 0 && (columns < kPanel || k % kPad)) std::memset(panel, 0, static_cast<size_t>(bytes_of_panel));
    int64_t sums[kPanel] = {};
    // a cache line of each row at a time, so that the lines that are written are whole before they leave the first cache
    for (int64_t begin = 0; begin < k; begin += kLine) {
      const int64_t bytes = std::min<int64_t>(kLine, k - begin), groups = bytes / kGroup;
      for (int c = 0; c < columns; ++c) {
        const int8_t *from = rows + c * ldw + begin;
        int8_t *to = panel + begin / kGroup * kPanelStep + kGroup * c;
        for (int64_t s = 0; s < groups; ++s) std::memcpy(to + s * kPanelStep, from + kGroup * s, kGroup);
        if (bytes % kGroup)
          std::memcpy(to + groups * kPanelStep, from + kGroup * groups, static_cast<size_t>(bytes % kGroup));
        int32_t sum = 0;
        for (int64_t i = 0; i < bytes; ++i) sum += from[i];
        sums[c] += sum;
      }
    }
    for (int c = 0; c < columns; ++c) colsum[p * kPanel + c] = static_cast<int32_t>(sums[c]);
  });
  return W8A8_OK;
}

extern "C" int w8a8_advise_huge(void *data, int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kPage = 4096;   // only whole pages of the caller's own may be named
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data), end = begin + static_cast<uintptr_t>(bytes);
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (bytes <= 0 || last <= first) return W8A8_BAD_ARGUMENT;
  return madvise(reinterpret_cast<void *>(first), last - first, MADV_HUGEPAGE) == 0 ? W8A8_OK : W8A8_BAD_ARGUMENT;
#else
  (void)data, (void)bytes;
  return W8A8_BAD_ARGUMENT;
#endif
}
