// AMX-INT8 (Sapphire Rapids and later): tdpbusd multiplies tiles of unsigned codes by tiles of signed weights.
//
// Linux gives the tile registers only to a process that asks, once; the permission is the whole process's and a forked
// child's too.  Some virtual machines advertise tiles and fault at the first instruction, so one product is tried before
// any is trusted.
#include "tiles.h"

#ifdef W8A8_X86
// older compilers come with assemblers that do not know the instructions
#if defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define W8A8_HAS_AMX 1
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <csetjmp>
#include <csignal>
#include <initializer_list>
#endif

namespace w8a8 {
#ifdef W8A8_HAS_AMX
namespace {

// The instructions by number of register.  Assembly, as the compilers' intrinsics take only literal numbers.
struct Hardware {
  static void configure(const TileConfig &c) { __asm__ volatile("ldtilecfg %0" : : "m"(c)); }
  static void release() { __asm__ volatile("tilerelease"); }
  template <int R>
  static inline void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(R));
  }
  template <int R>
  static inline void load(const void *from, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(R) : "memory");
  }
  template <int R>
  static inline void load_far(const void *from, int64_t stride) {
    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(R) : "memory");
  }
  template <int R>
  static inline void store(void *to, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(R) : "memory");
  }
  template <int Sums, int Codes, int Weights>
  static inline void multiply() {
    __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(Codes), "i"(Weights));
  }
};

using Product = TileProduct<Hardware>;

void configure(int tile_rows, bool one_tile) { Hardware::configure(TileConfig::of(tile_rows, one_tile)); }

bool advertised() {
  if (Cpuid(0, 0).a < 0x1d) return false;
  if (!(Cpuid(1, 0).c >> 27 & 1)) return false;   // xgetbv is not there to be asked
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3) != 3) return false;   // the system does not save the tiles
  const unsigned has = Cpuid(7, 0).d;
  if (!(has >> 24 & 1) || !(has >> 25 & 1)) return false;   // AMX-TILE, AMX-INT8
  const Cpuid palette(0x1d, 1);   // bytes of a row, and tiles and rows
  return (palette.b & 0xffff) >= 64 && palette.b >> 16 >= 8 && (palette.c & 0xffff) >= kTileRows;
}

thread_local sigjmp_buf fault;
thread_local volatile sig_atomic_t probing = 0;
struct sigaction before[2];
const int kFaults[2] = {SIGILL, SIGSEGV};

// A fault of the probe goes back to it; one of anybody else is what it would have been without us.
void on_fault(int number) {
  if (probing) siglongjmp(fault, 1);
  sigaction(number, &before[number == SIGSEGV], nullptr);
  raise(number);
}

// One block of each kind of product, with tiles of 16 rows and of fewer.
bool multiplies() {
  alignas(64) uint8_t left[32 * 128];
  alignas(64) int8_t panels[2 * 2 * kTilePanel];
  alignas(64) int32_t sums[2 * 32 * kPanel];
  for (size_t i = 0; i < sizeof left; ++i) left[i] = static_cast<uint8_t>(i * 37 + i / 128);
  for (size_t i = 0; i < sizeof panels; ++i) panels[i] = static_cast<int8_t>(i * 91 + i / 256);
  for (const int tile_rows : {16, 3})
    for (const int tiles : {1, 2}) {
      const int count = tiles == 1 ? 2 : 1, rows = tiles * tile_rows;
      configure(tile_rows, tiles == 1);
      Product::run({left, 128, tiles, tile_rows, panels, 2 * kTilePanel, count, 2, false, sums, panels});
      Hardware::release();
      for (int p = 0; p < count; ++p)
        for (int r = 0; r < rows; ++r)
          for (int c = 0; c < kPanel; ++c) {
            int32_t sum = 0;
            for (int k = 0; k < 128; ++k)
              sum += left[r * 128 + k] * panels[p * 2 * kTilePanel + k / 4 * kPanelStep + 4 * c + k % 4];
            if (sums[(p * rows + r) * kPanel + c] != sum) return false;
          }
    }
  return true;
}

const char *find_out() {
  if (!advertised()) return "this CPU or this system has no AMX-INT8";
  if (!kAvx512Vnni.usable()) return "AMX without AVX-512 VNNI, which finishes what tiles begin";
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0)
    return errno == ENOSPC ? "the system refuses the tiles: a thread's signal stack is too small for them"
                           : "the system refuses the tiles (arch_prctl)";
  struct sigaction ours = {};
  ours.sa_handler = on_fault;
  ours.sa_flags = SA_NODEFER;
  for (int i = 0; i < 2; ++i) sigaction(kFaults[i], &ours, &before[i]);
  const char *reason = nullptr;
  probing = 1;
  if (sigsetjmp(fault, 1)) reason = "a tile instruction faults here, though the CPU advertises them";
  else if (!multiplies()) reason = "tiles multiply wrongly here";
  probing = 0;
  for (int i = 0; i < 2; ++i) sigaction(kFaults[i], &before[i], nullptr);
  return reason;
}

const char *why_not() {
  static const char *const reason = find_out();
  return reason;
}

double peak(int64_t rounds) {
  configure(kTileRows, false);
  Hardware::zero<0>(), Hardware::zero<1>(), Hardware::zero<2>(), Hardware::zero<3>();
  Hardware::zero<4>(), Hardware::zero<5>(), Hardware::zero<6>(), Hardware::zero<7>();
  for (int64_t n = 0; n < rounds; ++n) {
    Hardware::multiply<0, 4, 6>(), Hardware::multiply<1, 4, 7>();
    Hardware::multiply<2, 5, 6>(), Hardware::multiply<3, 5, 7>();
  }
  Hardware::release();
  return static_cast<double>(rounds) * 4 * kTileRows * 16 * 64 * 2;
}

const Tiles kTiles = {configure, Hardware::release, Product::run};

}  // namespace

const Isa kAmx = {"amx", [] { return why_not() == nullptr; }, Left::kU8, 0, 0, {}, &kAvx512Steps, peak,
                  &kAvx512Floats, why_not, &kTiles};
#else
const Isa kAmx = {"amx", [] { return false; }, Left::kU8, 0, 0, {}, &kAvx512Steps,
                  [](int64_t) { return 0.0; }, [] { return "not compiled in: it takes Linux and GCC 11 or clang 12"; },
                  nullptr};
#endif
}  // namespace w8a8
#endif
