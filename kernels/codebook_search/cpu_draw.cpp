// draw_codes on the CPU: the argmax of s / temperature - log(-log u), where u is a hash of the row's key and the code.
//
// A code beats the best one so far only if -log u < e^(s / temperature - best), and 1 - u <= -log u. The search's
// screening (cpu_search.h) bounds s for each group of 8 codes, so a compare of integers rules out all codes but a few
// per row, whose scores and noise are then computed in double. FLOPs 2 N K D in the screening, about 14 integer
// operations per vector and code for the hash; memory: the search's, and 8 bytes per code.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu_block.h"

namespace beitv2_fast {
namespace {

constexpr int64_t ONE = int64_t{1} << 53;  // of u, as an integer

// Of s / temperature: b = group_max * factor + offset, or for euclidean -sqrt(-b) * of_root. top: the largest.
struct Bounds {
  float factor[PANEL], offset[PANEL], top[PANEL], of_root;
  bool cosine;
};

struct DrawKernels {
  void (*weigh)(float* group_max, int64_t groups, Bounds& bounds);
  int64_t (*scan)(const uint64_t* counters, uint64_t key, const float* weight, float factor, int64_t begin,
                  int64_t end, int64_t* uniform);
  double (*compare)(const float* x, const float* v, int64_t dim, bool cosine);
};

// The least u 2^53 for which 1 - u <= weight * factor / 2^53; 0 where that is NaN.
inline int64_t least_uniform(float weight, float factor) {
  const float most = weight * factor;
  return most < static_cast<float>(ONE) ? ONE - static_cast<int64_t>(most) : 0;
}

}  // namespace
}  // namespace beitv2_fast

#define BEITV2_FAST_VARIANTS "codebook_search/cpu_draw_kernels.h"
#include "../cpu_variants.h"

namespace beitv2_fast {
namespace {

struct Draw {
  const DrawKernels& kernels;
  const int64_t* keys;
  std::vector<uint64_t> counters;  // of the packed codes
  double temperature;
};

constexpr double INFINITE = std::numeric_limits<double>::infinity();

class DrawBlock : public Block {
 public:
  DrawBlock(const Search& search, const Draw& draw) : Block(search), draw_(draw) {}

  void run(int64_t first, int64_t count) {
    pack(first, count);
    for (int64_t i = 0; i < count; ++i) {
      const float* x = reader_.row(row_[i]);
      const double length = std::sqrt(draw_.kernels.compare(x, x, codes_.dim, true));
      drawn_[i] = {std::max(length, 1e-12), -INFINITE, 0};
    }
    const int64_t panels = (count + PANEL - 1) / PANEL;
    int64_t scored = 0;
    for (int64_t begin = 0; begin < codes_.groups; begin += CHUNK) {
      const int64_t end = std::min(begin + CHUNK, codes_.groups);
      (bytes_ ? search_.kernels.screen_bytes : search_.kernels.screen_fp32)(codes_, panels_.get(), panels, begin, end,
                                                                            group_max_.get(), best_);
      for (int64_t p = 0; p < panels; ++p) {
        Bounds bounds = bound(p);
        float* weights = &group_max_[p * CHUNK * PANEL];
        draw_.kernels.weigh(weights, end - begin, bounds);
        for (int64_t lane = 0; lane < PANEL && p * PANEL + lane < count; ++lane)
          if (const int64_t i = p * PANEL + lane; info_[i].finite)
            scored += draw(row_[i], drawn_[i], weights + lane, bounds.top[lane], begin, end);
      }
    }
    for (int64_t i = 0; i < count; ++i) search_.indices[row_[i]] = drawn_[i].index;
    if (scored > MANY * count) bytes_ = false;
  }

 private:
  static constexpr int64_t MANY = 128;  // scores per row beyond which fp32 screens better than bytes

  struct Drawn {
    double length, score;  // |x|, at least 1e-12; the best score yet
    int64_t index;         // its code
  };

