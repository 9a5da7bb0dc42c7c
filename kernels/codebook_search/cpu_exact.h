// The last word on a near tie: scores in twice double precision (Ogita, Rump, Oishi: Accurate sum and dot product, 2005).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__GNUC__) && !defined(__clang__)
#define BEITV2_FAST_EXACT __attribute__((optimize("fp-contract=off")))
#else
#define BEITV2_FAST_EXACT
#endif

namespace beitv2_fast {

struct TwoDoubles {
  double high = 0, low = 0;
  bool operator>(const TwoDoubles& other) const { return high > other.high || (high == other.high && low > other.low); }
};

// sum + product; what rounding loses goes to sum.low.
BEITV2_FAST_EXACT inline void add(TwoDoubles& sum, double product) {
#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#endif
  const double total = sum.high + product;
  const double part = total - sum.high;
  sum.low += (sum.high - (total - part)) + (product - part);
  sum.high = total;
}

// <x, v> for cosine, 2 <x, v> - |v|^2 for euclidean. The product of two floats is a double: nothing is lost, and neither
// overflows.
BEITV2_FAST_EXACT inline TwoDoubles exact_score(const float* x, const float* code, int64_t dim, bool cosine) {
#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#endif
  TwoDoubles sum;
  for (int64_t d = 0; d < dim; ++d) {
    const double a = x[d], v = code[d];
    const double product = a * v;
    add(sum, cosine ? product : 2 * product);
    if (!cosine) add(sum, -v * v);
  }
  const double high = sum.high + sum.low;
  return {high, sum.low - (high - sum.high)};
}

// The lowest of the ascending positions with the highest score; code(n) is where the n-th candidate lies.
template <class Code>
int64_t exact_best(const float* x, int64_t count, Code code, int64_t dim, bool cosine) {
  int64_t best = 0;
  TwoDoubles highest = exact_score(x, code(0), dim, cosine);
  for (int64_t i = 1; i < count; ++i) {
    const float* candidate = code(i);
    if (std::memcmp(candidate, code(best), dim * sizeof(float)) == 0) continue;  // a duplicate of a lower index
    const TwoDoubles score = exact_score(x, candidate, dim, cosine);
    if (score > highest) highest = score, best = i;
  }
  return best;
}

struct Exact {
  TwoDoubles score;
  int64_t position;
};

// Puts the k best first, in order, equal ones by their position; code(position) is where one lies, of two at a time.
template <class Code>
void exact_order(const float* x, std::vector<Exact>& codes, int64_t k, Code code, int64_t dim, bool cosine) {
  for (size_t n = 0; n < codes.size(); ++n) {
    const float* values = code(codes[n].position);
    const bool copy = n && std::memcmp(values, code(codes[n - 1].position), dim * sizeof(float)) == 0;
    codes[n].score = copy ? codes[n - 1].score : exact_score(x, values, dim, cosine);
  }
  std::partial_sort(codes.begin(), codes.begin() + k, codes.end(), [](const Exact& a, const Exact& b) {
    return a.score > b.score || (!(b.score > a.score) && a.position < b.position);
  });
}

}  // namespace beitv2_fast
