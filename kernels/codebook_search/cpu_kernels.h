// Screening in fp32, and what follows every screening, for lanes of any width; compiled once for every instruction set.
//
// `I` is an instruction set: a vector type V of LANES floats and its operations; CODES and WIDE are the register tile:
// CODES codes (broadcast) against WIDE panels of 16 vectors (in the lanes), so no sum ever crosses lanes.
#pragma once

#include "cpu_pack.h"

namespace beitv2_fast {
namespace {

// Raises out, the maxima of WIDE panels, to the scores of CODES codes. FLOPs 2 * CODES * 16 * WIDE * dim.
//
// The maxima wait in memory: with them in registers GCC keeps the vectors on the stack, at half of the speed.
template <class I, int CODES, int WIDE>
inline void screen_tile(const Codes& codes, const float* rows, const float* bias, const float* panels, float* out) {
  using V = typename I::V;
  constexpr int PER = PANEL / I::LANES, VECTORS = WIDE * PER;
  V sums[CODES][VECTORS];
#pragma GCC unroll 16
  for (int c = 0; c < CODES; ++c)
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; ++v) sums[c][v] = I::set(bias ? bias[c] : 0.0f);
  const int64_t dim = codes.dim;
  int64_t d = 0;
  do {
    V x[VECTORS];
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; ++v)
      x[v] = I::load(panels + (v / PER) * dim * PANEL + d * PANEL + (v % PER) * I::LANES);
#pragma GCC unroll 16
    for (int c = 0; c < CODES; ++c) {
      const V code = I::set(rows[c * dim + d]);
#pragma GCC unroll 16
      for (int v = 0; v < VECTORS; ++v) sums[c][v] = I::fma(x[v], code, sums[c][v]);
    }
  } while (++d < dim);
#pragma GCC unroll 16
  for (int v = 0; v < VECTORS; ++v) {
    V highest = sums[0][v];
#pragma GCC unroll 16
    for (int c = 1; c < CODES; ++c) highest = I::max(highest, sums[c][v]);
    float* raised = out + (v / PER) * CHUNK * PANEL + (v % PER) * I::LANES;
    I::store(raised, I::max(I::load(raised), highest));
  }
}

template <class I, int WIDE>
inline void screen_group(const Codes& codes, int64_t group, const float* panels, float* out, float* best) {
  constexpr int CODES = I::CODES;
  static_assert(GROUP % CODES == 0);
  const float* rows = group_rows(codes, group);
  const float* bias = codes.bias ? codes.bias + group * GROUP : nullptr;
  for (int w = 0; w < WIDE; ++w)
    for (int l = 0; l < PANEL; ++l) out[w * CHUNK * PANEL + l] = -__builtin_inff();
  for (int c = 0; c < GROUP; c += CODES)
    screen_tile<I, CODES, WIDE>(codes, rows + c * codes.dim, bias ? bias + c : nullptr, panels, out);
  for (int w = 0; w < WIDE; ++w)
    for (int l = 0; l < PANEL; l += I::LANES) {
      float* raised = best + w * PANEL + l;
      I::store(raised, I::max(I::load(raised), I::load(out + w * CHUNK * PANEL + l)));
    }
}

template <class I>
void screen_fp32(const Codes& codes, const void* panels, int64_t count, int64_t begin, int64_t end, float* group_max,
                 float* best) {
  constexpr int WIDE = I::WIDE;
  const float* x = static_cast<const float*>(panels);
  // A few groups at a time stay in the first-level cache while all panels pass over them.
  const int64_t step = codes.dim < 512 ? 512 / codes.dim : 1;
  for (int64_t from = begin; from < end; from += step) {
    const int64_t to = from + step < end ? from + step : end;
    int64_t p = 0;
    for (; p + WIDE <= count; p += WIDE)
      for (int64_t g = from; g < to; ++g)
        screen_group<I, WIDE>(codes, g, x + p * codes.dim * PANEL, group_max + (p * CHUNK + g - begin) * PANEL,
                              best + p * PANEL);
    for (; p < count; ++p)
      for (int64_t g = from; g < to; ++g)
        screen_group<I, 1>(codes, g, x + p * codes.dim * PANEL, group_max + (p * CHUNK + g - begin) * PANEL,
                           best + p * PANEL);
  }
}

template <class I>
void raise_top(const float* group_max, int64_t groups, int64_t k, float* top) {
  const float* last = top + (k - 1) * PANEL;
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t lane = 0; lane < PANEL; lane += I::LANES) {
      typename I::V score = I::load(group_max + g * PANEL + lane);
      if (!I::reaches(score, I::load(last + lane))) continue;
      for (float* place = top + lane; place <= last + lane; place += PANEL) {
        const typename I::V other = I::load(place);
        I::store(place, I::max(other, score));
        score = I::min(other, score);
      }
    }
}

template <class I>
void filter(const float* group_max, const float* best, const Row* info, int64_t begin, int64_t end,
            Candidates& candidates) {
  constexpr int PER = PANEL / I::LANES;
  float threshold[PANEL];
  for (int64_t lane = 0; lane < PANEL; ++lane) threshold[lane] = best[lane] - 2 * info[lane].screen_error;
  typename I::V least[PER];
#pragma GCC unroll 16
  for (int v = 0; v < PER; ++v) least[v] = I::load(threshold + v * I::LANES);
  constexpr int64_t SEVERAL = 4;  // groups that are asked about by one branch
  for (int64_t from = begin; from < end; from += SEVERAL, group_max += SEVERAL * PANEL) {
    uint64_t reached = 0;
#pragma GCC unroll 16
    for (int64_t g = 0; g < SEVERAL; ++g)
      if (from + g < end)
#pragma GCC unroll 16
        for (int v = 0; v < PER; ++v)
          reached |= static_cast<uint64_t>(I::reaches(I::load(group_max + g * PANEL + v * I::LANES), least[v]))
                     << (g * PANEL + v * I::LANES);
    for (; reached; reached &= reached - 1) {
      const int at = __builtin_ctzll(reached), lane = at % PANEL;
      const int64_t slot = candidates.count[lane]++;
      candidates.group[lane][slot] = static_cast<int32_t>(from + at / PANEL);
      candidates.screened[lane][slot] = group_max[at];
    }
  }
}

