// What the pieces of the CPU search hand each other: plain arrays, so that every instruction set compiles the same.
//
// A search screens, then resolves. Screening takes every vector against every code, fast and with a known error, and
// keeps the maximum of each group of 32 codes. Only groups within twice the error bound of the best can hold the
// answer: they are scored again in fp32, and of their codes those within twice the fp32 bound of the best in twice
// double precision. Bounds of one score (u = 2^-24; r() is what rounding to bytes took away; all codes share one bound):
//   fp32: (2 D + 40) u (|x| max|v| + max|v|^2 / 2)       bytes: |r(x)| max|v| + (|x| + |r(x)|) max|r(v)| + fp32's
// Vectors and codes are first multiplied by powers of two, which is exact, so that nothing overflows.
#pragma once

#include <stdint.h>

namespace beitv2_fast {

constexpr int64_t PANEL = 16;    // vectors side by side in the lanes
constexpr int64_t GROUP = 32;    // codes of which the screening keeps the maximum
constexpr int64_t CHUNK = 256;   // groups screened before their maxima are looked at
constexpr int64_t PANELS = 12;   // panels of a block: the vectors that share a pass over the codes
constexpr float SMALL = 1e-30f;  // more than underflow can take away

// The codes, finite ones only, scaled to a largest element in [1, 4), padded to whole groups with copies of the last.
struct Codes {
  int64_t groups, dim, depth;  // depth: dim rounded up to 4, the width of a row of bytes
  float* packed;               // [groups, dim, 32]
  float* bias;                 // [groups * 32] -|v|^2 / 2 (euclidean), or null (cosine)
  int8_t* bytes;               // [groups * 32, depth] v / step, rounded; null where no screening reads it
  int32_t* offset;             // [groups * 32] -128 * (sum of a row of bytes): panels hold x + 128, which is unsigned
  float step;
  float max_norm, max_residual, max_bias;
};

struct GroupBounds {
  float norm, residual, bias;
};

struct Row {
  float norm;              // of the scaled row
  float screen_error;      // of one screened score, in the screening's unit
  float resolve_error;     // of one fp32 score
  bool finite, zero, far;  // far: so much longer than the codes that fp32 does not reach
};

// Groups of a chunk that may hold the best code of each lane of a panel, and their screened maxima.
struct Candidates {
  int32_t group[PANEL][CHUNK];
  float screened[PANEL][CHUNK];
  int64_t count[PANEL];
};

// Writes group_max [panels, CHUNK, 16] for groups begin..end and raises best [panels, 16].
// Panels: fp32 [dim, 16], or for bytes 16 floats 1 / (step of the vector * step of the codes), then [depth / 4, 16, 4].
using Screen = void (*)(const Codes&, const void* panels, int64_t count, int64_t begin, int64_t end, float* group_max,
                        float* best);

struct Kernels {
  Screen screen_bytes;  // or null
  Screen screen_fp32;
  // 32 codes [32, dim] in fp32 -> their places in Codes.
  GroupBounds (*pack_codes)(const float* rows, float scale, const Codes&, int64_t group);
  // A panel of rows [16, dim] in fp32 -> scaled rows in place, panel, Row[16].
  void (*pack_rows)(float* rows, const Codes&, float scale, bool bytes, void* panel, Row* info);
  // Adds the groups whose maximum reaches best - 2 error.
  void (*filter)(const float* group_max, const float* best, const Row* info, int64_t begin, int64_t end, Candidates&);
  // The codes of these groups within twice the fp32 bound of the best, in ascending order, and how many. Groups whose
  // maximum does not reach least are passed over. scores: room for 32 per group; kept: for 33 per group.
  int64_t (*resolve)(const Codes&, const float* row, const Row& info, const int32_t* group, const float* screened,
                     int64_t count, float least, float* scores, int32_t* kept);
};

const Kernels& portable_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512_vnni_kernels();

}  // namespace beitv2_fast
