// Cross entropy of a chunk of logits, and its gradient in their place, while each row is in the cache.
//
// Reads and writes the R x V logits once from beyond the L2 cache (three times within it); about 12 FLOPs per logit,
// nothing beside the 4 C FLOPs per logit of the matrix products around it.
//
//   cpu.cpp                the op: a chunk of logits, shared out to threads in groups of rows
//   cpu_softmax.h          the kernels' table
//   cpu_softmax_kernels.h  the kernels: what is done to one row or group of rows
//   cpu_softmax.cpp        compiles them for each instruction set and picks (../cpu_variants.h)
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "cpu_softmax.h"

namespace beitv2_fast {
namespace {

constexpr int64_t GROUP = 8;  // rows scaled together: 8 x 8192 logits are 256 kB

struct Chunk {
  const softmax::Kernels& kernels;
  float* logits;
  const float* bias;  // or null
  const int64_t* labels;
  float* losses;
  bool* correct;
  int64_t classes;
  bool gradient;

  // Returns 1 / sum_j e^(x_j - max), the factor that makes the row a softmax.
  float loss(int64_t row) const {
    float* x = logits + row * classes;
    const int64_t label = labels[row];
    const float top = kernels.add_bias(x, bias, classes), target = x[label];
    // argmax is the label: nothing exceeds it, and no lower index equals it.
    const bool hit = target == top && std::find(x, x + label, top) == x + label;
    const double sum = kernels.exponentials(x, top, classes, gradient);
    losses[row] = static_cast<float>(static_cast<double>(top) - target + std::log(sum));
    correct[row] = hit && !std::isnan(sum);
    return static_cast<float>(1.0 / sum);
  }

  void run(int64_t begin, int64_t end, float* column_sums) const {
    float scale[GROUP];
    for (int64_t first = begin; first < end; first += GROUP) {
      const int64_t count = std::min(GROUP, end - first);
      for (int64_t r = 0; r < count; ++r) scale[r] = loss(first + r);
      if (!gradient) continue;
      float* rows = logits + first * classes;
      kernels.scale_rows(rows, scale, count, classes, column_sums);
      for (int64_t r = 0; r < count; ++r) {
        rows[r * classes + labels[first + r]] -= 1.0f;
        if (column_sums) column_sums[labels[first + r]] -= 1.0f;
      }
    }
  }
};

// logits [R, V] fp32 += bias, then (gradient) softmax - one_hot in their place, whose column sums go to grad_bias [V].
void softmax_cross_entropy_(const at::Tensor& logits, const std::optional<at::Tensor>& bias, const at::Tensor& labels,
                            const at::Tensor& losses, const at::Tensor& correct, bool gradient,
                            const std::optional<at::Tensor>& grad_bias) {
  const int64_t rows = logits.size(0), classes = logits.size(1);
  for (const at::Tensor& t : {logits, labels, losses, correct})
    TORCH_CHECK(t.is_contiguous() && t.size(0) == rows, "softmax_cross_entropy_: contiguous tensors with one row count");
  const Chunk chunk = {softmax::kernels(), logits.mutable_data_ptr<float>(),
                       bias ? bias->const_data_ptr<float>() : nullptr, labels.const_data_ptr<int64_t>(),
                       losses.mutable_data_ptr<float>(), correct.mutable_data_ptr<bool>(), classes, gradient};
  // One row of column sums per thread, added in order: the result does not depend on which thread is first.
  const int64_t threads = at::get_num_threads(), per_thread = (rows + threads - 1) / threads;
  const at::Tensor partial = grad_bias ? at::zeros({threads, classes}, logits.options()) : at::Tensor();
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      chunk.run(std::min(t * per_thread, rows), std::min((t + 1) * per_thread, rows),
                grad_bias ? partial.mutable_data_ptr<float>() + t * classes : nullptr);
  });
  for (int64_t t = 0; grad_bias && t < threads; ++t) grad_bias->add_(partial[t]);
}

TORCH_LIBRARY_FRAGMENT(beitv2_fast_cpu, m) {
  m.def(
      "softmax_cross_entropy_(Tensor(a!) logits, Tensor? bias, Tensor labels, Tensor(b!) losses, Tensor(c!) correct, "
      "bool gradient, Tensor(d!)? grad_bias) -> ()");
}

TORCH_LIBRARY_IMPL(beitv2_fast_cpu, CPU, m) { m.impl("softmax_cross_entropy_", softmax_cross_entropy_); }

}  // namespace
}  // namespace beitv2_fast
