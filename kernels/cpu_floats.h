// 16 floats at once and e^x of them; included once for every instruction set, inside a namespace and a target region.
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
