// Memory that is kept from call to call, one per calling thread, so that two Python threads never share any.
#pragma once

#include <cstdint>
#include <cstdlib>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace w8a8 {

class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  Scratch() = default;
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;

  // At least `bytes`, aligned to a cache line; the contents are lost.  Null where there is no memory.
  char *get(int64_t bytes) {
    asked_ = bytes > asked_ ? bytes : asked_;
    if (bytes <= size_) return data_;
    std::free(data_);
    data_ = nullptr, size_ = 0;
    const bool huge = bytes >= 2 * kHugePage;
    const int64_t unit = huge ? kHugePage : 4096;
    const int64_t rounded = (bytes + unit - 1) / unit * unit;
    void *p = nullptr;
    if (posix_memalign(&p, static_cast<size_t>(unit), static_cast<size_t>(rounded)) != 0) return nullptr;
#ifdef __linux__
    if (huge) madvise(p, static_cast<size_t>(rounded), MADV_HUGEPAGE);   // a wish; its refusal changes nothing
#endif
    data_ = static_cast<char *>(p), size_ = rounded;
    return data_;
  }

  // Called when a call is done.  One very long prompt should not hold its memory for ever; but from the second call in a
  // row that needs as much, it is kept until one needs less: new pages cost as much as a tenth of such a call.
  void shrink() {
    const bool again = large_;
    large_ = asked_ > kKept, asked_ = 0;
    if (size_ <= kKept || (large_ && again)) return;
    std::free(data_);
    data_ = nullptr, size_ = 0;
  }

 private:
  static constexpr int64_t kHugePage = int64_t{1} << 21, kKept = int64_t{32} << 20;
  char *data_ = nullptr;
  int64_t size_ = 0, asked_ = 0;   // asked_: since the last `shrink`
  bool large_ = false;             // the call before that
};

}  // namespace w8a8
