// The rows of codebook_update for each instruction set. The loops are plain: the compiler makes vectors of them.
#include "cpu_rows.h"

#define BEITV2_FAST_VARIANTS "codebook_update/cpu_rows_kernels.h"
#include "../cpu_variants.h"

namespace beitv2_fast {

const UpdateRows& update_rows() { return BEITV2_FAST_PICK(rows); }

}  // namespace beitv2_fast
