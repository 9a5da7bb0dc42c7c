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

inline const float* group_rows(const Codes& codes, int64_t group) {
  return group + 1 < codes.groups ? codes.rows + group * GROUP * codes.dim : codes.last;
}

float pack_group(const Codes& codes, int64_t group) {
  float most = 0;
  for (int64_t c = 0; c < GROUP; ++c) {
    int8_t* bytes = codes.bytes + (group * GROUP + c) * codes.depth;
    const float* row = group_rows(codes, group) + c * codes.dim;
    int32_t sum = 0;
    const float lost = round_row(row, codes.dim, codes.step, 0, bytes, &sum);
    for (int64_t d = codes.dim; d < codes.depth; ++d) bytes[d] = 0;
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
      info.far = max_magnitude(row, codes.dim) > 0x5d800000;  // 2^60
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

// The panel of bytes of 16 scaled rows; each has its own step.
inline void pack_bytes(const float* rows, const Codes& codes, void* panel, Row* info) {
  const int64_t dim = codes.dim;
  float* inverse_unit = static_cast<float*>(panel);
  uint8_t* out = static_cast<uint8_t*>(panel) + PANEL * sizeof(float);
  // Not so small that the bias, counted in units, leaves the range of int32.
  const float least = codes.max_bias / (codes.step * 0x1p30f) + 1e-20f;
  uint8_t rounded[64];
  for (int64_t lane = 0; lane < PANEL; ++lane) {
    const float* row = rows + lane * dim;
    const float needed = float_of(static_cast<uint32_t>(max_magnitude(row, dim))) / 126.99f;
    const float step = needed > least ? needed : least;
    float lost = 0;
    int32_t ignored = 0;
    for (int64_t start = 0; start < codes.depth; start += 64) {
      const int64_t depth = codes.depth - start < 64 ? codes.depth - start : 64;
      const int64_t width = dim - start < depth ? dim - start : depth;
      memset(rounded, 0, sizeof rounded);  // meets zeros in the codes
      lost += round_row(row + start, width, step, 128, rounded, &ignored);
      for (int64_t d = 0; d < depth; d += 4) memcpy(out + ((start + d) * PANEL + lane * 4), rounded + d, 4);
    }
    const float residual = __builtin_sqrtf(lost), unit = step * codes.step;
    const float quantization = residual * codes.max_norm + (info[lane].norm + residual) * codes.max_residual;
    inverse_unit[lane] = 1 / unit;
    info[lane].unit = unit;
    info[lane].screen_error = 1.01f * (quantization + info[lane].resolve_error) / unit + 1;
  }
}

void pack_rows(float* rows, int64_t count, const Codes& codes, float scale, bool bytes, void* panel, Row* info) {
  const int64_t dim = codes.dim;
  for (int64_t lane = 0; lane < PANEL; ++lane)
    info[lane] = lane < count ? scale_row(rows + lane * dim, codes, scale) : Row{};
  if (!panel) return;
  if (bytes) return pack_bytes(rows, codes, panel, info);
  float* out = static_cast<float*>(panel);
  for (int64_t d = 0; d < dim; ++d)
    for (int64_t lane = 0; lane < PANEL; ++lane) out[d * PANEL + lane] = rows[lane * dim + d];
}

}  // namespace
}  // namespace beitv2_fast
