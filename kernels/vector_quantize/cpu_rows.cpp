// The rows of vector_quantize for each instruction set. The loops are plain: the compiler makes vectors of them.
#include "cpu_rows.h"

#include <string.h>

#include "../cpu_capability.h"
#include "../cpu_target.h"

namespace beitv2_fast {
namespace portable {
#include "cpu_rows_kernels.h"
}

#if BEITV2_FAST_X86
BEITV2_FAST_TARGET_BEGIN("avx2,fma")
namespace avx2 {
#include "cpu_rows_kernels.h"
}
BEITV2_FAST_TARGET_END
#endif

#if BEITV2_FAST_COMPILES_AVX512
BEITV2_FAST_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
namespace avx512 {
#include "cpu_rows_kernels.h"
}
BEITV2_FAST_TARGET_END
#endif

const QuantizeRows& quantize_rows() {
  const Capability capability = cpu_capability();
#if BEITV2_FAST_COMPILES_AVX512
  if (capability >= Capability::avx512) return avx512::rows;
#endif
#if BEITV2_FAST_X86
  if (capability >= Capability::avx2) return avx2::rows;
#endif
  (void)capability;
  return portable::rows;
}

}  // namespace beitv2_fast
