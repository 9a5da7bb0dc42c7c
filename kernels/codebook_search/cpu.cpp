// codebook_search on the CPU: blocks of 192 vectors, screened against all codes, then resolved one by one.
//
// FLOPs 2 N K D in the screening. Memory: the codes once more as bf16 and fp32, a few hundred kB a thread, the outputs.
#include "cpu_search.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "../cpu_capability.h"
#include "cpu_codes.h"
#include "cpu_exact.h"

namespace beitv2_fast {
namespace {

constexpr int64_t ROWS = PANELS * PANEL;
// Resolving a group costs about as much as screening this many codes in fp32: beyond, bf16 screens too little.
constexpr int64_t TOO_MANY_CANDIDATES = 24;

const Kernels& kernels_for(Capability capability) {
  switch (capability) {
    case Capability::amx_bf16: return amx_bf16_kernels();
    case Capability::avx512_bf16: return avx512_bf16_kernels();
    case Capability::avx512: return avx512_kernels();
    case Capability::avx2: return avx2_kernels();
    default: return portable_kernels();
  }
}

struct Job {
  const Kernels& kernels;
  const PackedCodebook& book;
  at::Tensor x;
  bool cosine;
  int64_t* indices;
  float *normalized, *distances;  // or null
  char* found;                    // the codes, or null
  const char* codebook;           // contiguous, in its own dtype
  int64_t code_bytes;
};

// One thread's buffers and the steps of a block.
class Worker {
 public:
  explicit Worker(const Job& job)
      : job_(job), codes_(job.book.codes), rows_(new float[ROWS * codes_.dim]), panels_(new float[ROWS * codes_.depth]),
        group_max_(new float[ROWS * CHUNK]), exact_row_(codes_.dim), screen_(job.kernels.fast ? job.kernels.fast : job.kernels.exact) {
    screen_->enter();
  }
  ~Worker() { screen_->leave(); }

  void run(int64_t first, int64_t count) {
    load(first, count);
    for (int64_t i = 0; i < count; ++i) row_candidates(i).clear();
    const int64_t found = codes_.groups ? screen(count) : 0;
    for (int64_t i = 0; i < count; ++i) finish(first + i, i);
    if (screen_->bf16 && found > TOO_MANY_CANDIDATES * count) {
      screen_->leave();
      screen_ = job_.kernels.exact;
      screen_->enter();
    }
  }

 private:
  struct Candidate {
    std::vector<int32_t> group;
    std::vector<float> screened;
    void clear() { group.clear(), screened.clear(); }
  };
  Candidate& row_candidates(int64_t i) { return candidates_[i]; }

  template <class T>
  void load_as(int64_t first, int64_t count) {
    const T* x = job_.x.const_data_ptr<T>();
    const int64_t row_stride = job_.x.stride(0), stride = job_.x.stride(1);
    for (int64_t i = 0; i < count; ++i) {
      const T* source = x + (first + i) * row_stride;
      float* row = rows_.get() + i * codes_.dim;
      if (stride == 1)
        for (int64_t d = 0; d < codes_.dim; ++d) row[d] = static_cast<float>(source[d]);
      else
        for (int64_t d = 0; d < codes_.dim; ++d) row[d] = static_cast<float>(source[d * stride]);
    }
  }

  // fp64 rows are scaled before they become fp32, whose range they may exceed.
  void load_double(int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      float* row = rows_.get() + i * codes_.dim;
      exact_exponent_[i] = 0;
      read_row(first + i);
      double largest = 0;
      bool finite = true;
      for (double value : exact_row_) largest = std::max(largest, std::fabs(value)), finite = finite && std::isfinite(value);
      if (finite && largest > 0) exact_exponent_[i] = job_.cosine ? std::ilogb(largest) : job_.book.exponent;
      for (int64_t d = 0; d < codes_.dim; ++d) {
        const double scaled = std::ldexp(exact_row_[d], -exact_exponent_[i]);
        row[d] = static_cast<float>(finite ? std::clamp(scaled, -0x1p100, 0x1p100) : exact_row_[d]);
      }
    }
  }

  void load(int64_t first, int64_t count) {
    const auto dtype = job_.x.scalar_type();
    if (dtype == at::kFloat) load_as<float>(first, count);
    else if (dtype == at::kHalf) load_as<c10::Half>(first, count);
    else if (dtype == at::kBFloat16) load_as<c10::BFloat16>(first, count);
    else load_double(first, count);
    const int64_t panels = (count + PANEL - 1) / PANEL, dim = codes_.dim;
    std::fill(rows_.get() + count * dim, rows_.get() + panels * PANEL * dim, 0.0f);
    const float scale = dtype == at::kDouble ? 1.0f : static_cast<float>(std::ldexp(1.0, -job_.book.exponent));
    for (int64_t p = 0; p < panels; ++p)
      job_.kernels.pack_rows(rows_.get() + p * PANEL * dim, codes_, job_.cosine, scale, screen_->bf16, panel(p),
                             info_ + p * PANEL);
    if (panels % 2) std::fill_n(static_cast<float*>(panel(panels)), panel_floats(), 0.0f);
  }

