// codebook_update on the CPU: vectors sorted by code and summed run by run, then one pass over the codes.
//
// Statistics read N (D + 1) elements and write K (1 + D) integers; no buffer per thread. The second pass reads these and
// reads and writes the state once. Integers are added, so neither the threads' shares nor their order show in the bits.
//
//   cpu.cpp             the two ops, one for each pass, and the sums as vector_quantize's gradient of a codebook
//   cpu_rows.h          the kernels' table
//   cpu_rows_kernels.h  the kernels: the arithmetic of reference.py on one row
//   cpu_rows.cpp        compiles them for each instruction set and picks (../cpu_variants.h)
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <optional>

#include "../cpu_row_reader.h"
#include "cpu_rows.h"

namespace beitv2_fast {
namespace {

constexpr int64_t GRAIN = 16384;  // elements that make a task worth a thread
constexpr int64_t AHEAD = 8;      // rows fetched before they are needed

int64_t grain(int64_t width) { return std::max<int64_t>(1, GRAIN / width); }

struct SortedRows {
  std::vector<int32_t> rows;   // by code
  std::vector<int32_t> begin;  // of each code [K + 1]
};

// A counting sort; rows with index -1 are left out.
SortedRows sort_by_code(const at::Tensor& indices, int64_t num_codes) {
  const int64_t* index = indices.const_data_ptr<int64_t>();
  const int64_t stride = indices.stride(0), count = indices.size(0);
  SortedRows sorted;
  sorted.begin.assign(num_codes + 2, 0);
  int32_t* next = sorted.begin.data() + 1;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t code = index[i * stride];
    TORCH_CHECK_INDEX(code >= -1 && code < num_codes, "codebook_update: indices must lie in 0..", num_codes - 1,
                      ", or be -1 for vectors not to be counted; got ", code, " at position ", i);
    if (code >= 0) ++next[code + 1];
  }
  std::partial_sum(next, next + num_codes + 1, next);
  sorted.rows.resize(next[num_codes]);
  for (int64_t i = 0; i < count; ++i)
    if (index[i * stride] >= 0) sorted.rows[next[index[i * stride]]++] = static_cast<int32_t>(i);
  return sorted;  // begin[j] is now where code j begins, as next[j - 1] is where code j - 1 ends
}

at::Tensor statistics(const at::Tensor& x, const at::Tensor& indices, int64_t num_codes, bool cosine) {
  const int64_t dim = x.size(1), width = 1 + (cosine ? dim : 2 * dim);
  TORCH_CHECK_VALUE(x.size(0) <= INT32_MAX, "codebook_update: at most 2^31 - 1 vectors; got ", x.size(0));
  at::Tensor result = at::zeros({num_codes, width}, x.options().dtype(at::kLong));
  int64_t* sums = result.mutable_data_ptr<int64_t>();
  const auto add = cosine ? update_rows().add_cosine : update_rows().add_euclidean;
  const SortedRows sorted = sort_by_code(indices, num_codes);
  const int64_t count = static_cast<int64_t>(sorted.rows.size());
  at::parallel_for(0, count, grain(dim), [&](int64_t begin, int64_t end) {
    RowReader reader(x);
    std::vector<int64_t> shared(width);
    const int32_t* first = sorted.begin.data();
    int64_t code = std::upper_bound(first, first + num_codes + 1, static_cast<int32_t>(begin)) - first - 1;
    for (int64_t i = begin; i < end; ++code) {
      const int64_t stop = std::min<int64_t>(first[code + 1], end);
      if (stop == i) continue;
      const bool alone = first[code] >= begin && first[code + 1] <= end;
      int64_t* out = sums + code * width;
      int64_t* target = alone ? out : shared.data();
      for (; i < stop; ++i) {
        if (i + AHEAD < end) reader.prefetch(sorted.rows[i + AHEAD]);
        target[0] += add(reader.row(sorted.rows[i]), dim, target + 1);
      }
      if (alone) continue;
      for (int64_t w = 0; w < width; ++w) std::atomic_ref<int64_t>(out[w]).fetch_add(shared[w], std::memory_order_relaxed);
      std::fill(shared.begin(), shared.end(), 0);
    }
  });
  return result;
}

// vector_quantize's codebook_gradient: of each code [K, D] scale * (how many vectors chose it * code - their sum).
at::Tensor codebook_gradient(const at::Tensor& x, const at::Tensor& indices, const at::Tensor& codes, double scale,
                             bool cosine) {
  const int64_t dim = x.size(1), num_codes = codes.size(0);
  TORCH_CHECK_VALUE(x.size(0) <= INT32_MAX, "vector_quantize: at most 2^31 - 1 vectors; got ", x.size(0));
  at::Tensor result = at::zeros(codes.sizes(), codes.options());
  const float* code = codes.const_data_ptr<float>();
  float* out = result.mutable_data_ptr<float>();
  const auto add = cosine ? update_rows().add_cosine : update_rows().add_euclidean;
  const auto pull = cosine ? update_rows().pull_cosine : update_rows().pull_euclidean;
  const SortedRows sorted = sort_by_code(indices, num_codes);
  at::parallel_for(0, num_codes, grain(dim), [&](int64_t begin, int64_t end) {
    RowReader reader(x);
    std::vector<int64_t> sums(2 * dim);
    for (int64_t j = begin; j < end; ++j) {
      int64_t count = 0;
      std::fill(sums.begin(), sums.end(), 0);
      for (int32_t i = sorted.begin[j]; i < sorted.begin[j + 1]; ++i) {
        if (i + AHEAD < sorted.begin[end]) reader.prefetch(sorted.rows[i + AHEAD]);
        count += add(reader.row(sorted.rows[i]), dim, sums.data());
      }
      if (count) pull(sums.data(), code + j * dim, dim, static_cast<double>(count), scale, out + j * dim);
    }
  });
  return result;
}

using MaybeTensor = std::optional<at::Tensor>;

struct Update {
  const int64_t* statistics;
  int64_t num_codes, dim, width;
  float *codebook, *cluster_size, *embed_avg;  // embed_avg may be null
  float decay, rest, eps;
  double total;
  bool cosine;

