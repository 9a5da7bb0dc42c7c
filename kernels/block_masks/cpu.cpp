// block_masks on the CPU: the definition of reference.py with a row of the grid in 64-bit words. It has no other C++ file.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

namespace beitv2_fast {
namespace {

constexpr int ATTEMPTS_PER_BLOCK = 10;
constexpr int MAX_ATTEMPTS = 64;
constexpr int DRAWS_PER_ATTEMPT = 4;
constexpr int FIRST_FILL = DRAWS_PER_ATTEMPT * MAX_ATTEMPTS;
constexpr int64_t GRAIN = 64;  // masks that make a task worth a thread

// splitmix64 in counter mode.
uint64_t random_bits(uint64_t key, uint64_t k) {
  uint64_t z = key + k * 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}

double uniform(uint64_t key, uint64_t k) { return static_cast<double>(random_bits(key, k) >> 11) * 0x1p-53; }

struct Settings {
  int64_t height, width, num_masked, min_patches;
  double log_aspect;
  int64_t max_patches;
};

class MaskPainter {
 public:
  explicit MaskPainter(const Settings& settings)
      : s(settings), words((s.width + 63) / 64), grid(s.height * words), block(words) {}

  void draw(uint64_t key, bool* out) {
    std::fill(grid.begin(), grid.end(), 0);
    int64_t masked = 0;
    int failures = 0;
    for (int attempt = 0; masked < s.num_masked && failures < ATTEMPTS_PER_BLOCK && attempt < MAX_ATTEMPTS; ++attempt) {
      const int64_t gain = lay_down(key, attempt, std::min(s.num_masked - masked, s.max_patches));
      masked += gain;
      failures = gain ? 0 : failures + 1;
    }
    for (int64_t y = 0; y < s.height; ++y)
      for (int64_t x = 0; x < s.width; ++x) out[y * s.width + x] = grid[y * words + x / 64] >> (x % 64) & 1;
    if (masked < s.num_masked) fill_up(key, s.num_masked - masked, out);
  }

 private:
  // Returns the new patches that the block masks; 0, and no change, if it does not count.
  int64_t lay_down(uint64_t key, int attempt, int64_t wanted) {
    const uint64_t k = DRAWS_PER_ATTEMPT * attempt;
    const double least = static_cast<double>(s.min_patches);
    const double area = least + static_cast<double>(wanted - s.min_patches) * uniform(key, k);
    const double aspect = std::exp(s.log_aspect * (1 - 2 * uniform(key, k + 1)));
    const int64_t h = std::llrint(std::sqrt(area * aspect)), w = std::llrint(std::sqrt(area / aspect));
    if (h >= s.height || w >= s.width) return 0;
    const int64_t top = static_cast<int64_t>(static_cast<double>(s.height - h + 1) * uniform(key, k + 2));
    const int64_t left = static_cast<int64_t>(static_cast<double>(s.width - w + 1) * uniform(key, k + 3));
    for (int64_t i = 0; i < words; ++i) block[i] = ones_below(left + w - 64 * i) & ~ones_below(left - 64 * i);
    int64_t gain = 0;
    for (int64_t y = top; y < top + h; ++y)
      for (int64_t i = 0; i < words; ++i) gain += std::popcount(block[i] & ~grid[y * words + i]);
    if (gain < 1 || gain > wanted) return 0;
    for (int64_t y = top; y < top + h; ++y)
      for (int64_t i = 0; i < words; ++i) grid[y * words + i] |= block[i];
    return gain;
  }

  static uint64_t ones_below(int64_t bit) {
    return bit <= 0 ? 0 : bit >= 64 ? ~uint64_t{0} : (uint64_t{1} << bit) - 1;
  }

  // Masks the `missing` visible patches whose draws are lowest.
  void fill_up(uint64_t key, int64_t missing, bool* out) {
    visible.clear();
    for (int64_t patch = 0; patch < s.height * s.width; ++patch)
      if (!out[patch]) visible.emplace_back(random_bits(key, FIRST_FILL + patch), patch);
    std::nth_element(visible.begin(), visible.begin() + (missing - 1), visible.end());
    for (int64_t i = 0; i < missing; ++i) out[visible[i].second] = true;
  }

  const Settings s;
  const int64_t words;          // 64-bit words per row
  std::vector<uint64_t> grid;   // [height, words]
  std::vector<uint64_t> block;  // a row of the block
  std::vector<std::pair<uint64_t, int64_t>> visible;
};

at::Tensor block_masks(const at::Tensor& keys, int64_t height, int64_t width, int64_t num_masked, int64_t min_patches,
                       double min_aspect, int64_t max_patches) {
  const Settings settings{height, width, num_masked, min_patches, std::log(min_aspect), max_patches};
  const at::Tensor flat = keys.contiguous();
  at::Tensor masks = at::zeros({flat.size(0), height, width}, flat.options().dtype(at::kBool));
  const int64_t* key = flat.const_data_ptr<int64_t>();
  bool* out = masks.mutable_data_ptr<bool>();
  at::parallel_for(0, flat.size(0), GRAIN, [&](int64_t begin, int64_t end) {
    MaskPainter painter(settings);
    for (int64_t i = begin; i < end; ++i) painter.draw(static_cast<uint64_t>(key[i]), out + i * height * width);
  });
  return masks;
}

TORCH_LIBRARY_FRAGMENT(beitv2_fast_cpu, m) {
  m.def(
      "block_masks(Tensor keys, int height, int width, int num_masked, int min_patches, float min_aspect, "
      "int max_patches) -> Tensor");
}

TORCH_LIBRARY_IMPL(beitv2_fast_cpu, CPU, m) { m.impl("block_masks", block_masks); }

}  // namespace
}  // namespace beitv2_fast
