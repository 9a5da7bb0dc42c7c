// Softmax of rows of fp32 logits; included once for every instruction set, inside a namespace and a target region.
//
// No include guard, and nothing is included but more of the same kind.
#include "../cpu_floats.h"

// x += bias (if any); returns the largest element that is not NaN, or -inf.
static float add_bias(float* x, const float* bias, int64_t n) {
  const float lowest = -__builtin_inff();
  Floats top = splat(lowest);
  int64_t j = 0;
  if (bias) {
    for (; j + LANES <= n; j += LANES) {
      const Floats v = load(x + j) + load(bias + j);
      store(x + j, v);
      top = v > top ? v : top;
    }
    for (; j < n; ++j) {
      x[j] += bias[j];
      if (x[j] > top[0]) top[0] = x[j];
    }
  } else {
    for (; j + LANES <= n; j += LANES) {
      const Floats v = load(x + j);
      top = v > top ? v : top;
    }
    for (; j < n; ++j)
      if (x[j] > top[0]) top[0] = x[j];
  }
  float result = lowest;
  for (int l = 0; l < LANES; ++l)
    if (top[l] > result) result = top[l];
  return result;
}

// sum_j e^(x_j - top), in fp64 from block to block; with `keep`, x becomes e^(x - top).
static double exponentials(float* x, float top, int64_t n, bool keep) {
  constexpr int64_t BLOCK = 1024;
  double sum = 0;
  for (int64_t begin = 0; begin < n; begin += BLOCK) {
    const int64_t end = begin + BLOCK < n ? begin + BLOCK : n;
    Floats sums = splat(0.0f);
    int64_t j = begin;
    for (; j + LANES <= end; j += LANES) {
      const Floats e = exponential(load(x + j) - top);
      if (keep) store(x + j, e);
      sums += e;
    }
    if (j < end) {
      const Floats e = exponential(load_some(x + j, end - j, -__builtin_inff()) - top);
      if (keep) store_some(x + j, e, end - j);
      sums += load_some((const float*)&e, end - j, 0.0f);
    }
    for (int l = 0; l < LANES; ++l) sum += sums[l];
  }
  return sum;
}

// rows[r, :] *= scale[r], and their sum is added to `column_sums` (if any).
static void scale_rows(float* rows, const float* scale, int64_t count, int64_t n, float* column_sums) {
  int64_t j = 0;
  for (; j + LANES <= n; j += LANES) {
    Floats sum = column_sums ? load(column_sums + j) : splat(0.0f);
    for (int64_t r = 0; r < count; ++r) {
      const Floats v = load(rows + r * n + j) * scale[r];
      store(rows + r * n + j, v);
      sum += v;
    }
    if (column_sums) store(column_sums + j, sum);
  }
  for (; j < n; ++j)
    for (int64_t r = 0; r < count; ++r) {
      rows[r * n + j] *= scale[r];
      if (column_sums) column_sums[j] += rows[r * n + j];
    }
}

const softmax::Kernels softmax_kernels = {add_bias, exponentials, scale_rows};
