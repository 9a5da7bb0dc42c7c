// What cpu.cpp calls and cpu_tiles.cpp provides for every instruction set; see cpu_tiles_kernels.h for each function.
#pragma once

#include <cstdint>

namespace beitv2_fast::attention {

struct Kernels {
  void (*product)(const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t ldb, float* c, int64_t ldc,
                  int64_t m, int64_t n, int64_t k, bool accumulate);
  void (*transpose)(const float* rows, int64_t ld, int64_t count, int64_t dim, float* out, int64_t ldo);
  void (*softmax)(float* scores, const float* bias, int64_t n, float* largest, float* inverse);
  void (*probabilities)(float* scores, const float* bias, int64_t n, float largest, float inverse);
  void (*scores_gradient)(const float* p, float* grad, float* grad_bias, int64_t n);
};

const Kernels& kernels();

}  // namespace beitv2_fast::attention
