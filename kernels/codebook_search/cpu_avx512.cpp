// The search in AVX-512: 8 codes x 48 vectors in 24 of 32 registers.
#include "../cpu_target.h"
#include "cpu_search.h"

#if BEITV2_FAST_COMPILES_AVX512
#include <string.h>
BEITV2_FAST_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#include "cpu_avx512.h"

namespace beitv2_fast {
namespace {
const Kernels kernels = {nullptr, screen_fp32<Avx512>, measure_group<Avx512>, pack_group, pack_rows,
                         raise_top<Avx512>, filter<Avx512>, resolve<Avx512>};
}  // namespace

const Kernels& avx512_kernels() { return kernels; }

}  // namespace beitv2_fast
BEITV2_FAST_TARGET_END
#else
namespace beitv2_fast {
const Kernels& avx512_kernels() { return avx2_kernels(); }
}  // namespace beitv2_fast
#endif
