// The search in AVX2 and FMA: 4 codes x 16 vectors in 8 of 16 registers.
#include "../cpu_target.h"
#include "cpu_search.h"

#if BEITV2_FAST_X86
#include <string.h>
BEITV2_FAST_TARGET_BEGIN("avx2,fma")
#include "cpu_kernels.h"

namespace beitv2_fast {
namespace {

struct Avx2 {
  using V = __m256;
  static constexpr int LANES = 8, WIDE = 1, CODES = 4;
  static inline V set(float a) { return _mm256_set1_ps(a); }
  static inline V load(const float* p) { return _mm256_loadu_ps(p); }
  static inline void store(float* p, V a) { _mm256_storeu_ps(p, a); }
  static inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static inline V max(V a, V b) { return _mm256_max_ps(a, b); }
  static inline V min(V a, V b) { return _mm256_min_ps(a, b); }
  static inline float sum(V a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static inline uint32_t reaches(V a, V b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)); }
};

const Kernels kernels = {nullptr, screen_fp32<Avx2>, measure_group<Avx2>, pack_group, pack_rows,
                         raise_top<Avx2>, filter<Avx2>, resolve<Avx2>};

}  // namespace

const Kernels& avx2_kernels() { return kernels; }

}  // namespace beitv2_fast
BEITV2_FAST_TARGET_END
#else
namespace beitv2_fast {
const Kernels& avx2_kernels() { return portable_kernels(); }
}  // namespace beitv2_fast
#endif