// <row, code> of CODES codes that lie one after the other, dimensions in the lanes.
template <class I, int CODES>
inline void dots(const float* codes, int64_t dim, const float* row, float* out) {
  typename I::V sums[CODES];
  float rest[CODES] = {};
#pragma GCC unroll 16
  for (int c = 0; c < CODES; ++c) sums[c] = I::set(0.0f);
  int64_t d = 0;
  for (; d + I::LANES <= dim; d += I::LANES) {
    const typename I::V x = I::load(row + d);
#pragma GCC unroll 16
    for (int c = 0; c < CODES; ++c) sums[c] = I::fma(x, I::load(codes + c * dim + d), sums[c]);
  }
  for (; d < dim; ++d)
    for (int c = 0; c < CODES; ++c) rest[c] += row[d] * codes[c * dim + d];
#pragma GCC unroll 16
  for (int c = 0; c < CODES; ++c) out[c] = I::sum(sums[c]) + rest[c];
}

template <class I>
GroupBounds measure_group(const Codes& codes, int64_t group) {
  const float* rows = group_rows(codes, group);
  GroupBounds bounds = {0, max_magnitude(rows, GROUP * codes.dim)};
  for (int64_t c = 0; c < GROUP; ++c) {
    float square;
    dots<I, 1>(rows + c * codes.dim, codes.dim, rows + c * codes.dim, &square);
    if (!(square <= bounds.square)) bounds.square = square == square ? square : __builtin_inff();
    if (codes.bias) codes.bias[group * GROUP + c] = -0.5f * square;
  }
  return bounds;
}

template <class I>
inline float score_group(const Codes& codes, int64_t group, const float* row, float* scores) {
  const float* rows = group_rows(codes, group);
  float best = -__builtin_inff();
  dots<I, GROUP>(rows, codes.dim, row, scores);
  for (int64_t c = 0; c < GROUP; ++c) {
    if (codes.bias) scores[c] += codes.bias[group * GROUP + c];
    best = scores[c] > best ? scores[c] : best;
  }
  return best;
}

template <class I>
int64_t resolve(const Codes& codes, const float* row, const Row& info, const int32_t* group, const float* screened,
                int64_t count, float least_screened, int64_t k, float* top, float* scores, int32_t* kept,
                int64_t* scored_groups) {
  float best = -__builtin_inff();
  // Two bounds of the k-th best score: k groups have a code that reaches `last`; the second is for k of many groups.
  const int64_t tops = k < count ? k : count, per_lane = (k + PANEL - 1) / PANEL;
  float *last = top + tops - 1, *lanes = top + tops;
  if (k > 1)
    for (float* place = top; place < lanes + per_lane * PANEL; ++place) *place = best;
  int32_t* scored = kept + count * GROUP;  // behind the room for the codes themselves
  int64_t groups = 0, codes_kept = 0, first = -1;
  float of_first[GROUP];
  if (k == 1 && info.unit > 0) {
    // What the group that screened best really scores is mostly what it screened, and not one error less.
    first = 0;
    for (int64_t i = 1; i < count; ++i) first = screened[i] > screened[first] ? i : first;
    best = score_group<I>(codes, group[first], row, of_first);
    const float least = (best - 2 * info.resolve_error) / info.unit - info.screen_error;
    least_screened = least > least_screened ? least : least_screened;
  }
  for (int64_t i = 0; i < count; ++i) {
    if (screened[i] < least_screened) continue;
    float* of_group = scores + groups * GROUP;
    const float highest = i == first ? best : score_group<I>(codes, group[i], row, of_group);
    if (i == first) memcpy(of_group, of_first, sizeof of_first);
    best = highest > best ? highest : best;
    scored[groups++] = group[i];
    if (k == 1) continue;
    for (int64_t c = codes.count - group[i] * GROUP; c < GROUP; ++c) of_group[c] = -__builtin_inff();  // copies
    if (highest <= *last) continue;
    float* place = last;
    for (; place > top && place[-1] < highest; --place) *place = place[-1];
    *place = highest;
  }
  *scored_groups += groups;
  if (k > 1) {
    raise_top<I>(scores, groups * GROUP / PANEL, per_lane, lanes);
    float lowest = best;
    for (int64_t l = (per_lane - 1) * PANEL; l < per_lane * PANEL; ++l) lowest = lanes[l] < lowest ? lanes[l] : lowest;
    best = tops < k || lowest > *last ? lowest : *last;
    best = best > -3e38f ? best : -3e38f;  // above the copies
  }
  const typename I::V least = I::set(best - 2 * info.resolve_error);
  for (int64_t i = 0; i < groups * GROUP; i += I::LANES) {
    uint32_t reached = I::reaches(I::load(scores + i), least);
    if (groups * GROUP - i < I::LANES) reached &= (1u << (groups * GROUP - i)) - 1;
    for (; reached; reached &= reached - 1) {
      const int64_t at = i + __builtin_ctz(reached);
      scores[codes_kept] = scores[at];  // never behind what is still to be read
      kept[codes_kept++] = scored[at / GROUP] * static_cast<int32_t>(GROUP) + static_cast<int32_t>(at % GROUP);
    }
  }
  return codes_kept;
}

}  // namespace
}  // namespace beitv2_fast