  Bounds bound(int64_t p) {
    Bounds bounds;
    const double scale = search_.book.scale, t = draw_.temperature, rounding = (2 * codes_.dim + 40) * 6e-8;
    bounds.cosine = search_.cosine;
    bounds.of_root = static_cast<float>((1 - 1e-6) / (scale * t));
    for (int64_t lane = 0; lane < PANEL; ++lane) {
      const int64_t i = p * PANEL + lane;
      const Row& row = info_[i];
      const double unit = bytes_ ? 1 / static_cast<double>(panel(p)[lane]) : 1, error = 2 * unit * row.screen_error;
      double factor = 2 * unit, offset = error - (1 - 2 * rounding) * row.norm * row.norm;
      if (search_.cosine) factor = unit / (row.norm * scale * t), offset = error / (row.norm * scale * t);
      if (search_.cosine && drawn_[i].length <= 1e-12)
        factor = 0, offset = (1 + rounding) * codes_.max_norm / (scale * t);
      if (row.far) offset = std::numeric_limits<double>::quiet_NaN();  // rules out nothing
      bounds.factor[lane] = static_cast<float>(factor), bounds.offset[lane] = static_cast<float>(offset);
    }
    return bounds;
  }

  // Scores the codes of groups begin..end that may beat the row's best; returns how many.
  int64_t draw(int64_t row, Drawn& drawn, const float* weight, float top, int64_t begin, int64_t end) {
    const uint64_t* counters = draw_.counters.data() + begin * GROUP;
    int64_t scored = 0, uniform[GROUP];
    float factor = factor_of(top, drawn.score);
    const float* x = reader_.row(row);
    const auto run = [&](int64_t from, int64_t to) {
      for (int64_t g = from; g < to; ++g) {
        g = draw_.kernels.scan(counters, draw_.keys[row], weight, factor, g, to, uniform);
        const int64_t last = std::min(GROUP, codes_.count - (begin + g) * GROUP);
        for (int64_t c = 0; g < to && c < last; ++c) {
          if (uniform[c] < least_uniform(weight[g * PANEL], factor)) continue;
          ++scored;
          if (raise(x, drawn, (begin + g) * GROUP + c, uniform[c])) factor = factor_of(top, drawn.score);
        }
      }
    };
    if (drawn.score == -INFINITE) {  // the best group first: what it leaves to beat spares scores
      int64_t best = 0;
      for (int64_t g = 1; g < end - begin; ++g)
        if (weight[g * PANEL] > weight[best * PANEL]) best = g;
      run(best, best + 1);
    }
    run(0, end - begin);
    return scored;
  }

  static float factor_of(double top, double best) {
    // A weight below e^-87 is 0, too little to tell from other ones: times infinity it is NaN, which rules out nothing.
    return top - best < 40 ? static_cast<float>(std::exp(top - best) * 1.0001 * ONE) : static_cast<float>(INFINITE);
  }

  bool raise(const float* x, Drawn& drawn, int64_t position, int64_t uniform) {
    const float* code = search_.book.code(position);
    double s = draw_.kernels.compare(x, code, codes_.dim, search_.cosine);
    s = search_.cosine ? s / drawn.length : -std::sqrt(std::max(s, 1e-8));
    const double score = s / draw_.temperature - std::log(-std::log(static_cast<double>(uniform) / ONE));
    const int64_t index = search_.book.original(position);
    if (!(score > drawn.score || (score == drawn.score && index < drawn.index))) return false;
    drawn.score = score, drawn.index = index;
    return true;
  }

  const Draw& draw_;
  Drawn drawn_[ROWS];
};

// keys: int64 [N], contiguous, of the rows. The Python side has checked shapes and devices.
at::Tensor draw_codes(const at::Tensor& x, const at::Tensor& codebook, bool cosine, double temperature,
                      const at::Tensor& keys) {
  at::Tensor indices = at::empty({x.size(0)}, x.options().dtype(at::kLong));
  const Kernels& kernels = chosen_kernels();
  const PackedCodebook book = pack_codebook(codebook, cosine, bytes_pay(x.size(0), codebook, 1), kernels);
  const Search search = {kernels, book, x, cosine, 1, indices.mutable_data_ptr<int64_t>()};
  Draw draw = {BEITV2_FAST_PICK(draw_kernels), keys.const_data_ptr<int64_t>(), {}, temperature};
  for (int64_t p = 0; p < book.codes.groups * GROUP; ++p)
    draw.counters.push_back(book.original(std::min(p, book.codes.count - 1)) * 0x9E3779B97F4A7C15);
  run_blocks<DrawBlock>(search, draw);
  return indices;
}

TORCH_LIBRARY_FRAGMENT(beitv2_fast_cpu, m) {
  m.def("draw_codes(Tensor x, Tensor codebook, bool cosine, float temperature, Tensor keys) -> Tensor");
}

TORCH_LIBRARY_IMPL(beitv2_fast_cpu, CPU, m) { m.impl("draw_codes", draw_codes); }

}  // namespace
}  // namespace beitv2_fast
