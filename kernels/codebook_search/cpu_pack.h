// Packing of vectors and codes for the screening; compiled once for every instruction set (see ../cpu_target.h).
#pragma once

#include <string.h>

#include "cpu_search.h"

namespace beitv2_fast {
namespace {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t to_bf16(float value) {  // to nearest, ties to even; finite values only
  const uint32_t bits = bits_of(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The largest magnitude as bits: NaN and Inf compare above every finite number.
inline int32_t max_magnitude(const float* row, int64_t dim) {
  int32_t largest = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const int32_t magnitude = static_cast<int32_t>(bits_of(row[d]) & 0x7fffffff);
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

inline float sum_of_squares(const float* row, int64_t dim) {
  float lanes[PANEL] = {};
  int64_t d = 0;
  for (; d + PANEL <= dim; d += PANEL)
    for (int64_t l = 0; l < PANEL; ++l) lanes[l] += row[d + l] * row[d + l];
  float sum = 0;
  for (; d < dim; ++d) sum += row[d] * row[d];
  for (int64_t l = 0; l < PANEL; ++l) sum += lanes[l];
  return sum;
}

// Rounds a row to bf16 [depth], zeros after dim; returns the square of what rounding took away.
inline float round_row(const float* row, int64_t dim, int64_t depth, uint16_t* out) {
  float lanes[PANEL] = {}, lost = 0;
  int64_t d = 0;
  for (; d + PANEL <= dim; d += PANEL)
    for (int64_t l = 0; l < PANEL; ++l) {
      out[d + l] = to_bf16(row[d + l]);
      const float rest = row[d + l] - float_of(static_cast<uint32_t>(out[d + l]) << 16);
      lanes[l] += rest * rest;
    }
  for (; d < dim; ++d) {
    out[d] = to_bf16(row[d]);
    const float rest = row[d] - float_of(static_cast<uint32_t>(out[d]) << 16);
    lost += rest * rest;
  }
  for (; d < depth; ++d) out[d] = 0;
  for (int64_t l = 0; l < PANEL; ++l) lost += lanes[l];
  return lost;
}

GroupBounds pack_codes(const float* rows, float scale, const Codes& codes, int64_t group) {
  const int64_t dim = codes.dim;
  GroupBounds bounds = {0, 0, 0};
  float* packed = codes.packed + group * dim * GROUP;
  for (int64_t c = 0; c < GROUP; ++c)
    for (int64_t d = 0; d < dim; ++d) packed[d * GROUP + c] = rows[c * dim + d] * scale;
  float scaled[4096];
  for (int64_t c = 0; c < GROUP; ++c) {
    float square = 0, lost = 0;
    for (int64_t start = 0; start < dim; start += 4096) {
      const int64_t width = dim - start < 4096 ? dim - start : 4096;
      const bool last = start + width == dim;
      for (int64_t d = 0; d < width; ++d) scaled[d] = rows[c * dim + start + d] * scale;
      square += sum_of_squares(scaled, width);
      if (codes.bf16)
        lost += round_row(scaled, width, last ? codes.depth - start : width,
                          codes.bf16 + (group * GROUP + c) * codes.depth + start);
    }
    const float bias = -0.5f * square;
    if (codes.bias) codes.bias[group * GROUP + c] = bias;
    bounds.norm = square > bounds.norm ? square : bounds.norm;
    bounds.residual = lost > bounds.residual ? lost : bounds.residual;
    bounds.bias = -bias > bounds.bias ? -bias : bounds.bias;
  }
  bounds.norm = __builtin_sqrtf(bounds.norm);
  bounds.residual = __builtin_sqrtf(bounds.residual);
  return bounds;
}

inline Row scale_row(float* row, const Codes& codes, bool cosine, float scale) {
  Row info = {};
  const int32_t largest = max_magnitude(row, codes.dim);
  info.finite = largest < 0x7f800000;
  info.zero = largest == 0;
  if (!info.finite || info.zero) {
    memset(row, 0, codes.dim * sizeof(float));
    return info;
  }
  if (cosine) {
    // Two factors: the inverse of the smallest powers of two is not a float.
    info.exponent = (largest >> 23) - 127;
    const int half = info.exponent / 2;
    const float first = float_of(static_cast<uint32_t>(127 - half) << 23);
    const float second = float_of(static_cast<uint32_t>(127 - (info.exponent - half)) << 23);
    for (int64_t d = 0; d < codes.dim; ++d) row[d] = row[d] * first * second;
    if (largest < 0x00800000) {  // subnormal: now below 1, once more
      const int exponent = info.exponent;
      info = scale_row(row, codes, cosine, scale);
      info.exponent += exponent;
      return info;
    }
  } else {
    for (int64_t d = 0; d < codes.dim; ++d) row[d] *= scale;
    info.far = max_magnitude(row, codes.dim) > 0x5d800000;  // 2^60
    if (info.far) memset(row, 0, codes.dim * sizeof(float));
  }
  return info;
}

void pack_rows(float* rows, const Codes& codes, bool cosine, float scale, bool bf16, void* panel, Row* info) {
  const int64_t dim = codes.dim;
  const float slack = 1.001f + dim * 1.2e-7f, rounding = (codes.depth + 8) * 6e-8f;
  uint16_t rounded[PANEL][64];
  for (int64_t lane = 0; lane < PANEL; ++lane) {
    float* row = rows + lane * dim;
    info[lane] = scale_row(row, codes, cosine, scale);
    Row& r = info[lane];
    r.norm = __builtin_sqrtf(sum_of_squares(row, dim));
    r.resolve_error = slack * rounding * (r.norm * codes.max_norm + codes.max_bias) + SMALL;
    r.screen_error = r.resolve_error;
  }
  if (!bf16) {
    float* out = static_cast<float*>(panel);
    for (int64_t lane = 0; lane < PANEL; ++lane)
      for (int64_t d = 0; d < dim; ++d) out[d * PANEL + lane] = rows[lane * dim + d];
    return;
  }
  uint32_t* out = static_cast<uint32_t*>(panel);  // pairs of neighbours of one vector
  float lost[PANEL] = {};
  for (int64_t start = 0; start < codes.depth; start += 64) {
    const int64_t depth = codes.depth - start < 64 ? codes.depth - start : 64;
    const int64_t width = dim - start < depth ? dim - start : depth;
    for (int64_t lane = 0; lane < PANEL; ++lane) {
      lost[lane] += round_row(rows + lane * dim + start, width, depth, rounded[lane]);
    }
    for (int64_t p = 0; p < depth / 2; ++p)
      for (int64_t lane = 0; lane < PANEL; ++lane)
        memcpy(out + (start / 2 + p) * PANEL + lane, rounded[lane] + 2 * p, 4);
  }
  for (int64_t lane = 0; lane < PANEL; ++lane) {
    const float residual = __builtin_sqrtf(lost[lane]);
    info[lane].screen_error +=
        slack * (residual * codes.max_norm * (1 + rounding) + (info[lane].norm + residual) * codes.max_residual);
  }
}

}  // namespace
}  // namespace beitv2_fast
