// The search screened in AMX tiles: 16 codes x 16 vectors x 32 elements an instruction.
//
// A tile's rows are codes and its columns vectors, so that the maximum over codes is one vmaxps a row. What bounds it:
// 16 cycles a tile product, 16 cycles to store the sums (nothing else reaches the vector registers), 8 to load and compare.
// The first two overlap because two pairs of sum tiles take turns: one is multiplied into while the other is stored.
#include "../cpu_target.h"
#include "cpu_search.h"

#if BEITV2_FAST_COMPILES_AMX
#include <string.h>
BEITV2_FAST_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,amx-tile,amx-bf16")
#include "cpu_avx512.h"

namespace beitv2_fast {
namespace {

constexpr int64_t HALF = GROUP / 2;  // codes of a tile

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_a_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

void load_config() {
  const TileConfig config;
  _tile_loadconfig(&config);
}

void release() { _tile_release(); }

// The maximum over the 16 codes of a stored tile; bias [16] or null.
template <bool BIAS>
inline __m512 highest(const float* sums, const float* bias) {
  __m512 four[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) four[i] = _mm512_set1_ps(-__builtin_inff());
#pragma GCC unroll 16
  for (int c = 0; c < HALF; ++c) {
    __m512 row = _mm512_load_ps(sums + c * PANEL);
    if (BIAS) row = _mm512_add_ps(row, _mm512_set1_ps(bias[c]));
    four[c % 4] = _mm512_max_ps(four[c % 4], row);
  }
  return _mm512_max_ps(_mm512_max_ps(four[0], four[1]), _mm512_max_ps(four[2], four[3]));
}

// Tiles: 0 and 1 codes, 2 and 3 vectors of the two panels, 4 and 5 the sums of even halves, 6 and 7 of odd halves.
#define BEITV2_FAST_MULTIPLY(half, first, second)                                              \
  do {                                                                                         \
    const uint16_t* rows = codes.bf16 + (half) * HALF * codes.depth;                            \
    _tile_zero(first);                                                                         \
    _tile_zero(second);                                                                        \
    for (int64_t s = 0; s < steps; ++s) {                                                      \
      _tile_loadd(0, rows + s * 32, codes.depth * 2);                                          \
      if (!ONE_STEP) {                                                                         \
        _tile_loadd(2, x + s * 16 * PANEL, 64);                                                \
        _tile_loadd(3, x + (pairs + s * 16) * PANEL, 64);                                      \
      }                                                                                        \
      _tile_dpbf16ps(first, 0, 2);                                                             \
      _tile_dpbf16ps(second, 0, 3);                                                            \
    }                                                                                          \
  } while (0)

// Two panels against groups from..to. ONE_STEP: depth 32, the vectors stay in their tiles.
template <bool ONE_STEP, bool BIAS>
inline void screen_pair(const Codes& codes, const uint32_t* x, int64_t from, int64_t to, float* out, float* best) {
  alignas(64) float even[2][HALF * PANEL], odd[2][HALF * PANEL];
  const int64_t pairs = codes.depth / 2, steps = ONE_STEP ? 1 : codes.depth / 32;
  __m512 raised[2] = {_mm512_loadu_ps(best), _mm512_loadu_ps(best + PANEL)};
  if (ONE_STEP) {
    _tile_loadd(2, x, 64);
    _tile_loadd(3, x + pairs * PANEL, 64);
  }
  BEITV2_FAST_MULTIPLY(from * 2, 4, 5);
  _tile_stored(4, even[0], 64);
  _tile_stored(5, even[1], 64);
  for (int64_t g = from; g < to; ++g) {
    const float* bias = BIAS ? codes.bias + g * GROUP : nullptr;
    BEITV2_FAST_MULTIPLY(g * 2 + 1, 6, 7);
    __m512 group[2];
    for (int w = 0; w < 2; ++w) group[w] = highest<BIAS>(even[w], bias);
    _tile_stored(6, odd[0], 64);
    _tile_stored(7, odd[1], 64);
    if (g + 1 < to) {
      BEITV2_FAST_MULTIPLY(g * 2 + 2, 4, 5);
    }
    for (int w = 0; w < 2; ++w) {
      group[w] = _mm512_max_ps(group[w], highest<BIAS>(odd[w], BIAS ? bias + HALF : nullptr));
      _mm512_storeu_ps(out + (w * CHUNK + g - from) * PANEL, group[w]);
      raised[w] = _mm512_max_ps(raised[w], group[w]);
    }
    _tile_stored(4, even[0], 64);
    _tile_stored(5, even[1], 64);
  }
  _mm512_storeu_ps(best, raised[0]);
  _mm512_storeu_ps(best + PANEL, raised[1]);
}

template <bool ONE_STEP, bool BIAS>
void screen_all(const Codes& codes, const uint32_t* x, int64_t count, int64_t begin, int64_t end, float* group_max,
                float* best) {
  const int64_t step = codes.depth < 256 ? 256 / codes.depth : 1;
  for (int64_t from = begin; from < end; from += step)
    // An odd last panel takes a neighbour along: the buffers always have room for whole pairs.
    for (int64_t p = 0; p < count; p += 2)
      screen_pair<ONE_STEP, BIAS>(codes, x + p * codes.depth / 2 * PANEL, from, from + step < end ? from + step : end,
                                  group_max + (p * CHUNK + from - begin) * PANEL, best + p * PANEL);
}

void screen_amx(const Codes& codes, const void* panels, int64_t count, int64_t begin, int64_t end, float* group_max,
                float* best) {
  const uint32_t* x = static_cast<const uint32_t*>(panels);
  auto* run = codes.depth == 32 ? (codes.bias ? screen_all<true, true> : screen_all<true, false>)
                                : (codes.bias ? screen_all<false, true> : screen_all<false, false>);
  run(codes, x, count, begin, end, group_max, best);
}

const Screen fast = {true, load_config, release, screen_amx};
const Kernels kernels = {&fast, &exact, pack_codes, pack_rows, filter<Avx512>, resolve<Avx512>};

}  // namespace

const Kernels& amx_bf16_kernels() { return kernels; }

}  // namespace beitv2_fast
BEITV2_FAST_TARGET_END
#else
namespace beitv2_fast {
const Kernels& amx_bf16_kernels() { return avx512_bf16_kernels(); }
}  // namespace beitv2_fast
#endif
