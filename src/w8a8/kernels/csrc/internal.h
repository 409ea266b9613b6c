// What the files of this directory share.  Nothing here is seen from outside.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "w8a8.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define W8A8_X86 1
#endif
#if defined(__aarch64__)
#define W8A8_ARM 1
// Old clang declares the dot-product intrinsics only where the whole file may use them.
#if !defined(__clang__) || __clang_major__ >= 16 || defined(__ARM_FEATURE_DOTPROD)
#define W8A8_ARM_DOT 1
// Likewise those of the matrix multiplication, which came to GCC with version 10.
#if defined(__clang__) ? __clang_major__ >= 16 || defined(__ARM_FEATURE_MATMUL_INT8) : __GNUC__ >= 10
#define W8A8_ARM_I8MM 1
#endif
#endif
#endif

// Functions between BEGIN and END may use the named instructions; the rest of the file may not.  A whole file compiled
// with -mavx512f would be simpler, but inline functions of the standard library compiled there could be the copy that
// the linker keeps for everyone, and then an old CPU stops with SIGILL.
#define W8A8_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define W8A8_TARGET_BEGIN(isa) \
  W8A8_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define W8A8_TARGET_END W8A8_PRAGMA(clang attribute pop)
#else
#define W8A8_TARGET_BEGIN(isa) W8A8_PRAGMA(GCC push_options) W8A8_PRAGMA(GCC target(isa))
#define W8A8_TARGET_END W8A8_PRAGMA(GCC pop_options)
#endif

namespace w8a8 {

constexpr int kMaxRows = 14;   // the tallest register tile of any instruction set

inline int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return div_up(a, b) * b; }

// How weights lie: [panel of 32 columns][group of k][column][k within the group], zeros beyond N and K.  This is the one
// place where the layout is chosen.  It depends on the architecture and not on the instruction set in use, which can
// change while packed weights live.
//
// kGroup: how many k of one column lie side by side, what the product instruction adds up.  Four bytes are a lane of
// vpdpbusd; smmla wants eight, and sdot reads these as two fours.
// kPad: a panel's K is a multiple of this: 64 bytes are one row of an AMX tile.  Who needs less stops earlier.
constexpr int kPanel = W8A8_PANEL;
#if defined(W8A8_ARM)
constexpr int kGroup = 8, kPad = 8;
#elif defined(W8A8_X86)
constexpr int kGroup = 4, kPad = 64;
#else
constexpr int kGroup = 4, kPad = 4;
#endif
static_assert(kPad % kGroup == 0 && 64 % kPad == 0, "whole groups, and rows of codes have room for round_up(k, 64)");
constexpr int64_t kPanelStep = kPanel * kGroup;                                       // bytes of a panel for one group
inline int64_t panel_steps(int64_t k) { return round_up(k, kPad) / kGroup; }          // groups in a panel
inline int64_t panel_bytes(int64_t k) { return panel_steps(k) * kPanelStep; }

inline size_t dtype_bytes(int dtype) { return dtype == W8A8_F32 ? 4 : 2; }
inline const char *row_of(const void *x, int dtype, int64_t ld, int64_t m) {
  return static_cast<const char *>(x) + m * ld * static_cast<int64_t>(dtype_bytes(dtype));
}

// How the left side lies in memory: which integer the product instruction wants.
enum class Left { kU8, kS8, kS16 };   // code + 128, code, code widened
inline int left_bytes(Left l) { return l == Left::kS16 ? 2 : 1; }
inline int left_offset(Left l) { return l == Left::kU8 ? 128 : 0; }

// What is needed of a row before its codes can be computed.
struct RowRange {
  float lo, hi;        // widened to hold zero; only valid where `absbits` is that of a finite number
  uint32_t absbits;    // the largest bit pattern without the sign: order of magnitude, infinity and NaN in one integer
  bool finite() const { return absbits < 0x7f800000u; }
};

// A grid: how x becomes a code.
struct Grid {
  float scale;
  int32_t zero_point;
  int32_t qmin, qmax;
};

// Where the int32 sums of one tile go.
struct Finish {
  const w8a8_layer *layer;
  const float *sx;       // (M,)
  const int32_t *zx;     // (M,)
  int32_t offset;        // what the left side was shifted by
  int dtype;
  void *y;
  int64_t ldy;
};

// sums[r * kPanel + c] = left[r, :] . panel[:, c] over ksteps groups of k.
// `ahead` is memory the caller will want next: `ahead_lines` (1..8) cache lines of it are prefetched while eight lines of
// the panel are read.
using TileFn = void (*)(const void *left, int64_t ld_bytes, const int8_t *panel, int64_t ksteps, int32_t *sums,
                        const int8_t *ahead, int ahead_lines);

