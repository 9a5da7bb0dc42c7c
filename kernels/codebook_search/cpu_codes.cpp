// See cpu_codes.h. Codes with NaN or Inf are left out, so that no later step has to ask.
#include "cpu_codes.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>

namespace beitv2_fast {
namespace {

template <class T, class Bits>
T largest_magnitude(const T* row, int64_t dim) {
  Bits largest = 0;
  for (int64_t d = 0; d < dim; ++d) {
    Bits bits;
    std::memcpy(&bits, row + d, sizeof(T));
    bits = static_cast<Bits>(bits << 1) >> 1;  // without the sign, NaN and Inf compare above every finite number
    largest = bits > largest ? bits : largest;
  }
  T value;
  std::memcpy(&value, &largest, sizeof(T));
  return value;
}

template <class T>
T largest_of(const T* row, int64_t dim) {
  if constexpr (sizeof(T) == 4) return largest_magnitude<T, uint32_t>(row, dim);
  return largest_magnitude<T, uint64_t>(row, dim);
}

// Finds the finite codes and the exponent of their largest element.
template <class T>
void measure(PackedCodebook& book, int64_t total, int64_t dim) {
  const T* values = book.values.const_data_ptr<T>();
  T largest = 0;
  bool all_finite = true;
  std::mutex mutex;
  at::parallel_for(0, total, std::max<int64_t>(1, 65536 / dim), [&](int64_t begin, int64_t end) {
    T mine = largest_of(values + begin * dim, (end - begin) * dim);
    bool finite = std::isfinite(mine);
    if (!finite) {
      mine = 0;
      for (int64_t j = begin; j < end; ++j) {
        const T row = largest_of(values + j * dim, dim);
        if (std::isfinite(row)) mine = std::max(mine, row);
      }
    }
    std::lock_guard<std::mutex> lock(mutex);
    largest = std::max(largest, mine);
    all_finite = all_finite && finite;
  });
  book.count = total;
  if (!all_finite) {
    for (int64_t j = 0; j < total; ++j)
      if (std::isfinite(largest_of(values + j * dim, dim))) book.positions.push_back(static_cast<int32_t>(j));
    book.count = static_cast<int64_t>(book.positions.size());
  }
  if (largest > 0) book.exponent = std::ilogb(largest);
  if (sizeof(T) == 4) book.exponent = std::clamp(book.exponent, -126, 126);  // so that 2^-exponent is a float
}

template <class T>
void fill(PackedCodebook& book, const Kernels& kernels) {
  Codes& codes = book.codes;
  const T* values = book.values.const_data_ptr<T>();
  const double scale = std::ldexp(1.0, -book.exponent);
  std::mutex mutex;
  at::parallel_for(0, codes.groups, std::max<int64_t>(1, 1024 / codes.dim), [&](int64_t begin, int64_t end) {
    std::unique_ptr<float[]> rows(new float[GROUP * codes.dim]);
    GroupBounds bounds = {0, 0, 0};
    for (int64_t g = begin; g < end; ++g) {
      const float* source = rows.get();
      float factor = 1;
      if constexpr (sizeof(T) == 4) factor = static_cast<float>(scale);
      if (sizeof(T) == 4 && book.positions.empty() && (g + 1) * GROUP <= book.count) {
        source = reinterpret_cast<const float*>(values + g * GROUP * codes.dim);
      } else {
        for (int64_t c = 0; c < GROUP; ++c) {
          const T* row = values + book.original(std::min(g * GROUP + c, book.count - 1)) * codes.dim;
          for (int64_t d = 0; d < codes.dim; ++d)
            rows[c * codes.dim + d] = sizeof(T) == 4 ? static_cast<float>(row[d]) : static_cast<float>(row[d] * scale);
        }
      }
      const GroupBounds group = kernels.pack_codes(source, factor, codes, g);
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
  const bool wide = codebook.scalar_type() == at::kDouble;
  book.values = (wide ? codebook : codebook.to(at::kFloat)).contiguous();
  const int64_t total = codebook.size(0), dim = codebook.size(1);
  wide ? measure<double>(book, total, dim) : measure<float>(book, total, dim);
  Codes& codes = book.codes;
  codes.groups = (book.count + GROUP - 1) / GROUP;
  codes.dim = dim;
  codes.depth = (dim + 31) / 32 * 32;
  if (!book.count) return book;
  book.packed.reset(new float[codes.groups * GROUP * dim]);
  codes.packed = book.packed.get();
  if (kernels.fast) {
    book.bf16.reset(new uint16_t[codes.groups * GROUP * codes.depth]);
    codes.bf16 = book.bf16.get();
  }
  if (!cosine) {
    book.bias.reset(new float[codes.groups * GROUP]);
    codes.bias = book.bias.get();
  }
  wide ? fill<double>(book, kernels) : fill<float>(book, kernels);
  return book;
}

}  // namespace beitv2_fast
