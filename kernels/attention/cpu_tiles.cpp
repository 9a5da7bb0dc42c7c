// The kernels of cpu_tiles.h for each instruction set, with the register tile that its registers hold.
#include "cpu_tile_kernels.h"

#include "../cpu_target.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // 64-byte vectors never cross a function that is not inlined

namespace beitv2_fast::attention {
namespace {

namespace portable {
constexpr int WIDTH = 4, ROWS = 5, VECTORS = 2;  // 16 registers
#include "cpu_tiles.h"
}

#if BEITV2_FAST_X86
BEITV2_FAST_TARGET_BEGIN("avx2,fma")
namespace avx2 {
constexpr int WIDTH = 8, ROWS = 6, VECTORS = 2;  // 16 registers
#include "cpu_tiles.h"
}
BEITV2_FAST_TARGET_END
#if BEITV2_FAST_COMPILES_AVX512
BEITV2_FAST_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
namespace avx512 {
constexpr int WIDTH = 16, ROWS = 14, VECTORS = 2;  // 32 registers
#include "cpu_tiles.h"
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

}  // namespace beitv2_fast::attention
