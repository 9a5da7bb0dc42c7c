// What cpu.cpp calls and cpu_softmax.cpp provides for every instruction set; see cpu_softmax_kernels.h for each function.
#pragma once

#include <cstdint>

namespace beitv2_fast::softmax {

struct Kernels {
  float (*add_bias)(float* x, const float* bias, int64_t n);
  double (*exponentials)(float* x, float top, int64_t n, bool keep);
  void (*scale_rows)(float* rows, const float* scale, int64_t count, int64_t n, float* column_sums);
};

const Kernels& kernels();

}  // namespace beitv2_fast::softmax
