// The search screened with bf16 dot products (vdpbf16ps): two products an instruction and lane, sums in fp32.
#include "../cpu_target.h"
#include "cpu_search.h"

#if BEITV2_FAST_COMPILES_BF16
#include <string.h>
BEITV2_FAST_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")
#include "cpu_avx512.h"

namespace beitv2_fast {
namespace {

// 8 codes against WIDE panels: each pair of elements of a code is broadcast once for all panels.
template <int WIDE>
inline void tile_bf16(const Codes& codes, const uint16_t* rows, const float* bias, const uint32_t* panels,
                      __m512* highest) {
  constexpr int CODES = 8;
  const int64_t pairs = codes.depth / 2;
  __m512 sums[CODES][WIDE];
#pragma GCC unroll 16
  for (int c = 0; c < CODES; ++c)
#pragma GCC unroll 16
    for (int w = 0; w < WIDE; ++w) sums[c][w] = _mm512_set1_ps(bias ? bias[c] : 0.0f);
  for (int64_t p = 0; p < pairs; ++p) {
    __m512i x[WIDE];
#pragma GCC unroll 16
    for (int w = 0; w < WIDE; ++w) x[w] = _mm512_loadu_si512(panels + (w * pairs + p) * PANEL);
#pragma GCC unroll 16
    for (int c = 0; c < CODES; ++c) {
      int32_t pair;
      memcpy(&pair, rows + c * codes.depth + 2 * p, 4);
      const __m512i code = _mm512_set1_epi32(pair);
#pragma GCC unroll 16
      for (int w = 0; w < WIDE; ++w) sums[c][w] = _mm512_dpbf16_ps(sums[c][w], (__m512bh)x[w], (__m512bh)code);
    }
  }
#pragma GCC unroll 16
  for (int c = 0; c < CODES; ++c)
#pragma GCC unroll 16
    for (int w = 0; w < WIDE; ++w) highest[w] = _mm512_max_ps(highest[w], sums[c][w]);
}

template <int WIDE>
inline void group_bf16(const Codes& codes, int64_t group, const uint32_t* panels, float* out, float* best) {
  const float* bias = codes.bias ? codes.bias + group * GROUP : nullptr;
  __m512 highest[WIDE];
#pragma GCC unroll 16
  for (int w = 0; w < WIDE; ++w) highest[w] = _mm512_set1_ps(-__builtin_inff());
  for (int c = 0; c < GROUP; c += 8)
    tile_bf16<WIDE>(codes, codes.bf16 + (group * GROUP + c) * codes.depth, bias ? bias + c : nullptr, panels, highest);
#pragma GCC unroll 16
  for (int w = 0; w < WIDE; ++w) {
    _mm512_storeu_ps(out + w * CHUNK * PANEL, highest[w]);
    _mm512_storeu_ps(best + w * PANEL, _mm512_max_ps(_mm512_loadu_ps(best + w * PANEL), highest[w]));
  }
}

void screen_bf16(const Codes& codes, const void* panels, int64_t count, int64_t begin, int64_t end, float* group_max,
                 float* best) {
  const uint32_t* x = static_cast<const uint32_t*>(panels);
  const int64_t pairs = codes.depth / 2, step = codes.depth < 256 ? 256 / codes.depth : 1;
  for (int64_t from = begin; from < end; from += step) {
    const int64_t to = from + step < end ? from + step : end;
    int64_t p = 0;
    for (; p + 3 <= count; p += 3)
      for (int64_t g = from; g < to; ++g)
        group_bf16<3>(codes, g, x + p * pairs * PANEL, group_max + (p * CHUNK + g - begin) * PANEL, best + p * PANEL);
    for (; p < count; ++p)
      for (int64_t g = from; g < to; ++g)
        group_bf16<1>(codes, g, x + p * pairs * PANEL, group_max + (p * CHUNK + g - begin) * PANEL, best + p * PANEL);
  }
}

const Screen fast = {true, nothing, nothing, screen_bf16};
const Kernels kernels = {&fast, &exact, pack_codes, pack_rows, filter<Avx512>, resolve<Avx512>};

}  // namespace

const Kernels& avx512_bf16_kernels() { return kernels; }

}  // namespace beitv2_fast
BEITV2_FAST_TARGET_END
#else
namespace beitv2_fast {
const Kernels& avx512_bf16_kernels() { return avx512_kernels(); }
}  // namespace beitv2_fast
#endif
