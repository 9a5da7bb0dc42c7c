// The kernels of cpu_tiles_kernels.h for each instruction set.
#include "cpu_tiles.h"

#define BEITV2_FAST_VARIANTS "attention/cpu_tiles_kernels.h"
#include "../cpu_variants.h"

namespace beitv2_fast {

const attention::Kernels& attention::kernels() { return BEITV2_FAST_PICK(attention_kernels); }

}  // namespace beitv2_fast
