// See cpu_few.h. A pass over runs of codes scores them in fp32, with the error bound of cpu_search.h, and keeps those
// that may be among the k best; what is within the bound at the end is compared exactly. FLOPs 2 (N + 1) K D: the bound
// needs the codes' squares.
#include "cpu_few.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <mutex>
#include <numeric>

namespace beitv2_fast {
namespace {

constexpr int64_t FEW = 64;               // vectors at most: see most_vectors
constexpr int64_t MOST = 16;              // codes to find, for each of which an exact score is cheap
constexpr int64_t RUN = 64;               // codes that are scored before their scores are looked at
constexpr float LEAST_SQUARE = 0x1p-40f;  // of the longest code; the greatest: its inverse

typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourInts __attribute__((vector_size(16)));

using Widen = void (*)(const void* codes, int64_t count, float* out);

struct Run {
  int64_t count, rows;   // of codes and vectors
  int64_t width;         // of a code in bytes
  Widen widen;           // to fp32, or null
  float* widened;        // room for four codes
  float largest, total;  // of |code|^2; the total is NaN or Inf if a code has one
  float highest[FEW];
  float scores[FEW][RUN];  // of <vector, code>, less |code|^2 / 2 for euclidean
};

struct alignas(64) Line {  // of a cache: registers of AVX-512 are loaded from two at half the speed
  float values[16];
};

// Of an fp16 or bf16 number.
struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

struct FewKernels {
  void (*score)(const char* codes, int64_t dim, const float* vectors, bool cosine, Run& run);
  Widen half, bfloat16;
};

}  // namespace
}  // namespace beitv2_fast

#ifdef __clang__
#define BEITV2_FAST_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define BEITV2_FAST_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, FourInts{__VA_ARGS__})
#endif
#define BEITV2_FAST_VARIANTS "codebook_search/cpu_few_kernels.h"
#include "../cpu_variants.h"

namespace beitv2_fast {
namespace {

// What may be among the k nearest codes of each vector, as far as the codes have been seen.
struct Nearest {
  struct Code {
    float most;  // that its score can be
    int64_t index;
  };
  int64_t k;
  std::vector<Code> codes[FEW];
  size_t many[FEW];       // codes are looked through again
  float least[FEW];       // that the k-th best score can be
  float error[FEW] = {};  // of one score
  float square = 0;       // the largest |code|^2 yet

  explicit Nearest(int64_t k) : k(k) {
    std::fill_n(least, FEW, -std::numeric_limits<float>::infinity());
    std::fill_n(many, FEW, 2 * k + RUN);
  }

  void add(const Run& run, int64_t first, const Row* info, int64_t dim, bool cosine) {
    if (run.largest > square) {
      square = run.largest;
      for (int64_t r = 0; r < run.rows; ++r)
        error[r] = fp32_error(dim, info[r].norm, std::sqrt(square), cosine ? 0 : square / 2);
    }
    for (int64_t r = 0; r < run.rows; ++r) {
      if (run.highest[r] + error[r] < least[r] || (cosine && info[r].norm == 0)) continue;  // has another answer
      if (k == 1) least[r] = std::max(least[r], run.highest[r] - error[r]);
      for (int64_t j = 0; j < run.count; ++j)
        if (const float most = run.scores[r][j] + error[r]; most >= least[r]) codes[r].push_back({most, first + j});
      if (codes[r].size() > many[r]) look_through(r);
    }
  }

  void add(const Nearest& other) {
    square = std::max(square, other.square);
    for (int64_t r = 0; r < FEW; ++r) {
      least[r] = std::max(least[r], other.least[r]), error[r] = std::max(error[r], other.error[r]);
      codes[r].insert(codes[r].end(), other.codes[r].begin(), other.codes[r].end());
    }
  }

  void look_through(int64_t r) {
    std::vector<Code>& all = codes[r];
    std::nth_element(all.begin(), all.begin() + k - 1, all.end(), [](Code a, Code b) { return a.most > b.most; });
    least[r] = std::max(least[r], all[k - 1].most - 2 * error[r]);
    std::erase_if(all, [&](Code code) { return code.most < least[r]; });
    many[r] = 2 * (all.size() + RUN);
  }

