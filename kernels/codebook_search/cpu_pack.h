// Packing of vectors and codes for the screening; compiled once for every instruction set (see ../cpu_target.h).
#pragma once

#include <string.h>

#include "cpu_search.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // 64-byte vectors never cross a function that is not inlined

namespace beitv2_fast {
namespace {

#include "../cpu_floats.h"

inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// The largest magnitude as bits: NaN and Inf compare above every finite number.
inline int32_t max_magnitude(const float* row, int64_t dim) {
  int32_t largest = 0;
  for (int64_t d = 0; d < dim; ++d) {
    int32_t bits;
    memcpy(&bits, row + d, 4);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

inline float sum_of_lanes(const Floats& lanes) {
  float sum = 0;
  for (int64_t l = 0; l < LANES; ++l) sum += lanes[l];
  return sum;
}

inline float sum_of_squares(const float* row, int64_t dim) {
  Floats lanes = splat(0);
  for (int64_t d = 0; d < dim; d += LANES) {
    const Floats values = dim - d < LANES ? load_some(row + d, dim - d, 0) : load(row + d);
    lanes += values * values;
  }
  return sum_of_lanes(lanes);
}

// Writes row / step + zero as bytes and adds row / step to sum; returns the square of what rounding took away.
// |row| <= 127 step.
inline float round_row(const float* row, int64_t dim, float step, int32_t zero, void* out, int32_t* sum) {
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  const Floats inverse = splat(1 / step);
  Floats lost = splat(0);
  Ints total = {};
  for (int64_t d = 0; d < dim; d += LANES) {
    const int64_t count = dim - d < LANES ? dim - d : LANES;
    const Floats values = count < LANES ? load_some(row + d, count, 0) : load(row + d);
    const Ints rounded = __builtin_convertvector(values * inverse + 128.5f, Ints) - 128;
    const Floats rest = values - __builtin_convertvector(rounded, Floats) * step;
    const Bytes bytes = __builtin_convertvector(rounded + zero, Bytes);
    lost += rest * rest;
    total += rounded;
    count < LANES ? memcpy(static_cast<char*>(out) + d, &bytes, count)
                  : memcpy(static_cast<char*>(out) + d, &bytes, sizeof bytes);
  }
  for (int64_t l = 0; l < LANES; ++l) *sum += total[l];
  return sum_of_lanes(lost);
}

// The same for a row of any width: its bytes four at a time, `stride` bytes apart, with zeros up to codes.depth.
inline float spread_row(const float* row, const Codes& codes, float step, int32_t zero, void* out, int64_t stride,
                        int32_t* sum) {
  uint8_t rounded[64];
  float lost = 0;
  for (int64_t start = 0; start < codes.depth; start += 64) {
    const int64_t depth = codes.depth - start < 64 ? codes.depth - start : 64;
    const int64_t width = codes.dim - start < depth ? codes.dim - start : depth;
    memset(rounded, 0, sizeof rounded);
    lost += round_row(row + start, width, step, zero, rounded, sum);
    for (int64_t d = 0; d < depth; d += 4) memcpy(static_cast<char*>(out) + (start + d) / 4 * stride, rounded + d, 4);
  }
  return lost;
}

inline const float* group_rows(const Codes& codes, int64_t group) {
  return group + 1 < codes.groups ? codes.rows + group * GROUP * codes.dim : codes.last;
}

float pack_group(const Codes& codes, int64_t group) {
  float most = 0;
  for (int64_t c = 0; c < GROUP; ++c) {
    const float* row = group_rows(codes, group) + c * codes.dim;
    int32_t sum = 0;
    const float lost = spread_row(row, codes, codes.step, 0, codes.bytes + group * GROUP * codes.depth + c * 4,
                                  GROUP * 4, &sum);
    codes.offset[group * GROUP + c] = -128 * sum;
    most = lost > most ? lost : most;
  }
  return __builtin_sqrtf(most);
}

// The exponent that brings a largest magnitude to [1, 4) as a factor that is a float.
inline float scale_of(int32_t largest) {
  const int32_t exponent = (largest >> 23) - 127;
  return float_of(static_cast<uint32_t>(127 - (exponent < 126 ? exponent : 126)) << 23);
}

inline void multiply(float* row, int64_t dim, float factor) {
  for (int64_t d = 0; d < dim; ++d) row[d] *= factor;
}

// Scales a row: cosine by its own power of two, euclidean by the codebook's.
inline Row scale_row(float* row, const Codes& codes, float scale) {
  Row info = {};
  int32_t largest = max_magnitude(row, codes.dim);
  info.finite = largest < 0x7f800000;
  info.zero = largest == 0;
  if (info.finite && !info.zero) {
    if (codes.bias) {
      multiply(row, codes.dim, scale);
      info.far = !(sum_of_squares(row, codes.dim) < 0x1p120f);
    } else {
      if (largest < 0x00800000) {  // subnormal
        multiply(row, codes.dim, 0x1p100f);
        largest = max_magnitude(row, codes.dim);
      }
      multiply(row, codes.dim, scale_of(largest));
    }
  }
  if (!info.finite || info.far) memset(row, 0, codes.dim * sizeof(float));  // not screened: have another answer
  info.norm = __builtin_sqrtf(sum_of_squares(row, codes.dim));
  info.resolve_error = fp32_error(codes.dim, info.norm, codes.max_norm, codes.max_bias);
  info.screen_error = info.resolve_error;
  return info;
}

// The panels of bytes of scaled rows. Each has its own step; all share the largest where that is at most twice as long,
// because screening then adds the bias once per code, not once per vector and code.
inline void pack_bytes(const float* rows, int64_t count, const Codes& codes, void* panels, Row* info) {
  const int64_t dim = codes.dim;
  // Not so small that the bias, counted in units, leaves the range of int32.
  const float least = codes.max_bias / (codes.step * 0x1p30f) + 1e-20f;
  float steps[TILE * PANEL], longest = 0, shortest = __builtin_inff();
  for (int64_t i = 0; i < count * PANEL; ++i) {
    const float largest = float_of(static_cast<uint32_t>(max_magnitude(rows + i * dim, dim)));
    steps[i] = largest / 126.99f > least ? largest / 126.99f : least;
    longest = steps[i] > longest ? steps[i] : longest;
    shortest = largest > 0 && steps[i] < shortest ? steps[i] : shortest;  // zeros take any step
  }
  const bool shared = codes.bias && longest <= 2 * shortest;
  for (int64_t i = 0; i < count * PANEL; ++i) {
    char* panel = static_cast<char*>(panels) + i / PANEL * (4 + codes.depth) * PANEL;
    const float step = shared ? longest : steps[i], unit = step * codes.step, inverse = 1 / unit;
    int32_t ignored = 0;
    const float residual = __builtin_sqrtf(spread_row(rows + i * dim, codes, step, 128,
                                                      panel + 4 * PANEL + i % PANEL * 4, 4 * PANEL, &ignored));
    const float quantization = residual * codes.max_norm + (info[i].norm + residual) * codes.max_residual;
    memcpy(panel + i % PANEL * 4, &inverse, 4);
    info[i].unit = unit;
    info[i].screen_error = 1.01f * (quantization + info[i].resolve_error) / unit + 1;
  }
}

void pack_rows(float* rows, int64_t count, const Codes& codes, float scale, bool bytes, void* panels, Row* info) {
  const int64_t dim = codes.dim, filled = (count + PANEL - 1) / PANEL;
  for (int64_t i = 0; i < filled * PANEL; ++i) info[i] = i < count ? scale_row(rows + i * dim, codes, scale) : Row{};
  if (!panels) return;
  if (bytes) return pack_bytes(rows, filled, codes, panels, info);
  float* out = static_cast<float*>(panels);
  for (int64_t p = 0; p < filled; ++p, rows += dim * PANEL, out += dim * PANEL)
    for (int64_t d = 0; d < dim; ++d)
      for (int64_t lane = 0; lane < PANEL; ++lane) out[d * PANEL + lane] = rows[lane * dim + d];
}

}  // namespace
}  // namespace beitv2_fast
