// Attention on the CPU: for each head of each image a few rows of scores at a time, which stay in the cache from the
// product that makes them to the product that reads them. All arithmetic is fp32; inputs of 16 bits are widened as they
// are packed. FLOPs 4 B H N^2 d forward and 10 B H N^2 d backward, where the scores are computed again. Beside inputs and
// outputs it holds a few rows of scores per thread.
//
//   cpu.cpp              the op: packs what each thread needs and calls the kernels
//   cpu_tiles.h          the kernels' table
//   cpu_tiles_kernels.h  the kernels: products of small matrices, rows of softmax
//   cpu_tiles.cpp        compiles them for each instruction set and picks (../cpu_variants.h)
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu_tiles.h"

namespace beitv2_fast {
namespace {

constexpr int64_t FORWARD_ROWS = 28, BACKWARD_ROWS = 112;  // rows of scores at a time
constexpr int64_t TASKS = 32;  // at least so many tasks backward, if there are so many heads and images

int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

// Row i of a [N, d] matrix with unit stride along d; `part` of qkv [B, N, 3, H, d], or of [B, N, H, d].
template <class T>
struct Rows {
  T* data;
  int64_t stride;

  Rows(const at::Tensor& qkv, int64_t b, int64_t part, int64_t h)
      : data(static_cast<T*>(qkv.data_ptr()) + b * qkv.stride(0) + part * qkv.stride(2) + h * qkv.stride(3)),
        stride(qkv.stride(1)) {}
  Rows(const at::Tensor& x, int64_t b, int64_t h)
      : data(static_cast<T*>(x.data_ptr()) + b * x.stride(0) + h * x.stride(2)), stride(x.stride(1)) {}

  T* operator[](int64_t i) const { return data + i * stride; }
};

// to [N, padded d] = scale * rows; the columns beyond d become 0.
template <class T>
void pack(const Rows<T>& rows, int64_t count, int64_t dim, float scale, float* to) {
  const int64_t width = padded(dim);
  for (int64_t i = 0; i < count; ++i, to += width) {
    const T* from = rows[i];
    for (int64_t p = 0; p < dim; ++p) to[p] = scale * static_cast<float>(from[p]);
    std::fill(to + dim, to + width, 0.0f);
  }
}

template <class T>
void unpack(const float* from, int64_t dim, float scale, T* to) {
  for (int64_t p = 0; p < dim; ++p) to[p] = static_cast<T>(scale * from[p]);
}

struct Shape {
  int64_t images, tokens, heads, dim, width, columns;

  explicit Shape(const at::Tensor& qkv)
      : images(qkv.size(0)), tokens(qkv.size(1)), heads(qkv.size(3)), dim(qkv.size(4)), width(padded(dim)),
        columns(padded(tokens)) {}

  std::vector<float> matrix() const { return std::vector<float>(tokens * width); }      // [N, padded d]
  std::vector<float> transposed() const { return std::vector<float>(dim * columns); }  // [d, padded N]
};

template <class T>
struct Forward {
  const attention::Kernels& kernels;
  Shape s;
  const at::Tensor &qkv, &out, &sums;
  const float* bias;  // [H, N, N] or null
  float scale;

  void run(int64_t begin, int64_t end) const {
    const int64_t n = s.tokens, w = s.width;
    std::vector<float> q = s.matrix(), k = s.matrix(), v = s.matrix(), kt = s.transposed();
    std::vector<float> scores(FORWARD_ROWS * s.columns), result(FORWARD_ROWS * w);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / s.heads, h = task % s.heads;
      pack(Rows<T>(qkv, b, 0, h), n, s.dim, scale, q.data());
      pack(Rows<T>(qkv, b, 1, h), n, s.dim, 1, k.data());
      pack(Rows<T>(qkv, b, 2, h), n, s.dim, 1, v.data());
      kernels.transpose(k.data(), w, n, s.dim, kt.data(), s.columns);
      const Rows<T> to(out, b, h);
      float* largest = sums.mutable_data_ptr<float>() + (b * s.heads + h) * n;
      float* inverse = largest + s.images * s.heads * n;
      const int64_t blocks = (n + FORWARD_ROWS - 1) / FORWARD_ROWS;
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * n / blocks, rows = (block + 1) * n / blocks - first;
        kernels.product(q.data() + first * w, w, 1, kt.data(), s.columns, scores.data(), s.columns, rows, s.columns,
                        s.dim, false);
        for (int64_t r = 0; r < rows; ++r) {
          const float* added = bias ? bias + (h * n + first + r) * n : nullptr;
          kernels.softmax(scores.data() + r * s.columns, added, n, largest + first + r, inverse + first + r);
        }
        kernels.product(scores.data(), s.columns, 1, v.data(), w, result.data(), w, rows, w, n, false);
        for (int64_t r = 0; r < rows; ++r) unpack(result.data() + r * w, s.dim, inverse[first + r], to[first + r]);
      }
    }
  }
};

