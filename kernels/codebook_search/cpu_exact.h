// The last word on a near tie: scores in twice double precision (Ogita, Rump, Oishi: Accurate sum and dot product, 2005).
#pragma once

#include <cmath>
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

// sum + a * b; what rounding loses goes to sum.low. exact: the product of two floats fits a double.
BEITV2_FAST_EXACT inline void add_product(TwoDoubles& sum, double a, double b, bool exact) {
#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#endif
  const double product = a * b;
  const double lost = exact ? 0.0 : std::fma(a, b, -product);
  const double total = sum.high + product;
  const double part = total - sum.high;
  sum.low += ((sum.high - (total - part)) + (product - part)) + lost;
  sum.high = total;
}

// code: fp32 or fp64 [dim], multiplied by code_scale; x [dim] in the same scale (euclidean) or any (cosine).
template <class T>
BEITV2_FAST_EXACT TwoDoubles exact_score(const double* x, const T* code, double code_scale, int64_t dim, bool cosine,
                                         bool exact) {
  TwoDoubles sum;
  for (int64_t d = 0; d < dim; ++d) {
    const double v = static_cast<double>(code[d]) * code_scale;
    add_product(sum, cosine ? x[d] : 2 * x[d], v, exact);
    if (!cosine) add_product(sum, -v, v, exact);
  }
  const double high = sum.high + sum.low;
  return {high, sum.low - (high - sum.high)};
}

// The lowest of the ascending positions with the highest score; at(i) is where position i's code lies.
template <class T, class Position, class Code>
int64_t exact_best(const double* x, int64_t count, Position position, Code code, double code_scale, int64_t dim,
                   bool cosine, bool exact) {
  int64_t best = 0;
  TwoDoubles highest = exact_score<T>(x, code(position(0)), code_scale, dim, cosine, exact);
  for (int64_t i = 1; i < count; ++i) {
    const T* candidate = code(position(i));
    if (std::memcmp(candidate, code(position(best)), dim * sizeof(T)) == 0) continue;  // a duplicate of a lower index
    const TwoDoubles score = exact_score<T>(x, candidate, code_scale, dim, cosine, exact);
    if (score > highest) highest = score, best = i;
  }
  return position(best);
}

}  // namespace beitv2_fast
