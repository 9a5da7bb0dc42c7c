// Asks the CPU and the operating system for instruction sets; the only file that knows how.
#include "cpu_capability.h"

#include <c10/util/Exception.h>
#include <torch/library.h>

#include <cstdint>
#include <cstdlib>

#include "cpu_target.h"

#if BEITV2_FAST_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace beitv2_fast {
namespace {

constexpr const char* NAMES[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx_bf16"};

#if BEITV2_FAST_X86
bool operating_system_saves(uint64_t wanted) {
  uint32_t eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx >> 27 & 1)) return false;  // OSXSAVE
  __asm__("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return (((uint64_t(edx) << 32) | eax) & wanted) == wanted;
}

// Linux gives the tile registers only to processes that ask for them.
bool request_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl) && BEITV2_FAST_COMPILES_AMX
  constexpr int request_permission = 0x1023, tile_data = 18;
  return operating_system_saves(0x60000) && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

Capability detect() {
  uint32_t eax, ebx, ecx, edx, eax1 = 0, ignored;
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && operating_system_saves(0x6)))
    return Capability::portable;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!avx512 || !operating_system_saves(0xe6) || !BEITV2_FAST_COMPILES_AVX512) return Capability::avx2;
  __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
  if (eax >= 1) __get_cpuid_count(7, 1, &eax1, &ignored, &ignored, &ignored);
  if (!(eax1 >> 5 & 1) || !BEITV2_FAST_COMPILES_BF16) return Capability::avx512;
  const bool amx = (edx >> 22 & 1) && (edx >> 24 & 1);  // amx-bf16, amx-tile
  return amx && request_tiles() ? Capability::amx_bf16 : Capability::avx512_bf16;
}
#else
Capability detect() { return Capability::portable; }
#endif

Capability choose() {
  const Capability best = detect();
  const char* wanted = std::getenv("BEITV2_FAST_CPU_CAPABILITY");
  if (!wanted || !*wanted) return best;
  for (int level = 0; level <= static_cast<int>(best); ++level)
    if (std::string(wanted) == NAMES[level]) return static_cast<Capability>(level);
  std::string names;
  for (const auto& name : available_capabilities()) names += (names.empty() ? "" : ", ") + name;
  TORCH_CHECK_VALUE(false, "BEITV2_FAST_CPU_CAPABILITY is '", wanted, "'; this machine has: ", names);
}

}  // namespace

Capability cpu_capability() {
  static const Capability chosen = choose();
  return chosen;
}

std::string capability_name(Capability capability) { return NAMES[static_cast<int>(capability)]; }

std::vector<std::string> available_capabilities() {
  return {NAMES, NAMES + static_cast<int>(detect()) + 1};
}

TORCH_LIBRARY_FRAGMENT(beitv2_fast_cpu, m) {
  m.def("capability() -> str", [] { return capability_name(cpu_capability()); });
  m.def("available_capabilities() -> str[]", [] { return available_capabilities(); });
}

}  // namespace beitv2_fast
