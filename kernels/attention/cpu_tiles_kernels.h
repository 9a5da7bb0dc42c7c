// Products of small matrices and rows of softmax; included once for every instruction set, inside a namespace and a
// target region (see cpu_variants.h).
//
// No include guard, and nothing is included but more of the same kind.
#include "../cpu_floats.h"

constexpr int WIDTH = REGISTER_FLOATS;
constexpr int ROWS = WIDTH == 16 ? 14 : WIDTH == 8 ? 6 : 5, VECTORS = 2;  // a tile that 32 or 16 registers hold

typedef float Register __attribute__((vector_size(4 * WIDTH)));

// a[r * row] for r < R <= 14, in bytes, from few registers: the processor multiplies an index by 1, 2, 4 or 8 only.
struct Column {
  const char *low, *high;  // rows 0 and 7
  int64_t row, row3, row5;

  __attribute__((always_inline)) Column(const float* a, int64_t a_row)
      : low((const char*)a), high((const char*)(a + 7 * a_row)), row(4 * a_row), row3(12 * a_row), row5(20 * a_row) {
    __asm__("" : "+r"(high), "+r"(row3), "+r"(row5));  // or the compiler would work them out again from more registers
  }
  __attribute__((always_inline)) float operator[](int r) const {
    const char* base = r < 7 ? low : high;
    const int at = r % 7;
    return *(const float*)(base + (at == 3 ? row3 : at == 5 ? row5 : at == 6 ? 2 * row3 : at * row));
  }
  __attribute__((always_inline)) void advance(int64_t bytes) { low += bytes, high += bytes; }
};

// c[R, V * WIDTH] = a b, or += with `accumulate`; R * V sums stay in registers.
template <int R, int V>
static inline __attribute__((always_inline)) void tile(const float* a, int64_t a_row, int64_t a_col, const float* b,
                                                       int64_t ldb, float* c, int64_t ldc, int64_t k,
                                                       bool accumulate) {
  Register sums[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[r][v] = Register{};
  Column column(a, a_row);
  for (int64_t p = 0; p < k; ++p) {
    Register x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) __builtin_memcpy(&x[v], b + v * WIDTH, sizeof(Register));
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] += x[v] * column[r];
    column.advance(4 * a_col);
    b += ldb;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* out = c + r * ldc + v * WIDTH;
      if (accumulate) {
        Register old;
        __builtin_memcpy(&old, out, sizeof old);
        sums[r][v] += old;
      }
      __builtin_memcpy(out, &sums[r][v], sizeof(Register));
    }
}

template <int R, int V>
static void rows_of(int64_t rows, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t ldb, float* c,
                    int64_t ldc, int64_t k, bool accumulate) {
  if (rows == R) return tile<R, V>(a, a_row, a_col, b, ldb, c, ldc, k, accumulate);
  if constexpr (R > 1) rows_of<R - 1, V>(rows, a, a_row, a_col, b, ldb, c, ldc, k, accumulate);
}

// c[m, n] = a b, or c += a b. a(i, p) = a[i a_row + p a_col], so a may be a transpose; b [k, n] and c have rows of ldb
// and ldc floats; n is a multiple of 16. Rows are cut into tiles of nearly one size: none is left that is too thin.
static void product(const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t ldb, float* c, int64_t ldc,
                    int64_t m, int64_t n, int64_t k, bool accumulate) {
  const int64_t tiles = (m + ROWS - 1) / ROWS;
  int64_t j = 0;
  for (; j + VECTORS * WIDTH <= n; j += VECTORS * WIDTH)
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t i = t * m / tiles, rows = (t + 1) * m / tiles - i;
      rows_of<ROWS, VECTORS>(rows, a + i * a_row, a_row, a_col, b + j, ldb, c + i * ldc + j, ldc, k, accumulate);
    }
  for (; j < n; j += WIDTH)
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t i = t * m / tiles, rows = (t + 1) * m / tiles - i;
      rows_of<ROWS, 1>(rows, a + i * a_row, a_row, a_col, b + j, ldb, c + i * ldc + j, ldc, k, accumulate);
    }
}

