// The AVX-512 lanes that two files share; include it between BEITV2_FAST_TARGET_BEGIN and _END.
#pragma once

#include "cpu_kernels.h"

namespace beitv2_fast {
namespace {

struct Avx512 {
  using V = __m512;
  static constexpr int LANES = 16, WIDE = 3, CODES = 8;  // 24 sums, 3 vectors and a code in 32 registers
  static inline V set(float a) { return _mm512_set1_ps(a); }
  static inline V load(const float* p) { return _mm512_loadu_ps(p); }
  static inline void store(float* p, V a) { _mm512_storeu_ps(p, a); }
  static inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static inline V max(V a, V b) { return _mm512_max_ps(a, b); }
  static inline V min(V a, V b) { return _mm512_min_ps(a, b); }
  static inline float sum(V a) { return _mm512_reduce_add_ps(a); }
  static inline uint32_t reaches(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
};

}  // namespace
}  // namespace beitv2_fast
