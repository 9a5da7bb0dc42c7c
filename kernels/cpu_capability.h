// Which instruction sets the CPU ops may use. BEITV2_FAST_CPU_CAPABILITY names a lower one than the best.
#pragma once

#include <string>
#include <vector>

namespace beitv2_fast {

enum class Capability { portable, avx2, avx512, avx512_vnni };

// The highest one that this CPU, the operating system and the compiler of this file support, or the one that the
// environment variable or use_capability names. Throws when the variable names one that is not available.
Capability cpu_capability();

}  // namespace beitv2_fast