// The prefetch of a tile, spread evenly over its steps: a burst would take all of the core's miss buffers at once.  A step
// is four values of k, 128 bytes of the panel.  Where a tile makes several passes over its panel, each pass fetches its
// part.
constexpr int64_t kAheadStep = kPanel * 4;
class Ahead {
 public:
  Ahead(const int8_t *from, int lines, int64_t steps, int passes = 1, int pass = 0) : twice_(lines >= 8 && passes == 1) {
    int64_t period = 1;   // steps from one line to the next, a power of two
    while (period * 2 * lines <= 4 * passes) period *= 2;
    mask_ = period - 1;
    at_ = from + pass * (steps / period) * 64;
  }
  inline __attribute__((always_inline)) void step(int64_t s) {
    if (twice_) {
      __builtin_prefetch(at_, 0, 2);
      __builtin_prefetch(at_ + 64, 0, 2);
      at_ += 128;
    } else if ((s & mask_) == 0) {
      __builtin_prefetch(at_, 0, 2);
      at_ += 64;
    }
  }

 private:
  const int8_t *at_;
  int64_t mask_;
  bool twice_;
};

// Matrix tiles, which multiply blocks of rows; tiles.h.
struct TileBlock;
struct Tiles {
  void (*configure)(int tile_rows, bool one_tile);   // of the calling thread, before run
  void (*release)();                                 // when the thread has no more: others configure it too
  void (*run)(const TileBlock &block);
};

#if defined(W8A8_X86)
// What the compilers' __builtin_cpu_supports does not know by name (f16c in clang 14, avxvnni in GCC 12) is asked of the
// CPU directly; that the operating system saves the ymm registers is part of "avx2".
struct Cpuid {
  unsigned a, b, c, d;
  Cpuid(unsigned leaf, unsigned subleaf) : a(leaf), b(0), c(subleaf), d(0) {
    __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  }
};
#endif

// Where a head begins of an operand of attention that lies `at` (w8a8.h).
inline const float *head_of(const float *data, const int64_t *at, int64_t b, int64_t h) { return data + b * at[0] + h * at[1]; }
constexpr float kHidden = -1e30f;        // what is added to a score that is to have no weight, in any model's mask
// One element of a row of a mask, as what is added to a score.
float mask_at(const w8a8_attention &t, const void *row, int64_t key);
const void *mask_row(const w8a8_attention &t, int64_t batch, int64_t head, int64_t query);
// How many keys have to be looked at: those behind the last one that any query sees have no weight.
int64_t visible_keys(const w8a8_attention &t, int64_t batch, int64_t head);
// What is added to the scores of a query, (room): minus infinity where it sees no key.
void write_bias(const w8a8_attention &t, int64_t batch, int64_t head, int64_t query, int64_t keys, int64_t room, float *bias);
constexpr int kMostQueries = 24;         // that any instruction set takes at once
// Floats of scratch memory that `attend` takes.
inline int64_t attention_scratch(int64_t keys, int64_t dims) {
  const int64_t room = round_up(keys, 16), whole = round_up(dims, 16);
  return room * (1 + dims + kMostQueries) + whole * kMostQueries + keys * whole;
}

// By rows: Hadamard matrices of 2, 4, 8 and 16 rows and columns as often as they fit into sixteen along the diagonal.
struct Hadamard {
  float at[5][16][16];
};
constexpr Hadamard hadamard() {
  Hadamard found{};
  for (int size = 0; size < 5; ++size)
    for (int row = 0; row < 16; ++row)
      for (int column = 0; column < 16; ++column) {
        bool odd = false;
        for (int both = row & column & ((1 << size) - 1); both; both &= both - 1) odd = !odd;
        if (row >> size == column >> size) found.at[size][row][column] = odd ? -1.0f : 1.0f;
      }
  return found;
}

// What `best_steps` chooses from.
constexpr int kMostSteps = 127, kSteps = 16;

// A piece of the past in int8, and the queries that look at it.
constexpr int kCachedTile = 16;          // keys that lie side by side
constexpr int kPiece = 512;              // places in a piece: what is added up in which order follows from it
struct Piece {
  const int8_t *keys, *values;           // of the first place
  const float *key_scale, *value_scale;  // (places)
  int64_t places;                        // a multiple of 16
  int64_t pairs, value_room;             // of a key; bytes of a value
  int rows;                              // queries
  const int16_t *q;                      // (rows, 2 * pairs): codes of 16 bits
  const float *factor;                   // (rows): the scale of the codes, times that of the scores
  const float *const *bias;              // (rows) of (places): added to the scores; minus infinity hides a key
  float softcap;                         // or 0
};
// Keys and values as they came, of the same piece; the scales and codes of `Piece` are not read then.
struct Rows {
  const void *keys, *values;             // of the first place
  int64_t keys_at, values_at;            // from one to the next, in elements
  int64_t key_dims, value_dims;
  int64_t first, last;                   // of the places, which are seen by anybody: no other is read
  int dtype;
  const float *q;                        // (rows, key_dims rounded up to 16), zeros at the end
};
// What a piece gives a query: the greatest score, the sum of weights less exp of it, and the values so weighed.
struct Part {
  float top, whole;
};