// out[p, i] = rows[i, p] for i < count and p < dim; out's columns from count to ldo become 0.
static void transpose(const float* rows, int64_t ld, int64_t count, int64_t dim, float* out, int64_t ldo) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
    for (int64_t p = 0; p < dim; ++p) {
      const float* column = rows + i * ld + p;
      float* to = out + p * ldo + i;
      for (int64_t l = 0; l < LANES; ++l) to[l] = column[l * ld];
    }
  for (; i < ldo; ++i)
    for (int64_t p = 0; p < dim; ++p) out[p * ldo + i] = i < count ? rows[i * ld + p] : 0.0f;
}

// scores becomes e^(scores + bias - top), where top is the largest; inverse is 1 / its sum.
static void softmax(float* scores, const float* bias, int64_t n, float* largest, float* inverse) {
  const float lowest = -__builtin_inff();
  Floats tops = splat(lowest);
  int64_t j = 0;
  for (; j + LANES <= n; j += LANES) {
    const Floats v = bias ? load(scores + j) + load(bias + j) : load(scores + j);
    store(scores + j, v);
    tops = v > tops ? v : tops;
  }
  for (; j < n; ++j) {
    if (bias) scores[j] += bias[j];
    if (scores[j] > tops[0]) tops[0] = scores[j];
  }
  float top = lowest;
  for (int l = 0; l < LANES; ++l) top = tops[l] > top ? tops[l] : top;
  Floats sums = splat(0.0f);
  for (j = 0; j + LANES <= n; j += LANES) {
    const Floats e = exponential(load(scores + j) - top);
    store(scores + j, e);
    sums += e;
  }
  if (j < n) {
    const Floats e = exponential(load_some(scores + j, n - j, lowest) - top);
    store_some(scores + j, e, n - j);
    sums += load_some((const float*)&e, n - j, 0.0f);
  }
  double sum = 0;
  for (int l = 0; l < LANES; ++l) sum += sums[l];
  *largest = top;
  *inverse = (float)(1.0 / sum);
}

// scores becomes inverse * e^(scores + bias - largest): the probabilities again, to the bit.
static void probabilities(float* scores, const float* bias, int64_t n, float largest, float inverse) {
  int64_t j = 0;
  for (; j + LANES <= n; j += LANES) {
    const Floats v = bias ? load(scores + j) + load(bias + j) : load(scores + j);
    store(scores + j, exponential(v - largest) * inverse);
  }
  if (j < n) {
    Floats v = load_some(scores + j, n - j, 0.0f);
    if (bias) v += load_some(bias + j, n - j, 0.0f);
    store_some(scores + j, exponential(v - largest) * inverse, n - j);
  }
}

// grad, of the probabilities, becomes that of the scores, p (grad - sum_j p_j grad_j), and is added to grad_bias (if any).
static void scores_gradient(const float* p, float* grad, float* grad_bias, int64_t n) {
  Floats sums = splat(0.0f);
  int64_t j = 0;
  for (; j + LANES <= n; j += LANES) sums += load(p + j) * load(grad + j);
  if (j < n) sums += load_some(p + j, n - j, 0.0f) * load_some(grad + j, n - j, 0.0f);
  float mean = 0;
  for (int l = 0; l < LANES; ++l) mean += sums[l];
  for (j = 0; j + LANES <= n; j += LANES) {
    const Floats g = load(p + j) * (load(grad + j) - mean);
    store(grad + j, g);
    if (grad_bias) store(grad_bias + j, load(grad_bias + j) + g);
  }
  for (; j < n; ++j) {
    grad[j] = p[j] * (grad[j] - mean);
    if (grad_bias) grad_bias[j] += grad[j];
  }
}

const attention::Kernels attention_kernels = {product, transpose, softmax, probabilities, scores_gradient};
