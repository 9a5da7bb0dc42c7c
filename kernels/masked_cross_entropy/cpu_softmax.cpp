// The row kernels of cpu_softmax.h for each instruction set.
#include "cpu_softmax_kernels.h"

#include "../cpu_target.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // 64-byte vectors never cross a function that is not inlined

namespace beitv2_fast::softmax {
namespace {

namespace portable {
#include "cpu_softmax.h"
}

#if BEITV2_FAST_X86
BEITV2_FAST_TARGET_BEGIN("avx2,fma")
namespace avx2 {
#include "cpu_softmax.h"
}
BEITV2_FAST_TARGET_END
#if BEITV2_FAST_COMPILES_AVX512
BEITV2_FAST_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
namespace avx512 {
#include "cpu_softmax.h"
}
BEITV2_FAST_TARGET_END
#endif
#endif

}  // namespace

const Kernels& kernels_for(Capability capability) {
#if BEITV2_FAST_X86
#if BEITV2_FAST_COMPILES_AVX512
  if (capability >= Capability::avx512) return avx512::kernels;
#endif
  if (capability >= Capability::avx2) return avx2::kernels;
#endif
  return portable::kernels;
}

}  // namespace beitv2_fast::softmax
