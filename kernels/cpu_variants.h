// Compiles one header for every instruction set, and picks among them at run time.
//
//   #define BEITV2_FAST_VARIANTS "op/cpu_rows_kernels.h"    // its path from this folder; it defines `rows`
//   #include "../cpu_variants.h"
//   const Rows& op_rows() { return BEITV2_FAST_PICK(rows); }
//
// The header has no include guard and includes nothing but more of the same kind (see cpu_target.h). REGISTER_FLOATS tells
// it how many floats a register holds. A source file has one such header.
#include <stdint.h>
#include <string.h>

#include "cpu_capability.h"
#include "cpu_target.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // 64-byte vectors never cross a function that is not inlined

namespace beitv2_fast {
namespace {

namespace portable {
constexpr int REGISTER_FLOATS = 4;
#include BEITV2_FAST_VARIANTS
}

#if BEITV2_FAST_X86
BEITV2_FAST_TARGET_BEGIN("avx2,fma")
namespace avx2 {
constexpr int REGISTER_FLOATS = 8;
#include BEITV2_FAST_VARIANTS
}
BEITV2_FAST_TARGET_END
#endif

#if BEITV2_FAST_COMPILES_AVX512
BEITV2_FAST_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
namespace avx512 {
constexpr int REGISTER_FLOATS = 16;
#include BEITV2_FAST_VARIANTS
}
BEITV2_FAST_TARGET_END
#endif

}  // namespace
}  // namespace beitv2_fast

#if BEITV2_FAST_COMPILES_AVX512
#define BEITV2_FAST_PICK(name)                                 \
  (cpu_capability() >= Capability::avx512 ? avx512::name       \
   : cpu_capability() >= Capability::avx2 ? avx2::name         \
                                          : portable::name)
#elif BEITV2_FAST_X86
#define BEITV2_FAST_PICK(name) (cpu_capability() >= Capability::avx2 ? avx2::name : portable::name)
#else
#define BEITV2_FAST_PICK(name) (portable::name)
#endif
