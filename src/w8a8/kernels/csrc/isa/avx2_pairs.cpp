// AVX2 without VNNI, at the full rate of vpmaddubsw, and exactly.
//
// vpmaddubsw multiplies unsigned by signed bytes and adds two products in 16 bits, where they saturate.  Here the unsigned
// ones are weights + 128 and the signed ones codes less their zero point.  A pair of codes is safe whatever the weights are
// if its positive ones sum up to 128 at most, and its negative ones: 128 * 255 = 32640, and what has the other sign only
// helps.  Of most rows nearly all pairs are: the largest code of a row is 127, and two like it have to be neighbours.  Of the
// others as much as is safe stays where it stands, and what is left goes into a list behind the codes, with the group that it
// belongs to: steps more for that row alone.  128 times the sum of a row's codes is what the weights' offset brought; the sums
// begin below zero by as much.  Where there are many, all rows are widened to 16 bits: isa/avx2.cpp.
#include <algorithm>

#include "internal.h"

#ifdef W8A8_X86
namespace w8a8 {
namespace {

// A step of one row alone.
struct Rest {
  int32_t group;
  int8_t codes[kGroup];
};
// Behind the codes of a row.
struct Behind {
  int32_t begin;        // of its sums
  int32_t count;        // of rests
  int32_t zero_point;   // what the codes are to be less
  int32_t most;         // rests that there may be
  Rest rest[1];
};
constexpr int64_t kHead = 16;

inline int64_t room_of(int64_t steps) { return round_up(steps * kGroup, 64); }
inline Behind *behind(void *row, int64_t steps) {
  return reinterpret_cast<Behind *>(static_cast<char *>(row) + room_of(steps));
}
inline const Behind *behind(const void *row, int64_t steps) {
  return reinterpret_cast<const Behind *>(static_cast<const char *>(row) + room_of(steps));
}

alignas(32) constexpr int16_t kOnes[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
alignas(32) constexpr uint32_t kSigns[8] = {0x80808080u, 0x80808080u, 0x80808080u, 0x80808080u,
                                            0x80808080u, 0x80808080u, 0x80808080u, 0x80808080u};

// Takes from a group what one step may take, and returns whether there is more.
bool take(int *left, int8_t *step) {
  bool more = false;
  for (int i = 0; i < kGroup; i += 2) {
    const int a = left[i], b = left[i + 1];
    const bool safe = std::max(a, 0) + std::max(b, 0) <= 127 && std::min(a, 0) + std::min(b, 0) >= -128;
    for (int j = i; j < i + 2; ++j) {
      step[j] = static_cast<int8_t>(safe ? left[j] : std::clamp(left[j], -64, 64));
      left[j] -= step[j];
      more = more || left[j];
    }
  }
  return more;
}

W8A8_TARGET_BEGIN("avx2,fma,f16c")

inline __m256i wide16(const int8_t *codes, __m256i zero_point) {
  const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i *>(codes));
  return _mm256_sub_epi16(_mm256_cvtepi8_epi16(narrow), zero_point);
}

// Of 16 codes: a bit for each group in which any bit is set.
inline unsigned groups_of(__m256i bits) {
  const __m256i none = _mm256_cmpeq_epi64(bits, _mm256_setzero_si256());
  return ~static_cast<unsigned>(_mm256_movemask_pd(_mm256_castsi256_pd(none))) & 15;
}

// Likewise for each group with a pair that is not safe.
inline unsigned unsafe(__m256i codes) {
  const __m256i zero = _mm256_setzero_si256(), ones = _mm256_set1_epi16(1);
  const __m256i above = _mm256_madd_epi16(_mm256_max_epi16(codes, zero), ones);
  const __m256i below = _mm256_madd_epi16(_mm256_min_epi16(codes, zero), ones);
  return groups_of(_mm256_or_si256(_mm256_cmpgt_epi32(above, _mm256_set1_epi32(127)),
                                   _mm256_cmpgt_epi32(_mm256_set1_epi32(-128), below)));
}

// And for each with a code beyond a byte.
inline unsigned beyond(__m256i codes) {
  return groups_of(_mm256_or_si256(_mm256_cmpgt_epi16(codes, _mm256_set1_epi16(127)),
                                   _mm256_cmpgt_epi16(_mm256_set1_epi16(-128), codes)));
}

int64_t count(void *row, int64_t steps, int32_t zero_point) {
  int8_t *codes = static_cast<int8_t *>(row);
  const int64_t bytes = steps * kGroup, room = room_of(steps);
  std::memset(codes + bytes, zero_point, static_cast<size_t>(room - bytes));
  const __m256i less = _mm256_set1_epi16(static_cast<int16_t>(zero_point));
  __m256i sums = _mm256_setzero_si256();
  int32_t most = 0;
  for (int64_t i = 0; i < room; i += 16) {
    const __m256i wide = wide16(codes + i, less);
    // 64 of a code stay, what is left of a byte is one rest, and of 255 three
    most += __builtin_popcount(unsafe(wide)) + 2 * __builtin_popcount(beyond(wide));
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(wide, _mm256_set1_epi16(1)));
  }
  alignas(32) int32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i *>(lanes), sums);
  int32_t sum = 0;
  for (const int32_t lane : lanes) sum += lane;
  *behind(row, steps) = {-128 * sum, 0, zero_point, most, {}};
  return most * static_cast<int64_t>(sizeof(Rest)) + kHead > room ? -1 : most;
}

