// The highest rate of multiply-adds that one core reaches, from registers alone: the line that a search cannot cross.
// Compiled by bench/peak.py with -O3 -march=native.
#define SUMS 10  // independent, so that the latency of one hides behind the others; fits 16 registers

typedef float floats __attribute__((vector_size(__BIGGEST_ALIGNMENT__)));

// Multiply-adds of fp32 done.
double fp32(long steps, float* sink) {
  floats sums[SUMS] = {{0}}, a = {0}, b = {0};
  for (unsigned l = 0; l < sizeof(floats) / 4; ++l) a[l] = sink[0], b[l] = sink[1];
  for (long s = 0; s < steps; ++s)
#pragma GCC unroll 16
    for (int i = 0; i < SUMS; ++i) sums[i] = sums[i] * a + b;
  for (int i = 0; i < SUMS; ++i) sink[0] += sums[i][0];
  return (double)steps * SUMS * (sizeof(floats) / 4);
}

#if defined(__AVX512VNNI__)
#include <immintrin.h>

// Multiply-adds of bytes done; 0 where there is no instruction for them.
double bytes(long steps, float* sink) {
  __m512i sums[SUMS], a = _mm512_set1_epi32((int)sink[0]);
  for (int i = 0; i < SUMS; ++i) sums[i] = _mm512_set1_epi32(i);
  for (long s = 0; s < steps; ++s)
#pragma GCC unroll 16
    for (int i = 0; i < SUMS; ++i) sums[i] = _mm512_dpbusd_epi32(sums[i], a, a);
  for (int i = 0; i < SUMS; ++i) sink[0] += (float)_mm512_cvtsi512_si32(sums[i]);
  return (double)steps * SUMS * 64;
}
#else
double bytes(long steps, float* sink) { return 0 * (steps + sink[0]); }
#endif
