// The search in the vector extension of GCC and Clang: SSE2 on x86-64, NEON on Arm, scalar code elsewhere.
#include "cpu_kernels.h"

namespace beitv2_fast {
namespace {

struct Portable {
  typedef float V __attribute__((vector_size(16)));
  static constexpr int LANES = 4, WIDE = 1;
#if defined(__aarch64__)
  static constexpr int CODES = 4;  // 32 registers
#else
  static constexpr int CODES = 2;
#endif
  static inline V set(float a) { return V{a, a, a, a}; }
  static inline V load(const float* p) {
    V a;
    memcpy(&a, p, sizeof a);
    return a;
  }
  static inline void store(float* p, V a) { memcpy(p, &a, sizeof a); }
  static inline V fma(V a, V b, V c) { return a * b + c; }
  static inline V max(V a, V b) { return a > b ? a : b; }
  static inline V min(V a, V b) { return a < b ? a : b; }
  static inline float sum(V a) { return (a[0] + a[1]) + (a[2] + a[3]); }
  static inline uint32_t reaches(V a, V b) {
    uint32_t mask = 0;
    for (int l = 0; l < LANES; ++l) mask |= static_cast<uint32_t>(a[l] >= b[l]) << l;
    return mask;
  }
};

}  // namespace

const Kernels& portable_kernels() {
  static const Kernels kernels = {nullptr, screen_fp32<Portable>, measure_group<Portable>, pack_group, pack_rows,
                                  raise_top<Portable>, filter<Portable>, resolve<Portable>};
  return kernels;
}

}  // namespace beitv2_fast
