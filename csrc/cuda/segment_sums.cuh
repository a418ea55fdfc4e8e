// SPDX-License-Identifier: Apache-2.0
// Sums of rows by segment, balanced and deterministic: the backward of every gather. No atomics.
//
// Positions are sorted by segment (order and offsets). They are cut into pieces of equal length, whatever the lengths
// of the segments. A few threads sum a piece, each its own columns.
//
// A segment that lies inside a piece is finished there. A piece's first and last segment may reach beyond the piece.
// Their sums go to two rows of scratch memory, head and tail, with the segment's number as the row's key. These rows
// are again sorted by segment, so kFan pieces of one level make a piece of the next, until one piece covers everything.
// A segment of a million positions takes four levels of short loops.
#pragma once

#include "common.cuh"

namespace spade_fast {
namespace {  // kernels of its own for every file

constexpr int kFan = 32;

// Where the sums of one level's pieces go.
struct SegmentSums {
  const int32_t* offsets;  // [segments + 1]
  float *out0, *out1;      // finished sums: [segments, width] each; out1 has the columns from width on
  float* rows;             // scratch: [2·pieces, columns], with columns = width or 2·width
  int32_t* keys;           // scratch: [2·pieces], the segment of a row; -1: the row is not used
  uint32_t width, columns, pieces;
  int64_t length, total;  // positions of a piece, and of all pieces
};

// One thread's view of its piece. For each segment that the thread meets, in order, it calls `open` and stores the
// segment's sums. After the last it calls `finish`.
struct Piece {
  const SegmentSums& sums;
  const int64_t first, last;  // positions of the piece: first .. last - 1
  const uint32_t index;
  const bool leads;   // whether this thread writes the keys of the piece
  uint32_t used = 0;  // bit 0: the head row has a sum, bit 1: the tail row has
  int32_t segment = -1;
  int64_t row = -1;  // of scratch memory, for the open segment; -1: its sums are finished

  __device__ __forceinline__ Piece(const SegmentSums& sums_, uint32_t index_, bool leads_)
      : sums(sums_),
        first(index_ * sums_.length),
        last(min(first + sums_.length, sums_.total)),
        index(index_),
        leads(leads_) {}

  __device__ __forceinline__ void open(int32_t segment_) {
    segment = segment_;
    const int64_t begin = sums.offsets[segment], end = sums.offsets[segment + 1];
    row = -1;
    if (begin >= first && end <= last) return;
    const uint32_t tail = begin >= first;
    used |= 1u << tail;
    row = 2 * int64_t(index) + tail;
    if (leads) sums.keys[row] = segment;
  }

  // Stores VEC columns of the open segment.
  template <int VEC>
  __device__ __forceinline__ void store(uint32_t column, const float (&values)[VEC]) const {
    float* to;
    if (row >= 0) {
      to = sums.rows + row * sums.columns + column;
    } else if (column < sums.width) {
      to = sums.out0 + int64_t(segment) * sums.width + column;
    } else {
      to = sums.out1 + int64_t(segment) * sums.width + (column - sums.width);
    }
    store_floats<float, VEC>(to, values);
  }

  __device__ __forceinline__ void finish() const {
    if (!leads || sums.keys == nullptr) return;
    if (!(used & 1)) sums.keys[2 * int64_t(index)] = -1;
    if (!(used & 2)) sums.keys[2 * int64_t(index) + 1] = -1;
  }
};

// The sum of the segment that a thread is in, for VEC columns.
template <int VEC>
struct RunningSum {
  Piece& piece;
  const uint32_t column;
  int32_t segment = -1;
  float value[VEC];