template <class T>
struct Backward {
  const attention::Kernels& kernels;
  Shape s;
  const at::Tensor &grad, &qkv, &sums, &grad_qkv;
  const float* bias;  // [H, N, N] or null
  float* grad_bias;   // [groups, H, N, N] or null
  float scale;
  int64_t groups;  // of images; one after another add to the bias's gradient, so its bits do not depend on threads

  void run(int64_t begin, int64_t end) const {
    const int64_t w = s.width;
    std::vector<float> q = s.matrix(), k = s.matrix(), v = s.matrix(), g = s.matrix(), dk = s.matrix(), dv = s.matrix();
    std::vector<float> kt = s.transposed(), vt = s.transposed();
    const int64_t most = std::min(BACKWARD_ROWS, s.tokens);
    std::vector<float> p(most * s.columns), ds(most * s.columns), dq(most * w);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / s.heads, h = task % s.heads;
      float* added = grad_bias ? grad_bias + (group * s.heads + h) * s.tokens * s.tokens : nullptr;
      for (int64_t b = group * s.images / groups; b < (group + 1) * s.images / groups; ++b) {
        pack(Rows<T>(qkv, b, 0, h), s.tokens, s.dim, scale, q.data());
        pack(Rows<T>(qkv, b, 1, h), s.tokens, s.dim, 1, k.data());
        pack(Rows<T>(qkv, b, 2, h), s.tokens, s.dim, 1, v.data());
        pack(Rows<T>(grad, b, h), s.tokens, s.dim, 1, g.data());
        kernels.transpose(k.data(), w, s.tokens, s.dim, kt.data(), s.columns);
        kernels.transpose(v.data(), w, s.tokens, s.dim, vt.data(), s.columns);
        std::fill(dk.begin(), dk.end(), 0.0f);
        std::fill(dv.begin(), dv.end(), 0.0f);
        const int64_t blocks = (s.tokens + most - 1) / most;
        for (int64_t block = 0; block < blocks; ++block) {
          const int64_t first = block * s.tokens / blocks, rows = (block + 1) * s.tokens / blocks - first;
          probabilities(b, h, first, rows, q, kt, p);
          kernels.product(&g[first * w], w, 1, vt.data(), s.columns, ds.data(), s.columns, rows, s.columns, s.dim,
                          false);
          for (int64_t r = 0; r < rows; ++r)
            kernels.scores_gradient(&p[r * s.columns], &ds[r * s.columns],
                                    added ? added + (first + r) * s.tokens : nullptr, s.tokens);
          kernels.product(ds.data(), s.columns, 1, k.data(), w, dq.data(), w, rows, w, s.tokens, false);
          kernels.product(ds.data(), 1, s.columns, &q[first * w], w, dk.data(), w, s.tokens, w, rows, true);
          kernels.product(p.data(), 1, s.columns, &g[first * w], w, dv.data(), w, s.tokens, w, rows, true);
          const Rows<T> to(grad_qkv, b, 0, h);
          for (int64_t r = 0; r < rows; ++r) unpack(&dq[r * w], s.dim, scale, to[first + r]);
        }
        const Rows<T> to_k(grad_qkv, b, 1, h), to_v(grad_qkv, b, 2, h);
        for (int64_t i = 0; i < s.tokens; ++i) {
          unpack(&dk[i * w], s.dim, 1, to_k[i]);
          unpack(&dv[i * w], s.dim, 1, to_v[i]);
        }
      }
    }
  }

  void probabilities(int64_t b, int64_t h, int64_t first, int64_t rows, const std::vector<float>& q,
                     const std::vector<float>& kt, std::vector<float>& p) const {
    kernels.product(&q[first * s.width], s.width, 1, kt.data(), s.columns, p.data(), s.columns, rows, s.columns, s.dim,
                    false);
    const float* largest = sums.const_data_ptr<float>() + (b * s.heads + h) * s.tokens;
    const float* inverse = largest + s.images * s.heads * s.tokens;
    for (int64_t r = 0; r < rows; ++r) {
      const float* added = bias ? bias + (h * s.tokens + first + r) * s.tokens : nullptr;
      kernels.probabilities(&p[r * s.columns], added, s.tokens, largest[first + r], inverse[first + r]);
    }
  }
};

