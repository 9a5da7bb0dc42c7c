// The rows of vector_quantize for each instruction set. The loops are plain: the compiler makes vectors of them.
#include "cpu_rows.h"

#define BEITV2_FAST_VARIANTS "vector_quantize/cpu_rows_kernels.h"
#include "../cpu_variants.h"

namespace beitv2_fast {

const QuantizeRows& quantize_rows() { return BEITV2_FAST_PICK(rows); }

}  // namespace beitv2_fast