void split(void *row, int64_t steps) {
  int8_t *codes = static_cast<int8_t *>(row);
  Behind *const after = behind(row, steps);
  if (after->most == 0 && after->zero_point == 0) return;
  const __m256i less = _mm256_set1_epi16(static_cast<int16_t>(after->zero_point));
  for (int64_t i = 0; i < room_of(steps); i += 16) {
    const __m256i wide = wide16(codes + i, less);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi16(wide, wide), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(codes + i), _mm256_castsi256_si128(packed));
    unsigned which = unsafe(wide);
    alignas(32) int16_t whole[16];
    if (which) _mm256_store_si256(reinterpret_cast<__m256i *>(whole), wide);
    for (; which; which &= which - 1) {
      const int at = __builtin_ctz(which) * kGroup;
      int left[kGroup] = {whole[at], whole[at + 1], whole[at + 2], whole[at + 3]};
      for (bool more = take(left, codes + i + at); more; ++after->count) {
        Rest &rest = after->rest[after->count];
        rest.group = static_cast<int32_t>((i + at) / kGroup);
        more = take(left, rest.codes);
      }
    }
  }
}

void widen(void *row, int64_t steps) {
  const int8_t *codes = static_cast<const int8_t *>(row);
  const __m256i less = _mm256_set1_epi16(static_cast<int16_t>(behind(row, steps)->zero_point));
  int16_t *wide = static_cast<int16_t *>(row);
  for (int64_t i = room_of(steps) - 16; i >= 0; i -= 16)   // from behind: what is read next lies before what is written
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(wide + i), wide16(codes + i, less));
}

// A register holds eight columns; a pass takes V of them.
template <int MR, int V>
void tile(const void *left_, int64_t ld, const int8_t *panel, int64_t ksteps, int32_t *sums, const int8_t *ahead,
          int ahead_lines) {
  constexpr int kPasses = kPanel / (8 * V);
  const char *left = static_cast<const char *>(left_);
  for (int pass = 0; pass < kPasses; ++pass) {
    const int8_t *b = panel + 32 * V * pass;
    __m256i acc[MR][V];
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const __m256i begin = _mm256_set1_epi32(behind(left + r * ld, ksteps)->begin);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = begin;
    }
    // Constants come from memory: their registers are needed for sums.
    auto weights = [&](const int8_t *at) {
      __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(at));
      __asm__("vpxor %1, %0, %0" : "+x"(w) : "m"(kSigns));
      return w;
    };
    auto add = [&](int r, int v, __m256i codes_r, __m256i weights_v) {
      __m256i products = _mm256_maddubs_epi16(weights_v, codes_r);
      __asm__("vpmaddwd %1, %0, %0" : "+x"(products) : "m"(kOnes));
      acc[r][v] = _mm256_add_epi32(acc[r][v], products);
      __asm__ volatile("" : "+x"(acc[r][v]));   // holds the order: see isa/avx2.cpp
    };
    auto four = [&](const void *at) {
      int32_t codes;
      std::memcpy(&codes, at, 4);
      return _mm256_set1_epi32(codes);
    };
    const char *a = left;
    Ahead fetch(ahead, ahead_lines, ksteps, kPasses, pass);
    for (int64_t s = 0; s < ksteps; ++s, a += kGroup) {
      fetch.step(s);
      const int8_t *at = b + s * kPanelStep;
      if constexpr (MR == 1) {
        const __m256i codes = four(a);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) add(0, v, codes, weights(at + 32 * v));
      } else if constexpr (MR == 2) {
        const __m256i codes = four(a), below = four(a + ld);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          const __m256i w = weights(at + 32 * v);
          add(0, v, codes, w), add(1, v, below, w);
        }
      } else {
        __m256i w[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) w[v] = weights(at + 32 * v);
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r) {
          const __m256i codes = four(a + r * ld);
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) add(r, v, codes, w[v]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const Behind *after = behind(left + r * ld, ksteps);
      for (int32_t i = 0; i < after->count; ++i) {
        const __m256i codes = four(after->rest[i].codes);
        const int8_t *at = b + after->rest[i].group * kPanelStep;
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) add(r, v, codes, weights(at + 32 * v));
      }
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(sums + r * kPanel + 8 * (V * pass + v)), acc[r][v]);
    }
  }
}

W8A8_TARGET_END

}  // namespace

const Pairs kAvx2Pairs = {{nullptr, tile<1, 4>, tile<2, 4>, tile<3, 2>, tile<4, 2>, tile<5, 2>, tile<6, 2>}, 2, count, split, widen};

}  // namespace w8a8
#endif
