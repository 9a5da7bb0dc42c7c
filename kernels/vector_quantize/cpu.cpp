// The derivative of vector_quantize on the CPU: reads x, the codes and the gradient once, writes the gradient for x.
//
//   cpu.cpp             the op
//   cpu_rows.h          the kernels' table
//   cpu_rows_kernels.h  the kernels: the derivative of one row
//   cpu_rows.cpp        compiles them for each instruction set and picks (../cpu_variants.h)
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "../cpu_row_reader.h"
#include "cpu_rows.h"

namespace beitv2_fast {
namespace {

constexpr int64_t GRAIN = 32768;  // elements that make a task worth a thread

// weight: the loss's gradient times 2 commitment_weight / (N D). shortest: that is rotated; negative: straight through.
template <class T>
void backward_as(const at::Tensor& x, const at::Tensor& quantized, const std::optional<at::Tensor>& grad, float weight,
                 bool cosine, double shortest, at::Tensor& result) {
  const int64_t dim = x.size(1);
  T* out = result.mutable_data_ptr<T>();
  const auto row_backward = cosine ? quantize_rows().backward_cosine : quantize_rows().backward_euclidean;
  at::parallel_for(0, x.size(0), std::max<int64_t>(1, GRAIN / dim), [&](int64_t begin, int64_t end) {
    RowReader xs(x), codes(quantized), gs(grad ? *grad : x);
    std::vector<float> buffer(std::is_same_v<T, float> ? 0 : dim), rotated(shortest < 0 ? 0 : dim);
    for (int64_t i = begin; i < end; ++i) {
      const float* g = grad ? gs.row(i) : nullptr;
      if (g && shortest >= 0) {
        quantize_rows().rotate_back(xs.row(i), codes.row(i), g, shortest, cosine, dim, rotated.data());
        g = rotated.data();
      }
      if constexpr (std::is_same_v<T, float>) {
        row_backward(xs.row(i), codes.row(i), g, weight, dim, out + i * dim);
      } else {
        row_backward(xs.row(i), codes.row(i), g, weight, dim, buffer.data());
        for (int64_t d = 0; d < dim; ++d) out[i * dim + d] = static_cast<T>(buffer[d]);
      }
    }
  });
}

at::Tensor backward(const at::Tensor& x, const at::Tensor& quantized, const std::optional<at::Tensor>& grad,
                    double weight, bool cosine, double shortest) {
  at::Tensor result = at::empty(x.sizes(), x.options());
  const float w = static_cast<float>(weight);
  const auto dtype = x.scalar_type();
  if (dtype == at::kFloat) backward_as<float>(x, quantized, grad, w, cosine, shortest, result);
  else if (dtype == at::kHalf) backward_as<c10::Half>(x, quantized, grad, w, cosine, shortest, result);
  else if (dtype == at::kBFloat16) backward_as<c10::BFloat16>(x, quantized, grad, w, cosine, shortest, result);
  else TORCH_CHECK_TYPE(false, "vector_quantize: x must be fp32, fp16 or bf16 here; got ", dtype);
  return result;
}

TORCH_LIBRARY_FRAGMENT(beitv2_fast_cpu, m) {
  m.def(
      "vector_quantize_backward(Tensor x, Tensor quantized, Tensor? grad, float weight, bool cosine, float shortest) "
      "-> Tensor");
}

TORCH_LIBRARY_IMPL(beitv2_fast_cpu, CPU, m) { m.impl("vector_quantize_backward", backward); }

}  // namespace
}  // namespace beitv2_fast