// What lies between products; isa/floats.h and isa/cached.h.  All give the same bits.
struct Floats {
  void (*activate)(int kind, float *y, int64_t n);
  // What `w8a8_norm` says of one row of k: a sum is written where there is something to add, and the norm.
  void (*norm)(const w8a8_norm &row, const float *x, int64_t k);
  void (*attend)(const w8a8_attention &t, int64_t batch, int64_t head, float *scratch);
  // Each `block` of the elements of x, a power of two, times the Hadamard matrix of that size, which is not normalised.  x has
  // `room`, a multiple of 16, with zeros behind its last block.
  void (*rotate)(float *x, int64_t room, int64_t block);
  // By which of 127, 126, .. 112 the largest magnitude of x is divided for the scale that leaves the least of squared errors.
  float (*best_steps)(const float *x, int64_t k, float top);
  // 2 * pairs codes of k floats, of which the vectors read `round_up(k, 16)`; returns the scale, NaN for a row that is not finite.
  float (*query)(const float *x, int64_t k, int64_t pairs, int16_t *codes);
  // scores: (rows, kPiece) of scratch; sums: (rows, value_room)
  void (*piece)(const Piece &t, float *scores, Part *part, float *sums);
  // Likewise over keys and values as they came.  tile: scratch for 16 rows of the longer of a key and a value.
  void (*rows)(const Piece &t, const Rows &r, float *tile, float *scores, Part *part, float *sums);
  // The parts of one query, `stride` parts and sums apart from piece to piece -> out, (value_room).  sink: or minus infinity.
  void (*merge)(const Part *part, const float *sums, int64_t pieces, int64_t stride, int64_t value_room, float sink, float *out);
};
extern const Floats kPortableFloats;
#ifdef W8A8_X86
extern const Floats kAvx2Floats, kAvx512Floats;
#endif

// What is done to rows before and behind the product.  Some instruction sets share it.
struct RowSteps {
  RowRange (*range[3])(const void *row, int64_t k, bool asym);   // by w8a8_dtype
  // Writes round_up(k, kGroup) codes at least, at most round_up(k, 64).
  void (*codes[3])(const void *row, int64_t k, const Grid &grid, Left left, int offset, void *out);   // likewise
  // Columns [n0, n0 + cols) of rows [m0, m0 + rows); sums has row stride ld.
  void (*finish)(const Finish &f, const int32_t *sums, int64_t ld, int64_t m0, int rows, int64_t n0, int cols);
};
extern const RowSteps kPortableSteps, kAvx2Steps, kAvx512Steps, kNeonSteps;   // those of this architecture

// A product that is exact for rows of bytes of which nearly all pairs of codes are small, and faster than that of the rows
// widened to 16 bits.
struct Pairs {
  TileFn tile[kMaxRows + 1];   // instead of the instruction set's
  int stream_rows;
  // A row has room for twice its codes, `steps` groups of bytes.  First of all rows: the most steps that this one takes more
  // than others, or -1 where there is no room for them.  Then, of all or none, to what `tile` reads, or to 16 bits, in place;
  // either has no zero point any more.
  int64_t (*count)(void *row, int64_t steps, int32_t zero_point);
  void (*split)(void *row, int64_t steps);
  void (*widen)(void *row, int64_t steps);
};

struct Isa {
  const char *name;
  bool (*usable)();
  Left left;
  int max_rows;
  int stream_rows;             // up to so many rows a tile reads its panel once, from front to back
  TileFn tile[kMaxRows + 1];   // by number of rows
  const RowSteps *steps;
  double (*peak)(int64_t rounds);   // runs `rounds` rounds of the product instruction, returns operations done
  const Floats *floats;
  const char *(*why_not)() = nullptr;   // where there is more to say than that this CPU has not got it
  const Tiles *tiles = nullptr;         // instead of `tile`
  const Pairs *pairs = nullptr;         // tried before `tile`, for which `left` is kS16
};

const Isa &isa();   // the one that is forced, or the best
// What runs a product: the one that is forced, or by the table in dispatch.cpp.  It is counted as run.
const Isa &isa_for(int64_t m, int64_t k);

