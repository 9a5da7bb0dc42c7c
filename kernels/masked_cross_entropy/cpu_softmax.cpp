// The row kernels of cpu_softmax_kernels.h for each instruction set.
#include "cpu_softmax.h"

#define BEITV2_FAST_VARIANTS "masked_cross_entropy/cpu_softmax_kernels.h"
#include "../cpu_variants.h"

namespace beitv2_fast {

const softmax::Kernels& softmax::kernels() { return BEITV2_FAST_PICK(softmax_kernels); }

}  // namespace beitv2_fast
