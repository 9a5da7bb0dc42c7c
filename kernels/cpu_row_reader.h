// Rows of a tensor as floats, whatever its dtype and strides: in place where it already is that, else through a buffer.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstring>
#include <vector>

namespace beitv2_fast {

class RowReader {
 public:
  explicit RowReader(const at::Tensor& x)
      : data_(static_cast<const char*>(x.const_data_ptr())), type_(x.scalar_type()), dim_(x.size(1)),
        row_stride_(x.stride(0)), stride_(x.stride(1)) {
    if (!direct()) buffer_.resize(dim_);
  }

  // Valid until the next call.
  const float* row(int64_t i) {
    if (direct()) return reinterpret_cast<const float*>(data_) + i * row_stride_;
    if (type_ == at::kFloat) convert<float>(i);
    else if (type_ == at::kHalf) convert<c10::Half>(i);
    else if (type_ == at::kBFloat16) convert<c10::BFloat16>(i);
    else convert<double>(i);
    return buffer_.data();
  }

  void prefetch(int64_t i) const {
    const char* row = data_ + i * row_stride_ * static_cast<int64_t>(c10::elementSize(type_));
    __builtin_prefetch(row);
    __builtin_prefetch(row + 64);
  }

 private:
  bool direct() const { return type_ == at::kFloat && stride_ == 1; }

  template <class T>
  void convert(int64_t i) {
    const T* source = reinterpret_cast<const T*>(data_) + i * row_stride_;
    if (stride_ == 1)
      for (int64_t d = 0; d < dim_; ++d) buffer_[d] = static_cast<float>(source[d]);
    else
      for (int64_t d = 0; d < dim_; ++d) buffer_[d] = static_cast<float>(source[d * stride_]);
  }

  const char* data_;
  at::ScalarType type_;
  int64_t dim_, row_stride_, stride_;
  std::vector<float> buffer_;
};

}  // namespace beitv2_fast