extern const Isa kPortable;
#ifdef W8A8_X86
extern const Isa kAvx2, kAvxVnni, kAvx512Vnni256, kAvx512Vnni, kAmx;
extern const Pairs kAvx2Pairs;
#endif
#if defined(W8A8_TILE_MODEL) && defined(W8A8_X86)
extern const Isa kAmxModel;   // tests/native/tile_model.cpp
#endif
#ifdef W8A8_ARM_DOT
extern const Isa kNeonDot;
void neon_tile_one(const void *left, int64_t ld_bytes, const int8_t *panel, int64_t ksteps, int32_t *sums,
                   const int8_t *ahead, int ahead_lines);
#endif
#ifdef W8A8_ARM_I8MM
extern const Isa kNeonI8mm;
#endif

// Rounding x * (1 / scale) instead of x / scale, with the same codes.
//
// Both are within 3 * 2**-24 of the true quotient, relatively, as long as the reciprocal is normal: one rounding of the
// division, two of the product.  Up to 257, where the widest grid with any zero point ends, they are no more than
// 257 * (3 + 1) * 2**-24 < 2**-13.9 apart.  They round to different integers only if a half lies between them, so a product
// that is at most 1/2 - 2**-13 from an integer rounds as the division does.  Where one is further, what stands beside it is
// divided too.  A quotient that underflows is zero both ways.
//
// The clamp comes first, to the ends of the grid less the zero point: they are integers, so rounding does not cross them.
struct Reciprocal {
  static constexpr float kSure = 0.5f - 0x1p-13f;
  float reciprocal, low, high;
  bool is_safe;
  explicit Reciprocal(const Grid &g)
      : reciprocal(1.0f / g.scale),
        low(static_cast<float>(g.qmin - g.zero_point)),
        high(static_cast<float>(g.qmax - g.zero_point)),
        is_safe(g.scale > 1e-30f && g.scale < 1e30f) {}
};

// Quotients beyond any grid are brought into the range of the conversion to int32; the clamp to the grid follows.
constexpr float kBound = 512.0f;

// --- scalar conversions -------------------------------------------------------------------------------------------

inline float bits_float(uint32_t b) {
  float f;
  std::memcpy(&f, &b, 4);
  return f;
}
inline uint32_t float_bits(float f) {
  uint32_t b;
  std::memcpy(&b, &f, 4);
  return b;
}

inline float from_bf16(uint16_t h) { return bits_float(static_cast<uint32_t>(h) << 16); }
inline uint16_t to_bf16(float f) {   // round to nearest even; one NaN
  uint32_t b = float_bits(f);
  if ((b & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
}

inline float from_f16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, exp = (h >> 10) & 31u, man = h & 0x3ffu;
  if (exp == 31) return bits_float(sign | 0x7f800000u | (man << 13));
  if (exp == 0) {   // subnormal: man * 2**-24, exact
    const float v = static_cast<float>(man) * 0x1p-24f;
    return bits_float(float_bits(v) | sign);
  }
  return bits_float(sign | ((exp + 112u) << 23) | (man << 13));
}
inline uint16_t to_f16(float f) {   // round to nearest even; subnormals kept; one NaN
  const uint32_t b = float_bits(f), sign = (b >> 16) & 0x8000u, a = b & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (a >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);   // 65520 and more round to infinity
  if (a < 0x38800000u) {   // below 2**-14: adding 0.5 leaves the 2**-24 grid in the low bits, rounded by the adder
    const uint32_t r = float_bits(bits_float(a) + 0.5f) - 0x3f000000u;
    return static_cast<uint16_t>(sign | r);
  }
  const uint32_t r = a + 0xfffu + ((a >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((r - 0x38000000u) >> 13));
}

inline float load_one(const void *row, int dtype, int64_t i) {
  if (dtype == W8A8_F32) return static_cast<const float *>(row)[i];
  const uint16_t h = static_cast<const uint16_t *>(row)[i];
  return dtype == W8A8_BF16 ? from_bf16(h) : from_f16(h);
}
inline void store_one(void *row, int dtype, int64_t i, float v) {
  if (dtype == W8A8_F32) static_cast<float *>(row)[i] = v;
  else static_cast<uint16_t *>(row)[i] = dtype == W8A8_BF16 ? to_bf16(v) : to_f16(v);
}

// The contract holds in the default floating-point mode; a caller may have asked for flushed subnormals
// (torch.set_flush_denormal) or another rounding.  Costs some ten nanoseconds per thread and call.
class DefaultFloat {
 public:
#if defined(W8A8_X86)
  DefaultFloat() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultFloat() { _mm_setcsr(saved_); }
 private:
  unsigned saved_;
#elif defined(W8A8_ARM)
  DefaultFloat() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    __asm__ volatile("msr fpcr, %0" ::"r"(uint64_t{0}));
  }
  ~DefaultFloat() { __asm__ volatile("msr fpcr, %0" ::"r"(saved_)); }
 private:
  uint64_t saved_;
#endif
};

}  // namespace w8a8
