// Asks the CPU and the operating system for instruction sets; the only file that knows how.
#include "cpu_capability.h"

#include <c10/util/Exception.h>
#include <torch/library.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>

#include "cpu_target.h"

#if BEITV2_FAST_X86
#include <cpuid.h>
#endif

namespace beitv2_fast {
namespace {

constexpr const char* NAMES[] = {"portable", "avx2", "avx512", "avx512_vnni"};

#if BEITV2_FAST_X86
// Whether the registers survive a context switch: bits 1-2 of XCR0 for AVX, 5-7 for AVX-512.
bool operating_system_saves(uint64_t wanted) {
  uint32_t eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx >> 27 & 1)) return false;  // OSXSAVE
  __asm__("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return (((uint64_t(edx) << 32) | eax) & wanted) == wanted;
}

Capability detect() {
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && operating_system_saves(0x6)))
    return Capability::portable;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!avx512 || !operating_system_saves(0xe6) || !BEITV2_FAST_COMPILES_AVX512) return Capability::avx2;
  return __builtin_cpu_supports("avx512vnni") && BEITV2_FAST_COMPILES_VNNI ? Capability::avx512_vnni
                                                                           : Capability::avx512;
}
#else
Capability detect() { return Capability::portable; }
#endif

std::vector<std::string> available() { return {NAMES, NAMES + static_cast<int>(detect()) + 1}; }

Capability named(const std::string& wanted, const char* who) {
  if (wanted.empty()) return detect();
  std::string names;
  for (int level = 0; level <= static_cast<int>(detect()); ++level) {
    if (wanted == NAMES[level]) return static_cast<Capability>(level);
    names += (level ? ", " : "") + std::string(NAMES[level]);
  }
  TORCH_CHECK_VALUE(false, who, " is '", wanted, "'; this machine has: ", names);
}

std::atomic<Capability>& chosen() {
  static std::atomic<Capability> capability = [] {
    const char* wanted = std::getenv("BEITV2_FAST_CPU_CAPABILITY");
    return named(wanted ? wanted : "", "BEITV2_FAST_CPU_CAPABILITY");
  }();
  return capability;
}

}  // namespace

Capability cpu_capability() { return chosen(); }

TORCH_LIBRARY_FRAGMENT(beitv2_fast_cpu, m) {
  m.def("capability() -> str", [] { return std::string(NAMES[static_cast<int>(cpu_capability())]); });
  m.def("available_capabilities() -> str[]", [] { return available(); });
  // For tests and benchmarks: from now on, this one in all threads; "" is the best.
  m.def("use_capability(str name) -> ()", [](std::string name) { chosen() = named(name, "The capability"); });
}

}  // namespace beitv2_fast
