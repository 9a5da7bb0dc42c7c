// One thread's part of a search: blocks of 192 vectors, screened against all codes, then resolved one by one.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "../cpu_row_reader.h"
#include "cpu_codes.h"
#include "cpu_exact.h"

namespace beitv2_fast {

// What all threads share. Every pointer but indices may be null: then nobody asked.
struct Search {
  const Kernels& kernels;
  const PackedCodebook& book;
  const at::Tensor& x;  // [N, D] fp32, fp16 or bf16, any strides
  bool cosine;
  int64_t k;
  int64_t* indices;  // [N, k]; with k > 1 nobody asks for more
  float *normalized, *distances;
  char* found;          // the codes, in the codebook's dtype
  at::Tensor codebook;  // contiguous, in its own dtype
};

// Writes what was asked for of row x, whose nearest code, in fp32, is known. compared: room for a row.
void finish(const Search& search, const float* x, const float* code, int64_t row, int64_t index, float* compared);

class Block {
 public:
  static constexpr int64_t ROWS = PANELS * PANEL;

  explicit Block(const Search& search);
  void run(int64_t first, int64_t count);  // vectors first .. first + count, count <= ROWS

 protected:
  struct RowCandidates {
    std::vector<int32_t> group;
    std::vector<float> screened;
  };

  void order(int64_t first, int64_t count);
  void pack(int64_t first, int64_t count);
  void screen(int64_t count);
  int64_t resolve(int64_t i);
  int64_t nearest(int64_t row, int64_t i);
  int64_t settle(int64_t row, const int32_t* kept, int64_t count);
  void several(int64_t row, int64_t i);
  void sort(int64_t row, float error, int64_t k);
  void settle_order(int64_t row, uint64_t* near, int64_t count, int64_t k);
  const float* last_best(int64_t p) const {  // of each lane the maximum of the k-th best group
    return search_.k > 1 ? &top_[((p + 1) * tops_ - 1) * PANEL] : best_ + p * PANEL;
  }
  float* panel(int64_t p) { return panels_.get() + p * PANEL * (bytes_ ? codes_.depth / 4 + 1 : codes_.dim); }

  const Search& search_;
  const Codes& codes_;
  bool bytes_;    // whether bytes screen; otherwise fp32
  int64_t tops_;  // groups whose maxima bound the k-th best score from below; one more than there are bounds nothing
  RowReader reader_;
  std::unique_ptr<float[]> rows_, panels_, group_max_, top_, row_top_, compared_;
  std::vector<float> scores_;
  std::vector<int32_t> kept_;
  std::vector<uint64_t> near_;  // scores in fp32 and positions: see ranked()
  std::vector<Exact> exact_;
  Candidates chunk_;
  RowCandidates candidates_[ROWS];
  int64_t row_[ROWS];  // which vector of x the i-th of the block is
  Row info_[ROWS];
  float best_[ROWS];
  int64_t resolved_;  // groups of a block that were scored in fp32
};

const Kernels& chosen_kernels();  // of the instruction set

// Shares all vectors out to threads, a block of them at a time.
template <class B, class... Options>
void run_blocks(const Search& search, const Options&... options) {
  const int64_t rows = search.x.size(0), panels = (rows + PANEL - 1) / PANEL;
  const int64_t grain = std::max<int64_t>(1, 1000000 / (PANEL * search.x.size(1) * search.book.values.size(0)));
  at::parallel_for(0, panels, grain, [&](int64_t begin, int64_t end) {
    B block(search, options...);
    for (int64_t p = begin; p < end; p += PANELS)
      block.run(p * PANEL, std::min(std::min(p + PANELS, end) * PANEL, rows) - p * PANEL);
  });
}

}  // namespace beitv2_fast
