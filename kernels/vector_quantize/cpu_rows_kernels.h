// Included several times, in a namespace an instruction set. Sums run in 16 lanes, which the compiler keeps in vectors.

// Squares of floats neither overflow nor vanish in double.
static inline double sum_of_squares(const float* x, int64_t dim) {
  double lanes[16] = {}, sum = 0;
  int64_t d = 0;
  for (; d + 16 <= dim; d += 16)
    for (int l = 0; l < 16; ++l) lanes[l] += static_cast<double>(x[d + l]) * x[d + l];
  for (; d < dim; ++d) sum += static_cast<double>(x[d]) * x[d];
  for (int l = 0; l < 16; ++l) sum += lanes[l];
  return sum;
}

static inline float dot(const float* a, const float* b, int64_t dim) {
  float lanes[16] = {}, sum = 0;
  int64_t d = 0;
  for (; d + 16 <= dim; d += 16)
    for (int l = 0; l < 16; ++l) lanes[l] += a[d + l] * b[d + l];
  for (; d < dim; ++d) sum += a[d] * b[d];
  for (int l = 0; l < 16; ++l) sum += lanes[l];
  return sum;
}

static void backward_euclidean(const float* __restrict x, const float* __restrict code, const float* __restrict g,
                               float weight, int64_t dim, float* __restrict out) {
  if (!g)
    for (int64_t d = 0; d < dim; ++d) out[d] = weight * (x[d] - code[d]);
  else
    for (int64_t d = 0; d < dim; ++d) out[d] = g[d] + weight * (x[d] - code[d]);
}

// The components along y of weight (y - code) are known: <y, y> = 1.
static void backward_cosine(const float* __restrict x, const float* __restrict code, const float* __restrict g,
                            float weight, int64_t dim, float* __restrict out) {
  const double norm = __builtin_sqrt(sum_of_squares(x, dim));
  const bool tiny = norm < 1e-12;  // l2 divides by a constant there
  const double inverse = 1 / (tiny ? 1e-12 : norm);
  for (int64_t d = 0; d < dim; ++d) out[d] = static_cast<float>(x[d] * inverse);  // y
  const float scale = static_cast<float>(inverse);
  float along = 0;
  if (!tiny) along = (g ? dot(g, out, dim) : 0) + weight * (1 - dot(code, out, dim));
  const float of_y = weight - along;
  if (!g)
    for (int64_t d = 0; d < dim; ++d) out[d] = (of_y * out[d] - weight * code[d]) * scale;
  else
    for (int64_t d = 0; d < dim; ++d) out[d] = (g[d] - weight * code[d] + of_y * out[d]) * scale;
}

static void rotate_back(const float* __restrict x, const float* __restrict code, const float* __restrict g,
                        double shortest, bool cosine, int64_t dim, float* __restrict out) {
  const double least = 1e-6, norm = __builtin_sqrt(sum_of_squares(x, dim));
  const double unit = cosine ? (norm > 1e-12 ? norm : 1e-12) : 1, length = norm / unit;  // |y|, y = x / unit
  if (length < shortest) {
    memcpy(out, g, dim * sizeof(float));
    return;
  }
  const double of_code = __builtin_sqrt(sum_of_squares(code, dim));
  const double divisor = length > least ? length : least;
  const float to_u = static_cast<float>(1 / (divisor * unit));
  const float to_q = static_cast<float>(1 / (of_code > least ? of_code : least));
  for (int64_t d = 0; d < dim; ++d) out[d] = x[d] * to_u + code[d] * to_q;
  const float square = dot(out, out, dim), along = dot(g, out, dim);
  const float a = 2 * along / (square > 1e-12f ? square : 1e-12f), b = 2 * dot(g, code, dim) * to_q * to_u;
  const float scale = static_cast<float>(of_code / divisor);
  for (int64_t d = 0; d < dim; ++d) out[d] = (g[d] - a * out[d] + b * x[d]) * scale;
}

static const QuantizeRows rows = {backward_cosine, backward_euclidean, rotate_back};
