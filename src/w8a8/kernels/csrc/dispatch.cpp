// Which instruction set runs: by a table, or the one that was asked for.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "internal.h"

namespace w8a8 {
namespace {

// Worst first.
const Isa *const kAll[] = {
    &kPortable,
#ifdef W8A8_X86
    &kAvx2,
    &kAvxVnni,
    &kAvx512Vnni256,   // as AVX-VNNI, in AVX-512's encoding: only where asked for, it loses to the full width
    &kAvx512Vnni,
    &kAmx,
#endif
#ifdef W8A8_ARM_DOT
    &kNeonDot,
#endif
#ifdef W8A8_ARM_I8MM
    &kNeonI8mm,
#endif
#if defined(W8A8_TILE_MODEL) && defined(W8A8_X86)
    &kAmxModel,
#endif
};
constexpr int kCount = sizeof kAll / sizeof kAll[0];

// What runs a product where nothing was asked for: the first line whose instruction set this CPU has and whose least
// sizes the product reaches.  The whole choice is this table; docs/log.md has what it rests on.
struct Choice {
  const Isa *isa;
  int64_t rows, k;   // at least
};
constexpr Choice kChoices[] = {
#ifdef W8A8_X86
    {&kAmx, 4, 64},   // up to three rows the weights' way from memory is all that counts, and tiles gain nothing
    {&kAvx512Vnni, 1, 1},
    {&kAvxVnni, 1, 1},
    {&kAvx2, 1, 1},
#endif
#ifdef W8A8_ARM_I8MM
    {&kNeonI8mm, 1, 1},
#endif
#ifdef W8A8_ARM_DOT
    {&kNeonDot, 1, 1},
#endif
    {&kPortable, 1, 1},
};
constexpr int kLines = sizeof kChoices / sizeof kChoices[0];

// The lines of this CPU, down to the first that takes everything.
struct Choices {
  Choice line[kLines];
  int count = 0;
  Choices() {
    for (const Choice &c : kChoices) {
      if (!c.isa->usable()) continue;
      line[count++] = c;
      if (c.rows <= 1 && c.k <= 1) break;
    }
  }
};

const Choices &choices() {
  static const Choices found;
  return found;
}

std::atomic<uint64_t> runs[kCount];

int index_of(const Isa *isa) {
  int i = 0;
  while (kAll[i] != isa) ++i;
  return i;
}

const Isa *find(const char *name) {
  for (const Isa *i : kAll)
    if (std::strcmp(i->name, name) == 0) return i->usable() ? i : nullptr;
  return nullptr;
}

// What was asked for, or null.
std::atomic<const Isa *> &forced() {
  static std::atomic<const Isa *> f{[]() -> const Isa * {
    const char *name = std::getenv("W8A8_ISA");
    return name && *name ? find(name) : nullptr;
  }()};
  return f;
}

const Isa &chosen(int64_t m, int64_t k) {
  if (const Isa *asked = forced().load(std::memory_order_acquire)) return *asked;
  const Choices &c = choices();
  for (int i = 0; i + 1 < c.count; ++i)
    if (m >= c.line[i].rows && k >= c.line[i].k) return *c.line[i].isa;
  return *c.line[c.count - 1].isa;
}

}  // namespace

const Isa &isa() {
  const Isa *asked = forced().load(std::memory_order_acquire);
  return asked ? *asked : *choices().line[0].isa;
}

const Isa &isa_for(int64_t m, int64_t k) {
  const Isa &use = chosen(m, k);
  runs[index_of(&use)].fetch_add(1, std::memory_order_relaxed);
  return use;
}

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

const char *w8a8_isa_why_not(int i) {
  if (i < 0 || i >= kCount || kAll[i]->usable()) return nullptr;
  return kAll[i]->why_not ? kAll[i]->why_not() : "this CPU does not have it";
}

uint64_t w8a8_isa_runs(int i) { return i < 0 || i >= kCount ? 0 : runs[i].load(std::memory_order_relaxed); }

const char *w8a8_choice_at(int i, int64_t *rows, int64_t *k) {
  const Choices &c = choices();
  if (i < 0 || i >= c.count) return nullptr;
  *rows = c.line[i].rows, *k = c.line[i].k;
  return c.line[i].isa->name;
}

int w8a8_isa_use(const char *name) {
  const Isa *i = name && *name ? find(name) : nullptr;
  if (!i && name && *name) return W8A8_BAD_ARGUMENT;
  forced().store(i, std::memory_order_release);
  return W8A8_OK;
}

int w8a8_abi(void) { return W8A8_ABI; }

}  // extern "C"
