// The search for few vectors, bound by reading the codebook: once, in its own dtype, with no copy of it.
#pragma once

#include "cpu_block.h"

namespace beitv2_fast {

// False, with nothing written, where it is not the way: more than 8 vectors (64 of wide ones), k > 16, widths below 4,
// codes that are not finite, vectors or codes so long or short that fp32 does not hold their scores.
bool search_few(const Search& search);

}  // namespace beitv2_fast
