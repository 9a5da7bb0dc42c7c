// Which instruction sets the CPU ops may use, decided once per process. BEITV2_FAST_CPU_CAPABILITY names a lower one.
#pragma once

#include <string>
#include <vector>

namespace beitv2_fast {

enum class Capability { portable, avx2, avx512, avx512_bf16, amx_bf16 };

// The highest one that this CPU, the operating system and the compiler of this file support, or the one that
// the environment variable names. Throws when the variable names one that is not available.
Capability cpu_capability();
std::string capability_name(Capability capability);
std::vector<std::string> available_capabilities();

}  // namespace beitv2_fast
