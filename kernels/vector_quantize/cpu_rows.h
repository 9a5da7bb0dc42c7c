// What the derivative of vector_quantize does to one row, for each instruction set.
#pragma once

#include <stdint.h>

namespace beitv2_fast {

struct QuantizeRows {
  // out = g + weight (y - code), y = l2(x), taken through the normalization. g may be null: zeros.
  void (*backward_cosine)(const float* x, const float* code, const float* g, float weight, int64_t dim, float* out);
  void (*backward_euclidean)(const float* x, const float* code, const float* g, float weight, int64_t dim, float* out);
  // What reaches x of a gradient g for the code that x was rotated to (reference.py, rotate_to). Of y = l2(x), cosine.
  void (*rotate_back)(const float* x, const float* code, const float* g, double shortest, bool cosine, int64_t dim,
                      float* out);
};

const QuantizeRows& quantize_rows();  // for the instruction set that the CPU ops use

}  // namespace beitv2_fast
