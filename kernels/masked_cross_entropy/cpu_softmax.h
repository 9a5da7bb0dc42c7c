// Softmax of rows of fp32 logits; included once for every instruction set, inside a namespace and a target region.
//
// No include guard and no includes: vectors are the compiler's own (16 floats, split as the target needs).

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
constexpr int64_t LANES = 16;

static inline __attribute__((always_inline)) Floats splat(float value) { return Floats{} + value; }

static inline __attribute__((always_inline)) Floats load(const float* p) {
  Floats v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

static inline __attribute__((always_inline)) void store(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof v); }

static inline __attribute__((always_inline)) Floats load_some(const float* p, int64_t count, float rest) {
  Floats v = splat(rest);
  __builtin_memcpy(&v, p, count * sizeof(float));
  return v;
}

static inline __attribute__((always_inline)) void store_some(float* p, Floats v, int64_t count) {
  __builtin_memcpy(p, &v, count * sizeof(float));
}

// e^x for x <= 0 within 2 ulp (Cody-Waite reduction, polynomial of degree 7); 0 below the normal range; NaN stays NaN.
static inline __attribute__((always_inline)) Floats exponential(Floats x) {
  const Floats shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Floats shifted = x * 1.44269504f + shift;
  const Floats n = shifted - shift;
  const Floats r = x - n * 0.693359375f - n * -2.12194440e-4f;
  Floats p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Ints power = (((Ints)shifted - (Ints)shift) + 127) << 23;
  return x < splat(-87.3f) ? splat(0.0f) : p * (Floats)power;
}

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

const Kernels kernels = {add_bias, exponentials, scale_rows};
