// What this machine can do at best, measured: the two lines that a product can approach and not pass.
#include <algorithm>
#include <chrono>

#include "internal.h"
#include "parallel.h"

namespace w8a8 {
namespace {

double now_s() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

// No prefetch of our own: on Zen 4 the hardware's alone are faster (27 against 16-22 GB/s on one core).
uint64_t read_all(const char *p, int64_t bytes) {
  uint64_t a = 0, b = 0, c = 0, d = 0;
  for (int64_t i = 0; i + 64 <= bytes; i += 64) {
    uint64_t v[8];
    std::memcpy(v, p + i, 64);
    a += v[0] + v[4], b += v[1] + v[5], c += v[2] + v[6], d += v[3] + v[7];
  }
  return a + b + c + d;
}

#ifdef W8A8_X86
W8A8_TARGET_BEGIN("avx2")
uint64_t read_all_avx2(const char *p, int64_t bytes) {
  __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
  for (int64_t i = 0; i + 128 <= bytes; i += 128) {
    const __m256i *q = reinterpret_cast<const __m256i *>(p + i);
    a = _mm256_xor_si256(a, _mm256_loadu_si256(q)), b = _mm256_xor_si256(b, _mm256_loadu_si256(q + 1));
    c = _mm256_xor_si256(c, _mm256_loadu_si256(q + 2)), d = _mm256_xor_si256(d, _mm256_loadu_si256(q + 3));
  }
  a = _mm256_xor_si256(_mm256_xor_si256(a, b), _mm256_xor_si256(c, d));
  return static_cast<uint64_t>(_mm256_extract_epi64(a, 0));
}
W8A8_TARGET_END
#endif

uint64_t read_some(const char *p, int64_t bytes) {
#ifdef W8A8_X86
  if (__builtin_cpu_supports("avx2")) return read_all_avx2(p, bytes);
#endif
  return read_all(p, bytes);
}

}  // namespace
}  // namespace w8a8

using namespace w8a8;

extern "C" double w8a8_peak_ops(double seconds, int32_t threads) {
  struct Run {
    double seconds;
    std::atomic<double> rate{0};
  } run;
  run.seconds = seconds;
  run_on_threads(
      [](void *data) {
        Run &r = *static_cast<Run *>(data);
        const Isa &use = isa();
        double ops = 0, spent;
        const double start = now_s();
        do ops += use.peak(20000);
        while ((spent = now_s() - start) < r.seconds);
        double old = r.rate.load();
        while (!r.rate.compare_exchange_weak(old, old + ops / spent)) {}
      },
      &run, threads > 0 ? threads : default_threads());
  return run.rate.load();
}

extern "C" double w8a8_peak_read(const void *data, int64_t bytes, double seconds, int32_t threads) {
  constexpr int64_t kPiece = 128 << 10;   // as the product reads it: each thread its own run of panels
  const int64_t pieces = bytes / kPiece;
  if (pieces < 1) return 0;
  double best = 0;
  const double start = now_s();
  do {
    const double t = now_s();
    for_each(pieces, threads, [&](int64_t i) {
      const uint64_t sum = read_some(static_cast<const char *>(data) + i * kPiece, kPiece);
      __asm__ volatile("" : : "r"(sum));   // wanted
    });
    best = std::max(best, static_cast<double>(pieces * kPiece) / (now_s() - t));
  } while (now_s() - start < seconds);
  return best;
}
