// See cpu_block.h.
#include "cpu_block.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "cpu_exact.h"

namespace beitv2_fast {
namespace {

// Bytes screen about four times as many codes per second as fp32, but a group that they leave costs a read of its fp32
// codes, mostly from beyond the caches: at K = 8192 that is even when about a sixteenth of the groups is left.
constexpr int64_t GROUPS_PER_CANDIDATE = 16;

// What F.normalize yields in double: x / max(|x|, 1e-12).
void normalize(const float* x, int64_t dim, float* out) {
  double square = 0;
  for (int64_t d = 0; d < dim; ++d) square += static_cast<double>(x[d]) * x[d];
  const double denominator = std::sqrt(square) < 1e-12 ? 1e-12 : std::sqrt(square);
  for (int64_t d = 0; d < dim; ++d) out[d] = static_cast<float>(x[d] / denominator);
}

float squared_distance(const float* y, const float* code, int64_t dim) {
  float lanes[PANEL] = {}, sum = 0;
  int64_t d = 0;
  for (; d + PANEL <= dim; d += PANEL)
    for (int64_t l = 0; l < PANEL; ++l) lanes[l] += (y[d + l] - code[d + l]) * (y[d + l] - code[d + l]);
  for (; d < dim; ++d) sum += (y[d] - code[d]) * (y[d] - code[d]);
  for (float lane : lanes) sum += lane;
  return sum;
}

// Of a smaller number the score is higher, or the same and the position lower.
uint64_t ranked(float score, int32_t position) {
  const uint32_t bits = std::bit_cast<uint32_t>(score);
  return static_cast<uint64_t>(bits >> 31 ? bits : bits ^ 0x7fffffff) << 32 | static_cast<uint32_t>(position);
}

float score_of(uint64_t ranked) {
  const uint32_t bits = static_cast<uint32_t>(ranked >> 32);
  return std::bit_cast<float>(bits >> 31 ? bits : bits ^ 0x7fffffff);
}

int32_t position_of(uint64_t ranked) { return static_cast<int32_t>(ranked); }

}  // namespace

void finish(const Search& search, const float* x, const float* code, int64_t row, int64_t index, float* compared) {
  const int64_t dim = search.x.size(1);
  search.indices[row] = index;
  if (search.found) {
    const int64_t bytes = dim * static_cast<int64_t>(search.codebook.element_size());
    std::memcpy(search.found + row * bytes, static_cast<const char*>(search.codebook.const_data_ptr()) + index * bytes,
                bytes);
  }
  if (!search.normalized && !search.distances) return;
  if (search.normalized) compared = search.normalized + row * dim;
  search.cosine ? normalize(x, dim, compared) : static_cast<void>(std::copy_n(x, dim, compared));
  if (!search.distances) return;
  float distance = squared_distance(compared, code, dim);
  // Infinite: because it overflows, or because the vector was.
  if (std::isinf(distance) && !std::all_of(compared, compared + dim, [](float y) { return std::isfinite(y); }))
    distance = std::numeric_limits<float>::quiet_NaN();
  search.distances[row] = distance;
}

Block::Block(const Search& search)
    : search_(search),
      codes_(search.book.codes),
      bytes_(codes_.bytes),
      tops_(std::min(search.k, codes_.groups + 1)),
      reader_(search.x),
      rows_(new float[ROWS * codes_.dim]),
      panels_(new float[ROWS * std::max(codes_.dim, codes_.depth / 4 + 1)]),
      group_max_(new float[ROWS * CHUNK]),
      top_(new float[ROWS * tops_]),
      row_top_(new float[2 * search.k + PANEL]),
      compared_(new float[codes_.dim]) {}

void Block::run(int64_t first, int64_t count) {
  resolved_ = 0;
  pack(first, count);
  if (codes_.groups) screen(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = row_[i];
    if (search_.k > 1) {
      several(row, i);
      continue;
    }
    const int64_t index = codes_.groups ? nearest(row, i) : 0;
    const float* code = search_.book.values.const_data_ptr<float>() + index * codes_.dim;
    finish(search_, reader_.row(row), code, row, index, compared_.get());
  }
  if (resolved_ > (search_.k + 1 + codes_.groups / GROUPS_PER_CANDIDATE) * count) bytes_ = false;
}

// Fills row_: where the codes have a bias, vectors of like magnitude side by side, to share a unit.
void Block::order(int64_t first, int64_t count) {
  std::iota(row_, row_ + count, first);
  if (search_.cosine || !bytes_) return;
  int32_t magnitude[ROWS] = {};  // as bits: in the order of the numbers
  for (int64_t i = 0; i < count; ++i) {
    const float* x = reader_.row(first + i);
    for (int64_t d = 0; d < codes_.dim; ++d)
      magnitude[i] = std::max(magnitude[i], std::bit_cast<int32_t>(x[d]) & 0x7fffffff);
  }
  const auto shorter = [&](int64_t a, int64_t b) { return magnitude[a - first] < magnitude[b - first]; };
  for (int64_t* tile = row_; tile + TILE * PANEL < row_ + count; tile += TILE * PANEL)
    std::nth_element(tile, tile + TILE * PANEL, row_ + count, shorter);
}

void Block::pack(int64_t first, int64_t count) {
  const int64_t panels = (count + PANEL - 1) / PANEL, dim = codes_.dim;
  order(first, count);
  for (int64_t i = 0; i < count; ++i) std::copy_n(reader_.row(row_[i]), dim, &rows_[i * dim]);
  std::fill(&rows_[count * dim], &rows_[0] + panels * PANEL * dim, 0.0f);
  for (int64_t p = 0; p < panels; p += TILE)
    search_.kernels.pack_rows(&rows_[p * PANEL * dim], std::min(TILE * PANEL, count - p * PANEL), codes_,
                              search_.book.scale, bytes_, panel(p), info_ + p * PANEL);
  std::fill_n(best_, ROWS, -std::numeric_limits<float>::infinity());
  // Lanes without a vector: no group reaches best + Inf.
  for (int64_t i = count; i < panels * PANEL; ++i) info_[i].screen_error = -std::numeric_limits<float>::infinity();
}

// Fills the candidates of every row.
void Block::screen(int64_t count) {
  const int64_t panels = (count + PANEL - 1) / PANEL;
  const Screen run = bytes_ ? search_.kernels.screen_bytes : search_.kernels.screen_fp32;
  std::fill_n(top_.get(), ROWS * tops_, -std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < count; ++i) candidates_[i].group.clear(), candidates_[i].screened.clear();
  for (int64_t begin = 0; begin < codes_.groups; begin += CHUNK) {
    const int64_t end = std::min(begin + CHUNK, codes_.groups);
    run(codes_, panels_.get(), panels, begin, end, group_max_.get(), best_);
    for (int64_t p = 0; p < panels; ++p) {
      std::fill_n(chunk_.count, PANEL, 0);
      const float* maxima = &group_max_[p * CHUNK * PANEL];
      if (search_.k > 1) search_.kernels.raise_top(maxima, end - begin, tops_, &top_[p * tops_ * PANEL]);
      search_.kernels.filter(maxima, last_best(p), info_ + p * PANEL, begin, end, chunk_);
      for (int64_t lane = 0; lane < PANEL && p * PANEL + lane < count; ++lane) {
        const int64_t i = p * PANEL + lane, n = chunk_.count[lane];
        if (!info_[i].finite || info_[i].far || (info_[i].zero && search_.cosine)) continue;  // have another answer
        RowCandidates& row = candidates_[i];
        row.group.insert(row.group.end(), chunk_.group[lane], chunk_.group[lane] + n);
        row.screened.insert(row.screened.end(), chunk_.screened[lane], chunk_.screened[lane] + n);
      }
    }
  }
}

// The best of `count` positions (all of them when kept is null) in twice double precision.
int64_t Block::settle(int64_t row, const int32_t* kept, int64_t count) {
  const PackedCodebook& book = search_.book;
  const auto position = [kept](int64_t n) { return kept ? static_cast<int64_t>(kept[n]) : n; };
  return book.original(position(exact_best(
      reader_.row(row), count, [&](int64_t n) { return book.code(position(n)); }, codes_.dim, search_.cosine)));
}

// Fills kept_ and scores_ with the codes that may be among the k nearest; returns how many there are.
int64_t Block::resolve(int64_t i) {
  const RowCandidates& groups = candidates_[i];
  const size_t count = groups.group.size();
  if (kept_.size() < count * (GROUP + 1)) scores_.resize((count + 1) * GROUP), kept_.resize(count * (GROUP + 1));
  return search_.kernels.resolve(codes_, &rows_[i * codes_.dim], info_[i], groups.group.data(), groups.screened.data(),
                                 static_cast<int64_t>(count),
                                 last_best(i / PANEL)[i % PANEL] - 2 * info_[i].screen_error, search_.k, row_top_.get(),
                                 scores_.data(), kept_.data(), &resolved_);
}

int64_t Block::nearest(int64_t row, int64_t i) {
  const Row& info = info_[i];
  const PackedCodebook& book = search_.book;
  if (!info.finite) return 0;
  if (info.zero && search_.cosine) return book.original(0);
  if (info.far) return settle(row, nullptr, codes_.count);
  int64_t kept = resolve(i);
  while (kept > 1 && kept_[kept - 1] >= codes_.count) --kept;  // the copies that pad the last group
  return kept == 1 ? book.original(kept_[0]) : settle(row, kept_.data(), kept);
}

// Puts the k nearest of near_ first, in order: by their scores in fp32, and by exact ones where those are too near.
void Block::sort(int64_t row, float error, int64_t k) {
  const auto first = near_.begin();
  auto last = near_.end();
  if (first + k < last) {
    std::nth_element(first, first + k - 1, last);
    const float least = score_of(first[k - 1]) - error;
    last = std::partition(first + k, last, [least](uint64_t n) { return score_of(n) >= least; });
  }
  std::sort(first, first + k);
  for (auto begin = first, end = first; begin < first + k; begin = end) {
    for (++end; end < first + k && score_of(end[-1]) - score_of(*end) <= error;) ++end;
    if (end == first + k) end = last;
    if (end - begin > 1) settle_order(row, &*begin, end - begin, std::min<int64_t>(end - begin, first + k - begin));
  }
}

// The same by exact scores only.
void Block::settle_order(int64_t row, uint64_t* near, int64_t count, int64_t k) {
  exact_.resize(count);
  for (int64_t n = 0; n < count; ++n) exact_[n].position = position_of(near[n]);
  const auto code = [this](int64_t position) { return search_.book.code(position); };
  exact_order(reader_.row(row), exact_, k, code, codes_.dim, search_.cosine);
  for (int64_t n = 0; n < k; ++n) near[n] = ranked(0, static_cast<int32_t>(exact_[n].position));
}

// Writes the k nearest codes of a row.
void Block::several(int64_t row, int64_t i) {
  const PackedCodebook& book = search_.book;
  const Row& info = info_[i];
  int64_t* out = search_.indices + row * search_.k;
  const int64_t found = codes_.groups && info.finite ? std::min(search_.k, codes_.count) : 0;
  if (found) {
    const bool tied = info.zero && search_.cosine, screened = !tied && !info.far;
    near_.resize(screened ? resolve(i) : tied ? found : codes_.count);
    for (size_t n = 0; n < near_.size(); ++n)
      near_[n] = screened ? ranked(scores_[n], kept_[n]) : ranked(0, static_cast<int32_t>(n));
    if (!tied) sort(row, 2 * info.resolve_error, found);
    for (int64_t j = 0; j < found; ++j) out[j] = book.original(position_of(near_[j]));
  }
  // Codes that are not finite come last; for a vector that is not, or if no code is, all come by their index.
  size_t passed = found ? 0 : book.positions.size();
  for (int64_t j = 0, n = found; n < search_.k; ++j) {
    if (passed < book.positions.size() && book.positions[passed] == j) ++passed;
    else out[n++] = j;
  }
}

}  // namespace beitv2_fast
