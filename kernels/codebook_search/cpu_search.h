// What the pieces of the CPU search hand each other: plain arrays, so that every instruction set compiles the same.
//
// A search screens, then resolves (of few vectors: cpu_few.h). Screening takes every vector against every code, fast
// and with a known error, and keeps the maximum of each group of 8 codes. Only groups within twice the error bound of
// the k-th best can hold one of the k answers: they are scored again in fp32, and of their codes those within twice the
// fp32 bound of the k-th best are put in order, in twice double precision where fp32 cannot.
// Bounds of one score (u = 2^-24; r() is what rounding to bytes took away; all codes share one bound):
//   fp32: (2 D + 40) u (|x| max|v| + max|v|^2 / 2)       bytes: |r(x)| max|v| + (|x| + |r(x)|) max|r(v)| + fp32's
// Vectors and codes are first multiplied by powers of two, which is exact, so that nothing overflows.
#pragma once

#include <stdint.h>

namespace beitv2_fast {

constexpr int64_t PANEL = 16;    // vectors side by side in the lanes
constexpr int64_t GROUP = 8;     // codes of which the screening keeps the maximum
constexpr int64_t CHUNK = 256;   // groups screened before their maxima are looked at
constexpr int64_t PANELS = 12;   // panels of a block: the vectors that share a pass over the codes
constexpr int64_t TILE = 3;      // panels that are packed together
constexpr float SMALL = 1e-30f;  // more than underflow can take away

// The codes, finite ones only, scaled to a largest element near 1, in whole groups: the last is filled with copies.
struct Codes {
  int64_t count, groups, dim, depth;  // depth: dim rounded up to 4, the width of a row of bytes
  const float* rows;           // [groups - 1, 8, dim]
  const float* last;           // [8, dim], the last group
  float* bias;                 // [groups * 8] -|v|^2 / 2 (euclidean), or null (cosine)
  int8_t* bytes;               // [groups, depth / 4, 8, 4] v / step, rounded; null where no screening reads it
  int32_t* offset;             // [groups * 8] -128 * (sum of a code's bytes): panels hold x + 128, which is unsigned
  float step;
  float max_norm, max_residual, max_bias;
};

struct GroupBounds {
  float square;     // the largest |v|^2; Inf instead of NaN
  int32_t largest;  // the largest magnitude as bits: NaN and Inf are above every finite number
};

struct Row {
  float norm;              // of the scaled row
  float screen_error;      // of one screened score, in the screening's unit
  float unit;              // of the screening in bytes, 0 for fp32
  float resolve_error;     // of one fp32 score
  bool finite, zero, far;  // far: so much longer than the codes that fp32 does not reach
};

// Groups of a chunk that may hold one of the best codes of each lane of a panel, and their screened maxima.
struct Candidates {
  int32_t group[PANEL][CHUNK];
  float screened[PANEL][CHUNK];
  int64_t count[PANEL];
};

// Writes group_max [panels, CHUNK, 16] for groups begin..end and raises best [panels, 16].
// Panels: fp32 [dim, 16]; for bytes 16 floats 1 / (step of the vector * step of the codes), then [depth / 4, 16, 4].
using Screen = void (*)(const Codes&, const void* panels, int64_t count, int64_t begin, int64_t end, float* group_max,
                        float* best);

struct Kernels {
  Screen screen_bytes;  // or null
  Screen screen_fp32;
  // Writes the bias of a group, if codes have one.
  GroupBounds (*measure_group)(const Codes&, int64_t group);
  // Writes the bytes and offsets of a group; returns the largest norm of what rounding took away.
  float (*pack_group)(const Codes&, int64_t group);
  // Rows [count, dim] in fp32 of up to TILE panels, zeros behind them to the last one's end -> scaled rows in place,
  // panels unless null, a Row for each lane.
  void (*pack_rows)(float* rows, int64_t count, const Codes&, float scale, bool bytes, void* panels, Row* info);
  // Raises top [k, 16], the k best of each lane, best first, to those of more groups.
  void (*raise_top)(const float* group_max, int64_t groups, int64_t k, float* top);
  // Adds the groups whose maximum reaches best - 2 error.
  void (*filter)(const float* group_max, const float* best, const Row* info, int64_t begin, int64_t end, Candidates&);
  // The codes of these groups within twice the fp32 bound of the k-th best, in ascending order, their scores, and how
  // many. Groups whose maximum does not reach least are passed over; adds to scored how many are not. scores: room for
  // 8 per group and 8 more; kept: for 9 per group; top: for 2 k + 16.
  int64_t (*resolve)(const Codes&, const float* row, const Row& info, const int32_t* group, const float* screened,
                     int64_t count, float least, int64_t k, float* top, float* scores, int32_t* kept, int64_t* scored);
};

inline float fp32_error(int64_t dim, float norm, float max_norm, float max_bias) {
  return 1.01f * ((2 * dim + 40) * 6e-8f) * (norm * max_norm + max_bias) + SMALL;
}

const Kernels& portable_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512_vnni_kernels();

}  // namespace beitv2_fast
