// What draws codes for a panel of 16 vectors; included once for every instruction set, inside a namespace and a target
// region. No include guard, and nothing is included but more of the same kind.
#include "../cpu_floats.h"

typedef uint64_t Bits __attribute__((vector_size(64)));

static inline Floats magnitude(Floats x) { return x > splat(0) ? x : -x; }

static inline Floats bound_of(Floats score, const Bounds& bounds) {
  const Floats b = score * load(bounds.factor) + load(bounds.offset);
  if (bounds.cosine) return b;
  Floats root = b < splat(0) ? -b : splat(0);
  for (int l = 0; l < LANES; ++l) root[l] = __builtin_sqrtf(root[l]);
  return root * -bounds.of_root;
}

// group_max [groups, 16] becomes e^(b - top); b bounds s / temperature of a group's codes, and top is the largest b.
static void weigh(float* group_max, int64_t groups, Bounds& bounds) {
  Floats best = load(group_max);
  for (int64_t g = 1; g < groups; ++g) {
    const Floats score = load(group_max + g * LANES);
    best = score > best ? score : best;
  }
  const Floats top = bound_of(best, bounds), infinite = splat(__builtin_inff());
  store(bounds.top, top);
  for (int64_t g = 0; g < groups; ++g) {
    const Floats b = bound_of(load(group_max + g * LANES), bounds);
    const Floats exponent = b - top + 1e-6f * (magnitude(b) + magnitude(top));  // rounded up
    store(group_max + g * LANES, exponent > splat(80) ? infinite : exponential(exponent));
  }
}

// The first of the groups begin..end that has a code with 1 - u <= weight * factor / 2^53, and u 2^53 of its codes.
static int64_t scan(const uint64_t* counters, uint64_t key, const float* weight, float factor, int64_t begin,
                    int64_t end, int64_t* uniform) {
  for (int64_t g = begin; g < end; ++g) {
    const int64_t least = least_uniform(weight[g * LANES], factor);
    if (least == ONE) continue;
    Bits z;
    static_assert(sizeof z == GROUP * sizeof *counters);
    __builtin_memcpy(&z, counters + g * GROUP, sizeof z);
    z += key;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    z = (z ^ z >> 31) >> 11;
    __builtin_memcpy(uniform, &z, sizeof z);
    z -= least;
    uint64_t below = ~uint64_t{0};  // whose highest bit says that every code's u is
    for (int64_t c = 0; c < GROUP; ++c) below &= z[c];
    if (!(below >> 63)) return g;
  }
  return end;
}

// <x, v>, or |x - v|^2.
static double compare(const float* x, const float* v, int64_t dim, bool cosine) {
  double lanes[8] = {}, sum = 0;
  const auto term = [&](int64_t d) {
    const double a = x[d], b = v[d];
    return cosine ? a * b : (a - b) * (a - b);
  };
  int64_t d = 0;
  for (; d + 8 <= dim; d += 8)
    for (int64_t l = 0; l < 8; ++l) lanes[l] += term(d + l);
  for (; d < dim; ++d) sum += term(d);
  for (double lane : lanes) sum += lane;
  return sum;
}

const DrawKernels draw_kernels = {weigh, scan, compare};
