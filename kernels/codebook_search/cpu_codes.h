// Measures a codebook for the CPU search, and packs it into bytes if asked to: once per call, in parallel.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

#include "cpu_search.h"

namespace beitv2_fast {

struct PackedCodebook {
  Codes codes = {};
  at::Tensor values;               // [K, D] fp32, contiguous: what the exact scores are made of
  std::vector<int32_t> positions;  // where the finite codes are in it; empty when all are finite
  float scale = 1;                 // they were multiplied by this power of two
  std::unique_ptr<float[]> rows;   // a copy, where codes.rows are not the values themselves
  std::vector<float> last;         // what codes.last points to
  std::unique_ptr<float[]> bias;
  std::unique_ptr<int8_t[]> bytes;
  std::unique_ptr<int32_t[]> offset;

  int64_t original(int64_t position) const { return positions.empty() ? position : positions[position]; }
  const float* code(int64_t position) const {
    return values.const_data_ptr<float>() + original(position) * codes.dim;
  }
};

constexpr int64_t FEWEST_CODES = 128;  // per code sought; of fewer, resolving costs what screening in bytes saves
constexpr int64_t FEWEST_VALUES = 1152;  // of vectors behind the first panel; of fewer, packing costs what it saves

inline bool bytes_pay(int64_t rows, const at::Tensor& codebook, int64_t k) {
  return (rows - PANEL) * codebook.size(1) > FEWEST_VALUES && codebook.size(0) > FEWEST_CODES * k;
}

PackedCodebook pack_codebook(const at::Tensor& codebook, bool cosine, bool bytes, const Kernels& kernels);

}  // namespace beitv2_fast