void check(const at::Tensor& qkv, const std::optional<at::Tensor>& bias) {
  TORCH_CHECK(qkv.dim() == 5 && qkv.size(2) == 3 && qkv.stride(4) == 1, "attention: qkv [B, N, 3, H, d], d contiguous");
  TORCH_CHECK(!bias || (bias->is_contiguous() && bias->scalar_type() == at::kFloat), "attention: bias fp32 contiguous");
}

template <class Run>
void with_type(at::ScalarType type, const Run& run) {
  if (type == at::kFloat) run(float{});
  else if (type == at::kBFloat16) run(c10::BFloat16{});
  else if (type == at::kHalf) run(c10::Half{});
  else TORCH_CHECK_TYPE(false, "attention: qkv must be fp32, bf16 or fp16 here; got ", type);
}

// qkv [B, N, 3, H, d], bias [H, N, N] -> out [B, N, H, d]; sums [2, B, H, N] fp32: each row's largest score, and
// 1 / sum_j e^(score_j - largest).
std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& qkv, const std::optional<at::Tensor>& bias, double scale) {
  check(qkv, bias);
  const Shape s(qkv);
  at::Tensor out = at::empty({s.images, s.tokens, s.heads, s.dim}, qkv.options());
  at::Tensor sums = at::empty({2, s.images, s.heads, s.tokens}, qkv.options().dtype(at::kFloat));
  const float* added = bias ? bias->const_data_ptr<float>() : nullptr;
  with_type(qkv.scalar_type(), [&](auto type) {
    const Forward<decltype(type)> task = {attention::kernels(), s, qkv, out, sums, added,
                                          static_cast<float>(scale)};
    at::parallel_for(0, s.images * s.heads, 1, [&](int64_t begin, int64_t end) { task.run(begin, end); });
  });
  return {out, sums};
}

// -> the gradients of qkv, and of the bias [H, N, N] (empty without `of_bias`).
std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad, const at::Tensor& qkv,
                                            const std::optional<at::Tensor>& bias, const at::Tensor& sums,
                                            double scale, bool of_bias) {
  check(qkv, bias);
  TORCH_CHECK(grad.stride(3) == 1 && sums.is_contiguous(), "attention: contiguous grad and sums");
  const Shape s(qkv);
  at::Tensor grad_qkv = at::empty({s.images, s.tokens, 3, s.heads, s.dim}, qkv.options());
  const int64_t groups = std::min(s.images, of_bias ? (TASKS + s.heads - 1) / s.heads : s.images);
  at::Tensor partial;
  if (of_bias) partial = at::zeros({groups, s.heads, s.tokens, s.tokens}, qkv.options().dtype(at::kFloat));
  const float* added = bias ? bias->const_data_ptr<float>() : nullptr;
  with_type(qkv.scalar_type(), [&](auto type) {
    const Backward<decltype(type)> task = {attention::kernels(), s, grad, qkv, sums, grad_qkv,
                                           added, of_bias ? partial.mutable_data_ptr<float>() : nullptr,
                                           static_cast<float>(scale), groups};
    at::parallel_for(0, groups * s.heads, 1, [&](int64_t begin, int64_t end) { task.run(begin, end); });
  });
  return {grad_qkv, of_bias ? partial.sum(0) : at::empty({0}, sums.options())};
}

TORCH_LIBRARY_FRAGMENT(beitv2_fast_cpu, m) {
  m.def("attention(Tensor qkv, Tensor? bias, float scale) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor grad, Tensor qkv, Tensor? bias, Tensor sums, float scale, bool of_bias) -> (Tensor, "
      "Tensor)");
}

TORCH_LIBRARY_IMPL(beitv2_fast_cpu, CPU, m) {
  m.impl("attention", forward);
  m.impl("attention_backward", backward);
}

}  // namespace
}  // namespace beitv2_fast
