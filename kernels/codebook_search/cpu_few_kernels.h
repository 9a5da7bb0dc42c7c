// Scores of few vectors; included once for every instruction set, inside a namespace and a target region. No include
// guard and no includes. Dimensions lie in the lanes, so that the codes are read once and as they are.

template <int LANES>
struct Registers {
  typedef float Floats __attribute__((vector_size(4 * LANES)));
  typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
};

template <int LANES>
inline typename Registers<LANES>::Floats load(const float* p) {
  typename Registers<LANES>::Floats values;
  memcpy(&values, p, sizeof values);
  return values;
}

template <class To, class From>
inline To bits_as(From from) {
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

inline float widened(Bfloat16 value) { return bits_as<float>(value.bits << 16); }

inline float widened(Half value) {
  const int32_t magnitude = value.bits & 0x7fff, infinite = (0x7bff - magnitude) >> 31 & 0x7f800000;  // and NaN
  const int32_t normal = bits_as<int32_t>(bits_as<float>(magnitude << 13) * 0x1p112f);
  // Subnormal in fp32 as well, which a thread may read as 0.
  const int32_t small = bits_as<int32_t>(static_cast<float>(magnitude) * 0x1p-24f);
  const int32_t is_small = (magnitude - 0x400) >> 31;
  return bits_as<float>((is_small & small) | (~is_small & normal) | infinite | (value.bits & 0x8000) << 16);
}

template <class T>
void widen(const void* codes, int64_t count, float* out) {
  const T* values = static_cast<const T*>(codes);
  for (int64_t i = 0; i < count; ++i) out[i] = widened(values[i]);
}

template <int LANES>
inline Four fold(typename Registers<LANES>::Floats lanes) {
  if constexpr (LANES == 4) {
    return lanes;
  } else {
    typename Registers<LANES / 2>::Floats halves[2];
    memcpy(halves, &lanes, sizeof lanes);
    return fold<LANES / 2>(halves[0] + halves[1]);
  }
}

// The sum of the lanes of each of four.
template <int LANES>
inline Four sums(const typename Registers<LANES>::Floats* lanes) {
  Four a = fold<LANES>(lanes[0]), b = fold<LANES>(lanes[1]), c = fold<LANES>(lanes[2]), d = fold<LANES>(lanes[3]);
  const Four ab = BEITV2_FAST_SHUFFLE(a, b, 0, 4, 1, 5) + BEITV2_FAST_SHUFFLE(a, b, 2, 6, 3, 7);
  const Four cd = BEITV2_FAST_SHUFFLE(c, d, 0, 4, 1, 5) + BEITV2_FAST_SHUFFLE(c, d, 2, 6, 3, 7);
  return BEITV2_FAST_SHUFFLE(ab, cd, 0, 1, 4, 5) + BEITV2_FAST_SHUFFLE(ab, cd, 2, 3, 6, 7);
}

// <vector, code> of ROWS vectors and four codes, and with SQUARES <code, code> behind them. LANES <= dim.
template <int LANES, int ROWS, bool SQUARES>
inline void dots(const float* const* codes, int64_t dim, const float* vectors, Four* out) {
  typedef typename Registers<LANES>::Floats Floats;
  typedef typename Registers<LANES>::Ints Ints;
  constexpr int OUTS = ROWS + SQUARES;
  Floats total[OUTS][4] = {};
  const auto add = [&](int64_t d, Ints mask) __attribute__((always_inline)) {
    Floats x[ROWS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) x[r] = load<LANES>(vectors + r * dim + d);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      Floats code = load<LANES>(codes[c] + d);
      code = (Floats)((Ints)code & mask);
#pragma GCC unroll 16
      for (int o = 0; o < OUTS; ++o) total[o][c] += (o < ROWS ? x[o] : code) * code;
    }
  };
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) add(d, ~Ints{});
  if (d < dim) {  // the last lanes again, without those that are in the sums
    Ints mask;
    for (int l = 0; l < LANES; ++l) mask[l] = l < d + LANES - dim ? 0 : -1;
    add(dim - LANES, mask);
  }
#pragma GCC unroll 16
  for (int o = 0; o < OUTS; ++o) out[o] = sums<LANES>(total[o]);
}

// The squares are of the first ROWS vectors' pass over four codes; LATER vectors share each of the others.
template <int LANES, int ROWS, int LATER>
void score_run(const char* codes, int64_t dim, const float* vectors, bool cosine, Run& run) {
  Four largest = {}, total = {}, highest[FEW];
  for (Four& score : highest) score = Four{} - __builtin_inff();
  for (int64_t j = 0; j < run.count; j += 4) {
    const int64_t count = run.count - j < 4 ? run.count - j : 4;
    const char* first = codes + j * run.width;
    if (run.widen) run.widen(first, count * dim, run.widened);
    const float *values = run.widen ? run.widened : reinterpret_cast<const float*>(first), *four[4];
    for (int64_t c = 0; c < 4; ++c) four[c] = values + (c < count ? c : count - 1) * dim;
    Four scores[FEW + LATER];
    dots<LANES, ROWS, true>(four, dim, vectors, scores);
    const Four square = scores[ROWS];
    for (int64_t r = ROWS; r < run.rows; r += LATER)
      dots<LANES, LATER, false>(four, dim, vectors + r * dim, scores + r);
    largest = square > largest ? square : largest;
    total += square;
    for (int64_t r = 0; r < run.rows; ++r) {
      if (!cosine) scores[r] -= 0.5f * square;
      highest[r] = scores[r] > highest[r] ? scores[r] : highest[r];
      memcpy(&run.scores[r][j], &scores[r], sizeof(Four));
    }
  }
  const auto most = [](Four a) {
    float found = a[0];
    for (int l = 1; l < 4; ++l) found = a[l] > found ? a[l] : found;
    return found;
  };
  run.largest = most(largest);
  run.total = (total[0] + total[1]) + (total[2] + total[3]);
  for (int64_t r = 0; r < run.rows; ++r) run.highest[r] = most(highest[r]);
}

template <int LANES>
void score_lanes(const char* codes, int64_t dim, const float* vectors, bool cosine, Run& run) {
  if (run.rows == 1) return score_run<LANES, 1, 1>(codes, dim, vectors, cosine, run);
  if constexpr (REGISTER_FLOATS == 16)  // and 32 of them: for 4 vectors, a code, and 4 codes times 4 sums and a square
    if (run.rows > 2) return score_run<LANES, 4, 4>(codes, dim, vectors, cosine, run);
  if constexpr (REGISTER_FLOATS == 8)
    if (run.rows > 4) return score_run<LANES, 2, 3>(codes, dim, vectors, cosine, run);
  score_run<LANES, 2, 2>(codes, dim, vectors, cosine, run);
}

void score(const char* codes, int64_t dim, const float* vectors, bool cosine, Run& run) {
  if constexpr (REGISTER_FLOATS >= 16)
    if (dim >= 64) return score_lanes<16>(codes, dim, vectors, cosine, run);
  if constexpr (REGISTER_FLOATS >= 8)
    if (dim >= 8) return score_lanes<8>(codes, dim, vectors, cosine, run);
  score_lanes<4>(codes, dim, vectors, cosine, run);
}

static const FewKernels few_kernels = {score, widen<Half>, widen<Bfloat16>};
