// SPDX-License-Identifier: Apache-2.0
// Sums of rows by segment, balanced and deterministic: the backward of every gather.
//
// Positions are sorted by segment (CSR: order, offsets). They are cut into pieces of equal length, whatever the lengths
// of the segments; a few threads sum a piece, a column each. Segments that lie inside a piece are finished there. A
// piece's first and last may reach beyond it, so their sums go to two scratch rows of the piece, head and tail, with
// the segment's number. Those rows are again sorted by segment, and kFan pieces make a piece of the next level, until
// one piece covers everything: a segment of a million positions takes four levels of short loops. No atomics.
#pragma once

#include "common.cuh"

namespace spade_fast {
namespace {  // kernels of its own for every file

constexpr int kFan = 32;

// Where the sums of one level's pieces go.
struct SegmentSums {
  const int32_t* offsets;  // [segments + 1]
  float *out0, *out1;      // finished: [segments, width] each; out1 for columns from width on
  float* rows;             // [2·pieces, columns], columns = width or 2·width
  int32_t* keys;           // [2·pieces]: segment of a row, -1: none
  uint32_t width, columns, pieces;
  int64_t length, total;  // positions of a piece, of all
};

// One thread's view of its piece: call `slot` for each segment met, in order, then `finish`.
struct Piece {
  int64_t lo, hi;
  uint32_t index, used = 0;

  __device__ __forceinline__ Piece(const SegmentSums& s, uint32_t piece)
      : lo(piece * s.length), hi(min(lo + s.length, s.total)), index(piece) {}