  __device__ __forceinline__ RunningSum(Piece& piece_, uint32_t column_) : piece(piece_), column(column_) {
    fill(value, 0.0f);
  }
  // What is added from here on belongs to `next`.
  __device__ __forceinline__ void enter(int32_t next) {
    if (next == segment) return;
    leave();
    segment = next;
    fill(value, 0.0f);
  }
  __device__ __forceinline__ void leave() const {
    if (segment < 0) return;
    piece.open(segment);
    piece.store(column, value);
  }
};

// The scratch rows of one level.
struct ScratchRows {
  const float* rows;
  const int32_t* keys;
  int64_t count;
};

// Sums the scratch rows of kFan pieces of the level below.
template <int VEC>
__global__ void __launch_bounds__(kThreads)
    segments_combine_kernel(ScratchRows below, SegmentSums sums, RowTiling tiling) {
  constexpr int kAhead = 8;
  const uint32_t row = tiling.row(), column = tiling.vector(row) * VEC;
  const uint32_t index = blockIdx.x * tiling.rows + row;
  if (row >= tiling.rows || column >= sums.columns || index >= sums.pieces) return;
  Piece piece(sums, index, column == 0);
  RunningSum<VEC> sum(piece, column);
  const int64_t first = int64_t(index) * 2 * kFan, last = min(first + 2 * kFan, below.count);
  for (int64_t i = first; i < last; i += kAhead) {
    int32_t key[kAhead];
    Vector<float, VEC> value[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) key[j] = i + j < last ? __ldg(below.keys + i + j) : -1;
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (key[j] >= 0) value[j].load(below.rows + (i + j) * sums.columns + column);
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (key[j] < 0) continue;
      sum.enter(key[j]);
#pragma unroll
      for (int v = 0; v < VEC; ++v) sum.value[v] += value[j].get(v);
    }
  }
  sum.leave();
  piece.finish();
}

// The levels of one problem, and their scratch memory.
class SegmentPlan {
 public:
  // total: positions. columns: of a row of sums. threads: of a piece. Pieces are long for large problems, which then
  // need little scratch memory, and short for small problems, which then occupy more threads.
  SegmentPlan(int64_t total, int64_t columns, int64_t threads) : total_(total), columns_(columns), length_(128) {
    while (length_ > 16 && total / length_ * threads < (1 << 17)) length_ /= 2;
  }
  size_t bytes() const {
    size_t sum = 0;
    for (int level = 0; pieces(level) > 1; ++level) sum += level_bytes(level);
    return sum;
  }
  // The first level's destination. A kernel of the caller fills it.
  SegmentSums first_level(const int32_t* offsets, float* out0, float* out1, int64_t width, void* scratch) const {
    SegmentSums sums{};
    sums.offsets = offsets;
    sums.out0 = out0, sums.out1 = out1;
    sums.width = uint32_t(width), sums.columns = uint32_t(columns_);
    sums.length = length_, sums.total = total_;
    set_pieces(sums, 0, static_cast<char*>(scratch));
    return sums;
  }
  // Runs all further levels, after the first was filled.
  cudaError_t combine(SegmentSums sums, void* scratch, cudaStream_t stream) const {
    char* memory = static_cast<char*>(scratch);
    for (int level = 1; sums.pieces > 1; ++level) {
      const ScratchRows below{sums.rows, sums.keys, 2 * int64_t(sums.pieces)};
      memory += level_bytes(level - 1);
      sums.length *= kFan;
      set_pieces(sums, level, memory);
      const bool wide = sums.width % 4 == 0 && aligned(sums.out0, 16) && aligned(sums.out1, 16);
      SPADE_FAST_CHECK(wide ? run<4>(below, sums, stream) : run<1>(below, sums, stream));
    }
    return cudaSuccess;
  }

 private:
  int64_t pieces(int level) const {
    int64_t length = length_;
    while (level-- > 0) length *= kFan;
    return std::max<int64_t>(1, ceil_div(total_, length));
  }
  size_t row_bytes(int level) const {
    return ceil_div<size_t>(2 * pieces(level) * columns_ * sizeof(float), 256) * 256;
  }
  size_t level_bytes(int level) const {
    return row_bytes(level) + ceil_div<size_t>(2 * pieces(level) * sizeof(int32_t), 256) * 256;
  }
  // A single piece has no scratch rows, because every segment lies inside it.
  void set_pieces(SegmentSums& sums, int level, char* memory) const {
    sums.pieces = uint32_t(pieces(level));
    const bool scratch = sums.pieces > 1;
    sums.rows = scratch ? reinterpret_cast<float*>(memory) : nullptr;
    sums.keys = scratch ? reinterpret_cast<int32_t*>(memory + row_bytes(level)) : nullptr;
  }
  template <int VEC>
  static cudaError_t run(const ScratchRows& below, const SegmentSums& sums, cudaStream_t stream) {
    const RowTiling tiling(sums.columns / VEC);
    if (tiling.blocks > 65535) return cudaErrorInvalidValue;
    SPADE_FAST_RUN(segments_combine_kernel<VEC>, dim3(ceil_div(sums.pieces, tiling.rows), tiling.blocks), stream, below,
                   sums, tiling);
    return cudaSuccess;
  }

  int64_t total_, columns_, length_;
};

}  // namespace
}  // namespace spade_fast