  int64_t panel_floats() const { return screen_->bf16 ? codes_.depth / 2 * PANEL : codes_.dim * PANEL; }
  void* panel(int64_t p) { return panels_.get() + p * panel_floats(); }

  // Fills the candidates of every row; returns how many there are.
  int64_t screen(int64_t count) {
    const int64_t panels = (count + PANEL - 1) / PANEL;
    int64_t found = 0;
    std::fill_n(best_, ROWS, -std::numeric_limits<float>::infinity());
    for (int64_t begin = 0; begin < codes_.groups; begin += CHUNK) {
      const int64_t end = std::min(begin + CHUNK, codes_.groups);
      screen_->run(codes_, panels_.get(), panels, begin, end, group_max_.get(), best_);
      for (int64_t p = 0; p < panels; ++p) {
        std::fill_n(chunk_.count, PANEL, 0);
        job_.kernels.filter(group_max_.get() + p * CHUNK * PANEL, best_ + p * PANEL, info_ + p * PANEL, begin, end, chunk_);
        for (int64_t lane = 0; lane < PANEL && p * PANEL + lane < count; ++lane) {
          const int64_t i = p * PANEL + lane, n = chunk_.count[lane];
          if (!info_[i].finite || info_[i].far || (info_[i].zero && job_.cosine)) continue;  // have another answer
          found += n;
          candidates_[i].group.insert(candidates_[i].group.end(), chunk_.group[lane], chunk_.group[lane] + n);
          candidates_[i].screened.insert(candidates_[i].screened.end(), chunk_.screened[lane], chunk_.screened[lane] + n);
        }
      }
    }
    return found;
  }

  template <class T>
  void read_as(int64_t row) {
    const T* source = job_.x.const_data_ptr<T>() + row * job_.x.stride(0);
    for (int64_t d = 0; d < codes_.dim; ++d) exact_row_[d] = static_cast<double>(source[d * job_.x.stride(1)]);
  }

  // The row as it was given, in double.
  void read_row(int64_t row) {
    const auto dtype = job_.x.scalar_type();
    if (dtype == at::kFloat) read_as<float>(row);
    else if (dtype == at::kHalf) read_as<c10::Half>(row);
    else if (dtype == at::kBFloat16) read_as<c10::BFloat16>(row);
    else read_as<double>(row);
  }

  // The best of `count` positions (all of them when kept is null) in twice double precision.
  int64_t settle(int64_t row, int64_t i, const int32_t* kept, int64_t count) {
    read_row(row);
    const bool wide = job_.book.values.scalar_type() == at::kDouble || job_.x.scalar_type() == at::kDouble;
    const int exponent = job_.cosine ? info_[i].exponent + exponent_of(i) : job_.book.exponent;
    for (double& value : exact_row_) value = std::ldexp(value, -exponent);
    const double scale = std::ldexp(1.0, -job_.book.exponent);
    const auto position = [kept](int64_t n) { return kept ? static_cast<int64_t>(kept[n]) : n; };
    const auto best = [&](auto* values) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(values)>>;
      const auto code = [&](int64_t n) { return values + job_.book.original(n) * codes_.dim; };
      return exact_best<T>(exact_row_.data(), count, position, code, scale, codes_.dim, job_.cosine, !wide);
    };
    return job_.book.values.scalar_type() == at::kDouble ? best(job_.book.values.const_data_ptr<double>())
                                                         : best(job_.book.values.const_data_ptr<float>());
  }

  int exponent_of(int64_t i) const { return job_.x.scalar_type() == at::kDouble ? exact_exponent_[i] : 0; }

  int64_t nearest(int64_t row, int64_t i) {
    const Row& info = info_[i];
    if (!info.finite || !codes_.groups) return 0;
    if (info.zero && job_.cosine) return job_.book.original(0);
    if (info.far) return job_.book.original(settle(row, i, nullptr, job_.book.count));
    const Candidate& groups = candidates_[i];
    const int64_t count = static_cast<int64_t>(groups.group.size());
    if (static_cast<int64_t>(scores_.size()) < count * GROUP) scores_.resize(count * GROUP), kept_.resize(count * (GROUP + 1));
    int64_t kept = job_.kernels.resolve(codes_, rows_.get() + i * codes_.dim, info, groups.group.data(),
                                        groups.screened.data(), count, best_[i] - 2 * info.screen_error, scores_.data(),
                                        kept_.data());
    while (kept > 1 && kept_[kept - 1] >= job_.book.count) --kept;  // the copies that pad the last group
    return job_.book.original(kept == 1 ? kept_[0] : settle(row, i, kept_.data(), kept));
  }