  std::vector<Exact> of(int64_t r) {
    look_through(r);
    std::vector<Exact> left;
    for (const Code& code : codes[r]) left.push_back({{}, code.index});
    return left;
  }
};

// Scores all codes; false if one is not finite or too long.
bool scan(const Search& search, const float* vectors, const Row* info, Nearest& nearest) {
  const FewKernels& kernels = BEITV2_FAST_PICK(few_kernels);
  const at::Tensor& codebook = search.codebook;
  const int64_t codes = codebook.size(0), dim = codebook.size(1);
  const at::ScalarType type = codebook.scalar_type();
  const char* values = static_cast<const char*>(codebook.const_data_ptr());
  const int64_t width = dim * static_cast<int64_t>(codebook.element_size());
  std::atomic<bool> ordinary = true;
  std::mutex mutex;
  const int64_t grain = std::max<int64_t>(1, 65536 / (RUN * dim));
  at::parallel_for(0, (codes + RUN - 1) / RUN, grain, [&](int64_t begin, int64_t end) {
    Nearest mine(nearest.k);
    std::vector<Line> widened(type == at::kFloat ? 0 : dim / 4 + 1);
    Run run;
    run.rows = search.x.size(0), run.width = width, run.widened = reinterpret_cast<float*>(widened.data());
    run.widen = type == at::kFloat ? nullptr : type == at::kHalf ? kernels.half : kernels.bfloat16;
    for (int64_t first = begin * RUN; first < std::min(end * RUN, codes) && ordinary; first += RUN) {
      run.count = std::min(RUN, codes - first);
      kernels.score(values + first * width, dim, vectors, search.cosine, run);
      if (!(run.total < 1 / LEAST_SQUARE)) ordinary = false;
      mine.add(run, first, info, dim, search.cosine);
    }
    std::lock_guard<std::mutex> lock(mutex);
    nearest.add(mine);
  });
  return ordinary;
}

// Packing costs a pass over the codes and, of fp16 and bf16, a copy; here each score costs a sum across the lanes. The
// numbers are measured.
int64_t most_vectors(const Search& search) {
  if (search.k > 1) return 8;  // each of the k is scored exactly
  const bool portable = cpu_capability() == Capability::portable, copies = search.codebook.scalar_type() != at::kFloat;
  return std::min(FEW, 8 + search.codebook.size(1) / (portable ? 1 : copies ? 8 : 64));
}

}  // namespace

bool search_few(const Search& search) {
  const int64_t rows = search.x.size(0), dim = search.x.size(1);
  if (rows > most_vectors(search) || search.k > MOST || dim < 4) return false;
  RowReader reader(search.x), codes[2] = {RowReader(search.codebook), RowReader(search.codebook)};
  std::vector<Line> lines((rows + 3) * dim / 16 + 1);  // a pass reads up to 3 vectors behind the last
  float* vectors = lines.data()->values;
  Row info[FEW];
  for (int64_t i = 0; i < rows; ++i) std::copy_n(reader.row(i), dim, &vectors[i * dim]);
  float bias;
  Codes shape = {};
  shape.dim = dim, shape.bias = search.cosine ? nullptr : &bias;
  search.kernels.pack_rows(vectors, rows, shape, 1, false, nullptr, info);
  Nearest nearest(search.k);
  if (std::any_of(info, info + rows, [](const Row& row) { return row.far; })) return false;
  if (!scan(search, vectors, info, nearest) || nearest.square <= LEAST_SQUARE) return false;
  int64_t calls = 0;  // two codes are compared at a time
  const auto code = [&](int64_t index) { return codes[calls++ % 2].row(index); };
  for (int64_t i = 0; i < rows; ++i) {
    int64_t* found = search.indices + i * search.k;
    std::iota(found, found + search.k, 0);
    if (info[i].finite && !(info[i].zero && search.cosine)) {
      std::vector<Exact> left = nearest.of(i);
      if (left.size() > 1) exact_order(reader.row(i), left, search.k, code, dim, search.cosine);
      for (int64_t n = 0; n < search.k; ++n) found[n] = left[n].position;
    }
    if (search.k == 1) finish(search, reader.row(i), code(*found), i, *found, vectors);
  }
  return true;
}

}  // namespace beitv2_fast