  // Where the sum of segment `key` goes: -1 to out, otherwise a row of s.rows.
  __device__ __forceinline__ int64_t slot(const SegmentSums& s, int32_t key, bool lead) {
    const int64_t first = s.offsets[key], last = s.offsets[key + 1];
    if (first >= lo && last <= hi) return -1;
    const uint32_t tail = first >= lo;
    used |= 1u << tail;
    const int64_t row = 2 * int64_t(index) + tail;
    if (lead) s.keys[row] = key;
    return row;
  }
  __device__ __forceinline__ void finish(const SegmentSums& s, bool lead) const {
    if (!lead || s.keys == nullptr) return;
    if (!(used & 1)) s.keys[2 * int64_t(index)] = -1;
    if (!(used & 2)) s.keys[2 * int64_t(index) + 1] = -1;
  }
};

template <int VEC>
__device__ __forceinline__ void store_sum(const SegmentSums& s, int64_t slot, int32_t key, uint32_t column,
                                          const float (&sum)[VEC]) {
  float* to;
  if (slot >= 0) {
    to = s.rows + slot * s.columns + column;
  } else {
    to = column < s.width ? s.out0 + int64_t(key) * s.width + column
                          : s.out1 + int64_t(key) * s.width + (column - s.width);
  }
  store_floats<float, VEC>(to, sum);
}

// Sums the scratch rows of kFan pieces of the level below.
template <int VEC>
__global__ void __launch_bounds__(kThreads)
    segments_combine_kernel(const float* rows, const int32_t* keys, int64_t slots, SegmentSums s, RowTiling tiling) {
  constexpr int kAhead = 8;
  const uint32_t row = tiling.row(), column = tiling.vector(row) * VEC;
  const uint32_t index = blockIdx.x * tiling.rows + row;
  if (row >= tiling.rows || column >= s.columns || index >= s.pieces) return;
  const bool lead = column == 0;
  Piece piece(s, index);
  const int64_t lo = int64_t(index) * 2 * kFan, hi = min(lo + 2 * kFan, slots);
  int32_t current = -1;
  float sum[VEC];
  fill(sum, 0.0f);
  for (int64_t i = lo; i < hi; i += kAhead) {
    int32_t key[kAhead];
    Vector<float, VEC> value[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) key[j] = i + j < hi ? __ldg(keys + i + j) : -1;
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (key[j] >= 0) value[j].load(rows + (i + j) * s.columns + column);
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (key[j] < 0) continue;
      if (key[j] != current) {
        if (current >= 0) store_sum(s, piece.slot(s, current, lead), current, column, sum);
        current = key[j];
        fill(sum, 0.0f);
      }
#pragma unroll
      for (int v = 0; v < VEC; ++v) sum[v] += value[j].get(v);
    }
  }
  if (current >= 0) store_sum(s, piece.slot(s, current, lead), current, column, sum);
  piece.finish(s, lead);
}

// The levels of one problem, and their scratch memory.
class SegmentPlan {
 public:
  // threads: of a piece. Pieces are long for large problems (little scratch), short for small ones (parallelism).
  SegmentPlan(int64_t total, int64_t columns, int64_t threads) : total_(total), columns_(columns), length_(128) {
    while (length_ > 16 && total / length_ * threads < (1 << 17)) length_ /= 2;
  }
  int64_t pieces(int level = 0) const {
    int64_t length = length_;
    while (level-- > 0) length *= kFan;
    return std::max<int64_t>(1, ceil_div(total_, length));
  }
  size_t bytes() const {
    size_t sum = 0;
    for (int level = 0; pieces(level) > 1; ++level) sum += level_bytes(level);
    return sum;
  }
  // The first level's destination: out0, out1 of `width` columns.
  SegmentSums first(const int32_t* offsets, float* out0, float* out1, int64_t width, void* scratch) const {
    SegmentSums s{offsets, out0,  out1, nullptr, nullptr, uint32_t(width), uint32_t(columns_), uint32_t(pieces()),
                  length_, total_};
    place(s, 0, static_cast<char*>(scratch));
    return s;
  }
  // All further levels, after the first was filled.
  cudaError_t combine(SegmentSums s, void* scratch, cudaStream_t stream) const {
    char* at = static_cast<char*>(scratch);
    for (int level = 1; s.pieces > 1; ++level) {
      const float* const rows = s.rows;
      const int32_t* const keys = s.keys;
      const int64_t slots = 2 * int64_t(s.pieces);
      at += level_bytes(level - 1);
      s.length *= kFan;
      s.pieces = uint32_t(pieces(level));
      place(s, level, at);
      const bool wide = s.width % 4 == 0 && aligned(s.out0, 16) && aligned(s.out1, 16);
      SPADE_FAST_CHECK(wide ? run<4>(rows, keys, slots, s, stream) : run<1>(rows, keys, slots, s, stream));
    }
    return cudaSuccess;
  }

 private:
  size_t row_bytes(int level) const {
    return ceil_div<size_t>(2 * pieces(level) * columns_ * sizeof(float), 256) * 256;
  }
  size_t level_bytes(int level) const {
    return row_bytes(level) + ceil_div<size_t>(2 * pieces(level) * sizeof(int32_t), 256) * 256;
  }
  void place(SegmentSums& s, int level, char* at) const {
    const bool needed = s.pieces > 1;  // one piece: every segment lies inside
    s.rows = needed ? reinterpret_cast<float*>(at) : nullptr;
    s.keys = needed ? reinterpret_cast<int32_t*>(at + row_bytes(level)) : nullptr;
  }
  template <int VEC>
  static cudaError_t run(const float* rows, const int32_t* keys, int64_t slots, const SegmentSums& s,
                         cudaStream_t stream) {
    const RowTiling tiling(s.columns / VEC);
    if (tiling.blocks > 65535) return cudaErrorInvalidValue;
    SPADE_FAST_RUN(segments_combine_kernel<VEC>, dim3(ceil_div(s.pieces, tiling.rows), tiling.blocks), stream, rows,
                   keys, slots, s, tiling);
    return cudaSuccess;
  }

  int64_t total_, columns_, length_;
};

}  // namespace
}  // namespace spade_fast
