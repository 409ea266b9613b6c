// Which instruction set runs: the best this CPU has, or the one that was asked for.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "internal.h"

namespace w8a8 {
namespace {

// Worst first.  The whole choice is this table.
const Isa *const kAll[] = {
    &kPortable,
#ifdef W8A8_X86
    &kAvx2,
    &kAvxVnni,
    &kAvx512Vnni256,   // as AVX-VNNI, in AVX-512's encoding: only where asked for, it loses to the full width
    &kAvx512Vnni,
#endif
#ifdef W8A8_ARM_DOT
    &kNeonDot,
#endif
};
constexpr int kCount = sizeof kAll / sizeof kAll[0];

const Isa *find(const char *name) {
  for (const Isa *i : kAll)
    if (std::strcmp(i->name, name) == 0) return i->usable() ? i : nullptr;
  return nullptr;
}

const Isa *best() {
  for (int i = kCount - 1; i > 0; --i)
    if (kAll[i]->usable()) return kAll[i];
  return &kPortable;
}

const Isa *from_environment() {
  const char *name = std::getenv("W8A8_ISA");
  const Isa *asked = name && *name ? find(name) : nullptr;
  return asked ? asked : best();
}

std::atomic<const Isa *> &current() {
  static std::atomic<const Isa *> c{from_environment()};
  return c;
}

}  // namespace

const Isa &isa() { return *current().load(std::memory_order_acquire); }

}  // namespace w8a8

using namespace w8a8;

extern "C" {

const char *w8a8_isa_name(void) { return isa().name; }
int w8a8_isa_count(void) { return kCount; }

const char *w8a8_isa_at(int i, int *usable) {
  if (i < 0 || i >= kCount) return nullptr;
  if (usable) *usable = kAll[i]->usable();
  return kAll[i]->name;
}

int w8a8_isa_use(const char *name) {
  const Isa *i = name && *name ? find(name) : best();
  if (!i) return W8A8_BAD_ARGUMENT;
  current().store(i, std::memory_order_release);
  return W8A8_OK;
}

int w8a8_isa_use_env(void) {
  const char *name = std::getenv("W8A8_ISA");
  return w8a8_isa_use(name);
}

int w8a8_abi(void) { return W8A8_ABI; }

}  // extern "C"
