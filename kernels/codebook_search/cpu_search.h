// What the pieces of the CPU search hand each other: plain arrays, so that every instruction set compiles the same.
//
// A search screens, then resolves. Screening takes every vector against every code, fast and with a known error, and
// keeps the maximum of each group of 32 codes. Only groups within twice the error bound of the best can hold the answer:
// they are scored again in fp32, and of their codes those within twice the fp32 bound of the best in twice double precision.
// Bounds (u = 2^-24, x and v scaled by powers of two, which is exact; r() the part that rounding to bf16 took away):
//   bf16: |r(x)| max|v| + |x + r(x)| max|r(v)| + fp32's        fp32: (D + 8) u (|x| max|v| + max|v|^2 / 2)
#pragma once

#include <stdint.h>

namespace beitv2_fast {

constexpr int64_t PANEL = 16;    // vectors side by side in the lanes
constexpr int64_t GROUP = 32;    // codes of which the screening keeps the maximum
constexpr int64_t CHUNK = 256;   // groups screened before their maxima are looked at
constexpr int64_t PANELS = 12;   // panels of a block: the vectors that share a pass over the codes
constexpr float SMALL = 1e-30f;  // more than underflow can take away

// The codes, finite ones only, scaled to a largest element in [1, 2), padded to whole groups with copies of the last.
struct Codes {
  int64_t groups, dim, depth;  // depth: dim rounded up to 32, the width of the bf16 rows
  float* packed;               // [groups, dim, 32]
  uint16_t* bf16;              // [groups * 32, depth], or null
  float* bias;                 // [groups * 32] -|v|^2 / 2 (euclidean), or null (cosine)
  float max_norm, max_residual, max_bias;
};

struct GroupBounds {
  float norm, residual, bias;
};

struct Row {
  float norm;            // of the scaled row
  float screen_error;    // of one screened score
  float resolve_error;   // of one fp32 score
  int exponent;          // the row was divided by 2^exponent
  bool finite, zero, far;  // far: so much longer than the codes that fp32 does not reach
};

// Groups of a chunk that may hold the best code of each lane of a panel, and their screened maxima.
struct Candidates {
  int32_t group[PANEL][CHUNK];
  float screened[PANEL][CHUNK];
  int64_t count[PANEL];
};

struct Screen {
  bool bf16;  // reads bf16 panels [depth / 2, 16, 2]; otherwise fp32 panels [dim, 16]
  void (*enter)();
  void (*leave)();
  // Writes group_max [panels, CHUNK, 16] for groups begin..end and raises best [panels, 16].
  void (*run)(const Codes&, const void* panels, int64_t count, int64_t begin, int64_t end, float* group_max, float* best);
};

struct Kernels {
  const Screen* fast;   // bf16, or null
  const Screen* exact;  // fp32
  // 32 codes [32, dim] in fp32 -> their places in Codes.
  GroupBounds (*pack_codes)(const float* rows, float scale, const Codes&, int64_t group);
  // A panel of rows [16, dim] in fp32 -> scaled rows in place, panel, Row[16].
  void (*pack_rows)(float* rows, const Codes&, bool cosine, float scale, bool bf16, void* panel, Row* info);
  // Adds the groups whose maximum reaches best - 2 error.
  void (*filter)(const float* group_max, const float* best, const Row* info, int64_t begin, int64_t end, Candidates&);
  // The codes of these groups within twice the fp32 bound of the best, in ascending order, and how many. Groups whose
  // maximum does not reach least are passed over. scores: room for 32 a group; kept: for 33 a group.
  int64_t (*resolve)(const Codes&, const float* row, const Row& info, const int32_t* group, const float* screened,
                     int64_t count, float least, float* scores, int32_t* kept);
};

const Kernels& portable_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512_bf16_kernels();
const Kernels& amx_bf16_kernels();

}  // namespace beitv2_fast