  void finish(int64_t row, int64_t i) {
    const int64_t index = nearest(row, i);
    job_.indices[row] = index;
    if (job_.found) std::memcpy(job_.found + row * job_.code_bytes, job_.codebook + index * job_.code_bytes, job_.code_bytes);
    if (job_.normalized) compare(row, i, index);
  }

  // Writes the vector that was compared, and its distance from the code.
  void compare(int64_t row, int64_t i, int64_t index) {
    const Row& info = info_[i];
    const int64_t dim = codes_.dim;
    float* y = job_.normalized + row * dim;
    const float* scaled = rows_.get() + i * dim;
    if (!info.finite) {
      std::fill_n(y, dim, std::numeric_limits<float>::quiet_NaN());
    } else if (!job_.cosine) {
      read_row(row);
      for (int64_t d = 0; d < dim; ++d) y[d] = static_cast<float>(exact_row_[d]);
    } else {
      const double norm = std::ldexp(static_cast<double>(info.norm), info.exponent + exponent_of(i));
      // The denominator is max(norm, 1e-12), in the row's own scale.
      const float denominator = norm >= 1e-12 ? info.norm : static_cast<float>(std::ldexp(1e-12, -info.exponent - exponent_of(i)));
      for (int64_t d = 0; d < dim; ++d) y[d] = scaled[d] / denominator;
    }
    if (!job_.distances) return;
    if (job_.book.values.scalar_type() == at::kDouble) job_.distances[row] = distance(y, job_.book.values.const_data_ptr<double>() + index * dim);
    else job_.distances[row] = distance(y, job_.book.values.const_data_ptr<float>() + index * dim);
  }

  template <class T>
  float distance(const float* y, const T* code) const {
    float lanes[PANEL] = {}, sum = 0;
    int64_t d = 0;
    for (; d + PANEL <= codes_.dim; d += PANEL)
      for (int64_t l = 0; l < PANEL; ++l) {
        const float difference = y[d + l] - static_cast<float>(code[d + l]);
        lanes[l] += difference * difference;
      }
    for (; d < codes_.dim; ++d) {
      const float difference = y[d] - static_cast<float>(code[d]);
      sum += difference * difference;
    }
    for (float lane : lanes) sum += lane;
    return sum;
  }

  const Job& job_;
  const Codes& codes_;
  std::unique_ptr<float[]> rows_, panels_, group_max_;
  std::vector<double> exact_row_;
  std::vector<float> scores_;
  std::vector<int32_t> kept_;
  const Screen* screen_;
  Candidates chunk_;
  Candidate candidates_[ROWS];
  Row info_[ROWS];
  float best_[ROWS];
  int exact_exponent_[ROWS];
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> search(const at::Tensor& x, const at::Tensor& codebook, bool cosine,
                                                                  bool want_normalized, bool want_codes, bool want_distances) {
  const int64_t rows = x.size(0), dim = x.size(1);
  const Kernels& kernels = kernels_for(cpu_capability());
  const at::Tensor contiguous = codebook.contiguous();
  const PackedCodebook book = pack_codebook(contiguous, cosine, kernels);
  const auto floats = x.options().dtype(at::kFloat);
  at::Tensor indices = at::empty({rows}, x.options().dtype(at::kLong));
  at::Tensor normalized = at::empty({want_normalized ? rows : 0, dim}, floats);
  at::Tensor codes = at::empty({want_codes ? rows : 0, dim}, codebook.options());
  at::Tensor distances = at::empty({want_distances ? rows : 0}, floats);
  (void)normalized;
  const Job job = {kernels, book, x, cosine, indices.mutable_data_ptr<int64_t>(),
                   want_normalized ? normalized.mutable_data_ptr<float>() : nullptr,
                   want_distances ? distances.mutable_data_ptr<float>() : nullptr,
                   want_codes ? static_cast<char*>(codes.mutable_data_ptr()) : nullptr,
                   static_cast<const char*>(contiguous.const_data_ptr()), dim * static_cast<int64_t>(codebook.element_size())};
  const int64_t panels = (rows + PANEL - 1) / PANEL;
  const int64_t grain = std::max<int64_t>(1, 1000000 / (PANEL * dim * codebook.size(0)));
  at::parallel_for(0, panels, grain, [&](int64_t begin, int64_t end) {
    Worker worker(job);
    for (int64_t p = begin; p < end; p += PANELS)
      worker.run(p * PANEL, std::min(std::min(p + PANELS, end) * PANEL, rows) - p * PANEL);
  });
  return {indices, normalized, codes, distances};
}

TORCH_LIBRARY_FRAGMENT(beitv2_fast_cpu, m) {
  m.def(
      "codebook_search(Tensor x, Tensor codebook, bool cosine, bool want_normalized, bool want_codes, "
      "bool want_distances) -> (Tensor indices, Tensor normalized, Tensor codes, Tensor distances)");
}

TORCH_LIBRARY_IMPL(beitv2_fast_cpu, CPU, m) { m.impl("codebook_search", search); }

}  // namespace
}  // namespace beitv2_fast
