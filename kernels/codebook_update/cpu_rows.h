// What codebook_update does to one row: compiled once for each instruction set, with the same bits from all of them.
#pragma once

#include <stdint.h>

namespace beitv2_fast {

struct UpdateRows {
  // Adds a vector to the sums of its code, in fixed point. False, and nothing added: the row does not count.
  bool (*add_cosine)(const float* row, int64_t dim, int64_t* sums);
  bool (*add_euclidean)(const float* row, int64_t dim, int64_t* sums);  // sums: coarse [dim], then fine [dim]
  // The double that a row of sums stands for, times `factor`, as fp32.
  void (*mean_cosine)(const int64_t* sums, int64_t dim, double factor, float* out);
  void (*mean_euclidean)(const int64_t* sums, int64_t dim, double factor, float* out);
  // scale * (count * code - sums): the gradient of a loss that draws the code to its vectors, as fp32.
  void (*pull_cosine)(const int64_t* sums, const float* code, int64_t dim, double count, double scale, float* out);
  void (*pull_euclidean)(const int64_t* sums, const float* code, int64_t dim, double count, double scale, float* out);
  void (*l2)(const float* row, int64_t dim, float* out);                                     // out may be row
  void (*mix)(const float* old, const float* next, int64_t dim, float decay, float rest, float* out);  // out may be old
  void (*scale)(const float* row, int64_t dim, double factor, float* out);
};

const UpdateRows& update_rows();  // for the instruction set that the CPU ops use

}  // namespace beitv2_fast