  void move_sphere(const UpdateRows& rows, int64_t j, float* mean) const {
    const int64_t* row = statistics + j * width;
    float* code = codebook + j * dim;
    if (row[0] > 0) {
      (cosine ? rows.mean_cosine : rows.mean_euclidean)(row + 1, dim, 1 / static_cast<double>(row[0]), mean);
      rows.l2(mean, dim, mean);
    }
    rows.mix(code, row[0] > 0 ? mean : code, dim, decay, rest, code);
    rows.l2(code, dim, code);
  }

  void move_average(const UpdateRows& rows, int64_t j, float* sum) const {
    float *average = embed_avg + j * dim, *code = codebook + j * dim;
    (cosine ? rows.mean_cosine : rows.mean_euclidean)(statistics + j * width + 1, dim, 1, sum);
    rows.mix(average, sum, dim, decay, rest, average);
    const double k_eps = static_cast<double>(num_codes) * eps;
    const double smoothed = (static_cast<double>(cluster_size[j]) + eps) / (total + k_eps) * total;
    if (!(smoothed > 0)) return;
    rows.scale(average, dim, 1 / smoothed, code);
    if (cosine) rows.l2(code, dim, code);
  }
};

// First the sizes, whose total the codes need.
void move_sizes(Update& update, int64_t* bins) {
  int64_t total = 0;
  for (int64_t j = 0; j < update.num_codes; ++j) {
    bins[j] = update.statistics[j * update.width];
    const double moved = static_cast<double>(update.decay) * update.cluster_size[j] +
                         static_cast<double>(update.rest) * static_cast<float>(bins[j]);
    update.cluster_size[j] = static_cast<float>(moved);
    total += std::llrint(static_cast<double>(update.cluster_size[j]) * 0x1p30);
  }
  update.total = static_cast<double>(total) * 0x1p-30;
}

at::Tensor apply(const at::Tensor& statistics, const at::Tensor& codebook, const at::Tensor& cluster_size,
                 const MaybeTensor& embed_avg, double decay, bool cosine, double eps) {
  Update update = {};
  update.statistics = statistics.const_data_ptr<int64_t>();
  update.num_codes = codebook.size(0), update.dim = codebook.size(1), update.width = statistics.size(1);
  update.codebook = codebook.mutable_data_ptr<float>();
  update.cluster_size = cluster_size.mutable_data_ptr<float>();
  update.embed_avg = embed_avg ? embed_avg->mutable_data_ptr<float>() : nullptr;
  update.decay = static_cast<float>(decay), update.rest = static_cast<float>(1 - decay);
  update.eps = static_cast<float>(eps), update.cosine = cosine;
  at::Tensor bins = at::empty({update.num_codes}, statistics.options());
  move_sizes(update, bins.mutable_data_ptr<int64_t>());
  const UpdateRows& rows = update_rows();
  at::parallel_for(0, update.num_codes, grain(update.width), [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(update.dim);
    for (int64_t j = begin; j < end; ++j) {
      if (update.embed_avg) update.move_average(rows, j, buffer.data());
      else update.move_sphere(rows, j, buffer.data());
    }
  });
  return bins;
}

TORCH_LIBRARY_FRAGMENT(beitv2_fast_cpu, m) {
  m.def("codebook_gradient(Tensor x, Tensor indices, Tensor codes, float scale, bool cosine) -> Tensor");
  m.def("codebook_statistics(Tensor x, Tensor indices, int num_codes, bool cosine) -> Tensor");
  m.def(
      "move_codebook(Tensor statistics, Tensor(a!) codebook, Tensor(b!) cluster_size, Tensor(c!)? embed_avg, "
      "float decay, bool cosine, float eps) -> Tensor");
}

TORCH_LIBRARY_IMPL(beitv2_fast_cpu, CPU, m) {
  m.impl("codebook_gradient", codebook_gradient);
  m.impl("codebook_statistics", statistics);
  m.impl("move_codebook", apply);
}

}  // namespace
}  // namespace beitv2_fast
