// The arithmetic of reference.py, row by row. Included several times, in a namespace an instruction set.
//
// Adding 1.5 * 2^(52 - s) to a double rounds it to a multiple of 2^-s, to even, and leaves that multiple in its low bits.
// All factors have 24 bits, so products are exact and a compiler that fuses multiply and add changes nothing.

static inline int64_t bits_of(double value) {
  int64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline double double_of(int64_t bits) {
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// The largest magnitude as an integer: NaN and Inf compare above every finite number.
static inline int32_t largest_magnitude(const float* row, int64_t dim) {
  int32_t largest = 0;
  for (int64_t d = 0; d < dim; ++d) {
    int32_t bits;
    memcpy(&bits, row + d, sizeof bits);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// Sets `factor` such that row[d] * factor is l2(row)[d]. False for a row with NaN or Inf.
static inline bool unit_factor(const float* row, int64_t dim, double* factor) {
  const int32_t magnitude = largest_magnitude(row, dim);
  if (magnitude >= 0x7f800000) return false;
  float largest;
  memcpy(&largest, &magnitude, sizeof largest);
  const double down = double_of((int64_t{2046} << 52) - (bits_of(largest) & (int64_t{2047} << 52)));
  const double round = 96;  // 1.5 * 2^(52 - 46)
  int64_t squares = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const double scaled = row[d] * down;
    squares += bits_of(scaled * scaled + round) - bits_of(round);
  }
  const double norm = __builtin_sqrt(static_cast<double>(squares)) * 0x1p-23, least = 1e-12 * down;
  *factor = static_cast<double>(static_cast<float>(1 / (norm > least ? norm : least))) * down;
  return true;
}

static bool add_cosine(const float* __restrict row, int64_t dim, int64_t* __restrict sums) {
  double factor;
  if (!unit_factor(row, dim, &factor)) return false;
  const double round = 0x1.8p16;  // steps of 2^-36
  for (int64_t d = 0; d < dim; ++d) sums[d] += bits_of(row[d] * factor + round) - bits_of(round);
  return true;
}

static bool add_euclidean(const float* __restrict row, int64_t dim, int64_t* __restrict sums) {
  if (largest_magnitude(row, dim) >= 0x4f800000) return false;  // 2^32
  const double round = 0x1.8p52;
  for (int64_t d = 0; d < dim; ++d) {
    const double value = row[d], coarse = value * 0x1p4 + round;
    sums[d] += bits_of(coarse) - bits_of(round);
    sums[dim + d] += bits_of((value - (coarse - round) * 0x1p-4) * 0x1p40 + round) - bits_of(round);
  }
  return true;
}

static inline double sum_cosine(const int64_t* sums, int64_t, int64_t d) {
  return static_cast<double>(sums[d]) * 0x1p-36;
}

static inline double sum_euclidean(const int64_t* sums, int64_t dim, int64_t d) {
  return static_cast<double>(sums[d]) * 0x1p-4 + static_cast<double>(sums[dim + d]) * 0x1p-40;
}

static void mean_cosine(const int64_t* __restrict sums, int64_t dim, double factor, float* __restrict out) {
  for (int64_t d = 0; d < dim; ++d) out[d] = static_cast<float>(sum_cosine(sums, dim, d) * factor);
}

static void mean_euclidean(const int64_t* __restrict sums, int64_t dim, double factor, float* __restrict out) {
  for (int64_t d = 0; d < dim; ++d) out[d] = static_cast<float>(sum_euclidean(sums, dim, d) * factor);
}

static void pull_cosine(const int64_t* __restrict sums, const float* __restrict code, int64_t dim, double count,
                        double scale, float* __restrict out) {
  for (int64_t d = 0; d < dim; ++d) out[d] = static_cast<float>(scale * (count * code[d] - sum_cosine(sums, dim, d)));
}

static void pull_euclidean(const int64_t* __restrict sums, const float* __restrict code, int64_t dim, double count,
                           double scale, float* __restrict out) {
  for (int64_t d = 0; d < dim; ++d)
    out[d] = static_cast<float>(scale * (count * code[d] - sum_euclidean(sums, dim, d)));
}

static void scale(const float* row, int64_t dim, double factor, float* out) {
  for (int64_t d = 0; d < dim; ++d) out[d] = static_cast<float>(row[d] * factor);
}

static void l2(const float* row, int64_t dim, float* out) {
  double factor;
  scale(row, dim, unit_factor(row, dim, &factor) ? factor : __builtin_nan(""), out);
}

static void mix(const float* old, const float* next, int64_t dim, float decay, float rest, float* out) {
  const double d0 = decay, d1 = rest;
  for (int64_t d = 0; d < dim; ++d) out[d] = static_cast<float>(d0 * old[d] + d1 * next[d]);
}

static const UpdateRows rows = {add_cosine, add_euclidean, mean_cosine, mean_euclidean,
                                pull_cosine, pull_euclidean, l2, mix, scale};
