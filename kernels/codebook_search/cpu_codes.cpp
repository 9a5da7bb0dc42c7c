// See cpu_codes.h. Codes with NaN or Inf are left out, so that no later step has to ask.
#include "cpu_codes.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>

namespace beitv2_fast {
namespace {

constexpr int32_t INFINITE = 0x7f800000;
constexpr int64_t WIDEST_BYTES = 32768;  // 255 * 127 * D stays an int32

// As bits, in which NaN and Inf compare above every finite number.
int32_t largest_magnitude(const float* row, int64_t count) {
  int32_t largest = 0;
  for (int64_t d = 0; d < count; ++d) {
    int32_t bits;
    std::memcpy(&bits, row + d, 4);
    largest = std::max(largest, bits & 0x7fffffff);
  }
  return largest;
}

// Finds the finite codes; returns the largest magnitude among them.
float measure(PackedCodebook& book, int64_t total, int64_t dim) {
  const float* values = book.values.const_data_ptr<float>();
  int32_t largest = 0;
  bool all_finite = true;
  std::mutex mutex;
  at::parallel_for(0, total, std::max<int64_t>(1, 262144 / dim), [&](int64_t begin, int64_t end) {
    int32_t mine = largest_magnitude(values + begin * dim, (end - begin) * dim);
    const bool finite = mine < INFINITE;
    if (!finite) {
      mine = 0;
      for (int64_t j = begin; j < end; ++j) {
        const int32_t row = largest_magnitude(values + j * dim, dim);
        if (row < INFINITE) mine = std::max(mine, row);
      }
    }
    std::lock_guard<std::mutex> lock(mutex);
    largest = std::max(largest, mine);
    all_finite = all_finite && finite;
  });
  book.count = total;
  if (!all_finite) {
    for (int64_t j = 0; j < total; ++j)
      if (largest_magnitude(values + j * dim, dim) < INFINITE) book.positions.push_back(static_cast<int32_t>(j));
    book.count = static_cast<int64_t>(book.positions.size());
  }
  float value;
  std::memcpy(&value, &largest, 4);
  return value;
}

void fill(PackedCodebook& book, const Kernels& kernels) {
  Codes& codes = book.codes;
  std::mutex mutex;
  at::parallel_for(0, codes.groups, std::max<int64_t>(1, 1024 / codes.dim), [&](int64_t begin, int64_t end) {
    std::unique_ptr<float[]> rows(new float[GROUP * codes.dim]);
    GroupBounds bounds = {0, 0, 0};
    for (int64_t g = begin; g < end; ++g) {
      const float* source = rows.get();
      if (book.positions.empty() && (g + 1) * GROUP <= book.count)
        source = book.code(g * GROUP);
      else
        for (int64_t c = 0; c < GROUP; ++c)
          std::memcpy(&rows[c * codes.dim], book.code(std::min(g * GROUP + c, book.count - 1)), codes.dim * 4);
      const GroupBounds group = kernels.pack_codes(source, book.scale, codes, g);
      bounds.norm = std::max(bounds.norm, group.norm);
      bounds.residual = std::max(bounds.residual, group.residual);
      bounds.bias = std::max(bounds.bias, group.bias);
    }
    std::lock_guard<std::mutex> lock(mutex);
    codes.max_norm = std::max(codes.max_norm, bounds.norm);
    codes.max_residual = std::max(codes.max_residual, bounds.residual);
    if (codes.bias) codes.max_bias = std::max(codes.max_bias, bounds.bias);
  });
}

}  // namespace

PackedCodebook pack_codebook(const at::Tensor& codebook, bool cosine, const Kernels& kernels) {
  PackedCodebook book;
  book.values = codebook.to(at::kFloat).contiguous();
  const int64_t dim = codebook.size(1);
  const float largest = measure(book, codebook.size(0), dim);
  // A power of two that is a float and brings the largest magnitude to [1, 4).
  if (largest > 0) book.scale = std::ldexp(1.0f, -std::clamp(std::ilogb(largest), -126, 126));
  Codes& codes = book.codes;
  codes.groups = (book.count + GROUP - 1) / GROUP;
  codes.dim = dim;
  codes.depth = (dim + 3) / 4 * 4;
  if (!book.count) return book;
  const int64_t padded = codes.groups * GROUP;
  book.packed.reset(codes.packed = new float[padded * dim]);
  if (!cosine) book.bias.reset(codes.bias = new float[padded]);
  if (kernels.screen_bytes && dim <= WIDEST_BYTES) {
    codes.step = largest > 0 ? largest * book.scale / 126.99f : 1.0f;
    book.bytes.reset(codes.bytes = new int8_t[padded * codes.depth]);
    book.offset.reset(codes.offset = new int32_t[padded]);
  }
  fill(book, kernels);
  return book;
}

}  // namespace beitv2_fast
