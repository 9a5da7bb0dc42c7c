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
constexpr int FARTHEST_EXPONENT = 20;    // of the largest magnitude that is searched without a scaled copy

// The group [8, dim] that is read past the last code: its codes, then copies of the last.
void pad_last_group(PackedCodebook& book) {
  const int64_t dim = book.codes.dim, first = (book.codes.groups - 1) * GROUP;
  book.last.resize(GROUP * dim);
  for (int64_t c = 0; c < GROUP; ++c)
    std::copy_n(book.codes.rows + std::min(first + c, book.codes.count - 1) * dim, dim, &book.last[c * dim]);
  book.codes.last = book.last.data();
}

GroupBounds measure(PackedCodebook& book, const Kernels& kernels) {
  GroupBounds bounds = {};
  std::mutex mutex;
  pad_last_group(book);
  at::parallel_for(0, book.codes.groups, std::max<int64_t>(1, 8192 / book.codes.dim), [&](int64_t begin, int64_t end) {
    GroupBounds mine = {};
    for (int64_t g = begin; g < end; ++g) {
      const GroupBounds group = kernels.measure_group(book.codes, g);
      mine = {std::max(mine.square, group.square), std::max(mine.largest, group.largest)};
    }
    std::lock_guard<std::mutex> lock(mutex);
    bounds = {std::max(bounds.square, mine.square), std::max(bounds.largest, mine.largest)};
  });
  return bounds;
}

// Searches a copy of the codes: those that are left, times a power of two.
void copy_rows(PackedCodebook& book) {
  const int64_t dim = book.codes.dim;
  std::unique_ptr<float[]> rows(new float[book.codes.count * dim]);
  for (int64_t j = 0; j < book.codes.count; ++j)
    std::transform(book.code(j), book.code(j) + dim, &rows[j * dim], [&](float v) { return v * book.scale; });
  book.rows = std::move(rows);
  book.codes.rows = book.rows.get();
  book.codes.groups = (book.codes.count + GROUP - 1) / GROUP;
}

void keep_finite(PackedCodebook& book) {
  std::vector<int32_t> finite;
  for (int64_t j = 0; j < book.codes.count; ++j)
    if (std::all_of(book.code(j), book.code(j) + book.codes.dim, [](float v) { return std::isfinite(v); }))
      finite.push_back(static_cast<int32_t>(j));
  book.codes.count = static_cast<int64_t>(finite.size());
  book.positions = std::move(finite);
}

void fill_bytes(PackedCodebook& book, const Kernels& kernels) {
  Codes& codes = book.codes;
  book.bytes.reset(codes.bytes = new int8_t[codes.groups * GROUP * codes.depth]);
  book.offset.reset(codes.offset = new int32_t[codes.groups * GROUP]);
  std::mutex mutex;
  at::parallel_for(0, codes.groups, std::max<int64_t>(1, 8192 / codes.dim), [&](int64_t begin, int64_t end) {
    float most = 0;
    for (int64_t g = begin; g < end; ++g) most = std::max(most, kernels.pack_group(codes, g));
    std::lock_guard<std::mutex> lock(mutex);
    codes.max_residual = std::max(codes.max_residual, most);
  });
}

}  // namespace

PackedCodebook pack_codebook(const at::Tensor& codebook, bool cosine, bool bytes, const Kernels& kernels) {
  PackedCodebook book;
  Codes& codes = book.codes;
  book.values = codebook.to(at::kFloat).contiguous();
  book.codes.count = codebook.size(0);
  codes.rows = book.values.const_data_ptr<float>();
  codes.groups = (book.codes.count + GROUP - 1) / GROUP;
  codes.dim = codebook.size(1);
  codes.depth = (codes.dim + 3) / 4 * 4;
  if (!cosine) book.bias.reset(codes.bias = new float[codes.groups * GROUP]);
  GroupBounds bounds = measure(book, kernels);
  if (bounds.largest >= INFINITE) {
    keep_finite(book);
    copy_rows(book);
    if (!book.codes.count) return book;
    bounds = measure(book, kernels);
  }
  float largest;
  std::memcpy(&largest, &bounds.largest, sizeof largest);
  if (largest > 0 && std::abs(std::ilogb(largest)) > FARTHEST_EXPONENT) {
    // A power of two that is a float and brings the largest magnitude to [1, 4).
    book.scale = std::ldexp(1.0f, -std::clamp(std::ilogb(largest), -126, 126));
    copy_rows(book);
    bounds = measure(book, kernels);
  }
  codes.max_norm = std::sqrt(bounds.square);
  codes.max_bias = codes.bias ? 0.5f * bounds.square : 0;
  if (bytes && kernels.screen_bytes && codes.dim <= WIDEST_BYTES) {
    codes.step = largest > 0 ? largest * book.scale / 126.99f : 1.0f;
    fill_bytes(book, kernels);
  }
  return book;
}

}  // namespace beitv2_fast
