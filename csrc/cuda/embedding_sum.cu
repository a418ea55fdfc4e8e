// SPDX-License-Identifier: Apache-2.0
// embedding_sum: for each row of codes, the sum of one table row a tap, then bias and ReLU. Its backward sums by segment.
#include <initializer_list>

#include "reduce.cuh"
#include "segment_sums.cuh"

namespace spade_fast {
namespace {

constexpr int kTarget = 1024;  // blocks of a kernel whose blocks have ranges
constexpr int kGather = 4;     // columns of a thread in backward

// The rows of one tap's table [rows, width] that a code stands for, for its label and for its edge. -1: none.
__device__ __forceinline__ int32_t label_row(int32_t code, int32_t rows, bool edges) {
  const int32_t label = edges ? code >> 1 : code;  // -1 stays -1
  return label < rows - int32_t(edges) ? label : -1;
}
__device__ __forceinline__ int32_t edge_row(int32_t code, int32_t rows, bool edges) {
  return edges && code >= 0 && (code & 1) ? rows - 1 : -1;
}

template <typename T, int VEC>
__global__ void __launch_bounds__(kThreads)
    embedding_sum_kernel(const T* table, const float* bias, const int32_t* codes, int64_t q, int taps, int32_t rows,
                         uint32_t width, bool edges, bool relu, RowTiling tiling, T* out) {
  constexpr int kAhead = 3;
  const uint32_t row = tiling.row(), column = tiling.vector(row) * VEC;
  const int64_t index = int64_t(blockIdx.x) * tiling.rows + row;
  if (row >= tiling.rows || column >= width || index >= q) return;
  float sum[VEC];
  fill(sum, 0.0f);
  for (int t = 0; t < taps; t += kAhead) {
    int32_t label[kAhead], edge[kAhead];
    Vector<T, VEC> label_value[kAhead], edge_value[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int32_t code = t + j < taps ? __ldg(codes + index * taps + t + j) : -1;
      label[j] = label_row(code, rows, edges);
      edge[j] = edge_row(code, rows, edges);
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const T* const from = table + int64_t(t + j) * rows * width + column;
      if (label[j] >= 0) label_value[j].load(from + int64_t(label[j]) * width);
      if (edge[j] >= 0) edge_value[j].load(from + int64_t(edge[j]) * width);
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
#pragma unroll
      for (int v = 0; v < VEC; ++v) {
        if (label[j] >= 0) sum[v] += label_value[j].get(v);
        if (edge[j] >= 0) sum[v] += edge_value[j].get(v);
      }
    }
  }
  float added[VEC];
  load_or(added, bias == nullptr ? nullptr : bias + column, 0.0f);
#pragma unroll
  for (int v = 0; v < VEC; ++v) {
    sum[v] += added[v];
    if (relu) sum[v] = sum[v] > 0.0f ? sum[v] : 0.0f;
  }
  store_floats<T, VEC>(out + index * width + column, sum);
}

// numbers [q, taps], or with edges [q, 2·taps]: the rows of the labels, then the rows of the edges.
__global__ void __launch_bounds__(kThreads) embedding_rows_kernel(const int32_t* codes, int64_t count, int64_t taps,
                                                                  int32_t rows, bool edges, int32_t* numbers) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t index = i / taps, t = i - index * taps, per_row = edges ? 2 * taps : taps;
  const int32_t code = codes[i], first = int32_t(t * rows);
  const int32_t label = label_row(code, rows, edges), edge = edge_row(code, rows, edges);
  numbers[index * per_row + t] = label < 0 ? -1 : first + label;
  if (edges) numbers[index * per_row + taps + t] = edge < 0 ? -1 : first + edge;
}

template <typename T, int VEC>
__device__ __forceinline__ void add_gated(float (&sum)[VEC], const Vector<T, VEC>& dout, const Vector<T, VEC>& out,
                                          bool relu) {
#pragma unroll
  for (int v = 0; v < VEC; ++v) sum[v] += !relu || out.get(v) > 0.0f ? dout.get(v) : 0.0f;
}

// Sums dout's rows by table row, over a piece of the sorted positions. A thread has VEC columns.
template <typename T, int VEC>
__global__ void __launch_bounds__(kThreads)
    embedding_table_kernel(const T* dout, const T* out, const int32_t* numbers, const int32_t* order, FastDiv by_row,
                           bool relu, SegmentSums to, RowTiling tiling) {
  constexpr int kAhead = 4;
  const uint32_t row = tiling.row(), column = tiling.vector(row) * VEC, width = to.width;
  const uint32_t index = blockIdx.x * tiling.rows + row;
  if (row >= tiling.rows || column >= width || index >= to.pieces) return;
  Piece piece(to, index, column == 0);
  RunningSum<VEC> sum(piece, column);
  for (int64_t i = piece.first; i < piece.last; i += kAhead) {
    int32_t key[kAhead];
    Vector<T, VEC> value[kAhead], gate[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const uint32_t entry = uint32_t(__ldg(order + min(i + j, piece.last - 1)));
      key[j] = i + j < piece.last ? __ldg(numbers + entry) : -1;
      const int64_t at = int64_t(by_row.div(entry)) * width + column;
      if (key[j] < 0) continue;
      value[j].load(dout + at);
      if (relu) gate[j].load(out + at);
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (key[j] < 0) continue;
      sum.enter(key[j]);
      add_gated(sum.value, value[j], gate[j], relu);
    }
  }
  sum.leave();
  piece.finish();
}

// A block sums the columns of a range of rows, and writes a row of parts.
template <typename T, int VEC>
__global__ void __launch_bounds__(kThreads)
    embedding_bias_kernel(const T* dout, const T* out, int64_t q, uint32_t width, bool relu, int64_t span,
                          RowTiling tiling, float* parts) {
  const uint32_t row = tiling.row(), column = tiling.vector(row) * VEC;
  const int64_t lo = blockIdx.x * span, hi = min(lo + span, q);
  float sum[VEC];
  fill(sum, 0.0f);
  if (row < tiling.rows && column < width) {
#pragma unroll 4
    for (int64_t r = lo + row; r < hi; r += tiling.rows) {
      Vector<T, VEC> value, gate;
      value.load(dout + r * width + column);
      if (relu) gate.load(out + r * width + column);
      add_gated(sum, value, gate, relu);
    }
  }
  sum_block_rows(sum, tiling, width, parts + int64_t(blockIdx.x) * width);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) embedding_convert_kernel(const float* from, int64_t count, T* to) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const float value[1] = {i < count ? from[i] : 0.0f};
  if (i < count) store_floats<T, 1>(to + i, value);
}

size_t padded(size_t bytes) { return ceil_div<size_t>(bytes, 256) * 256; }

struct Workspace {
  SegmentPlan plan;
  size_t sums_bytes, parts_bytes;

  Workspace(int64_t q, int64_t per_row, int64_t table_rows, int64_t width)
      : plan(q * per_row, width, ceil_div<int64_t>(width, kGather)),
        sums_bytes(padded(size_t(table_rows * width) * sizeof(float))),
        parts_bytes(padded(size_t(kTarget * width) * sizeof(float))) {}
};

struct Backward {
  const int32_t *numbers, *order, *offsets;
  int64_t q, per_row, table_rows, width;
  bool relu;
  char* workspace;
  cudaStream_t stream;
};

template <typename T, int VEC>
cudaError_t run_backward(const Backward& b, const T* dout, const T* out, T* dtable, T* dbias) {
  const Workspace w(b.q, b.per_row, b.table_rows, b.width);
  const RowTiling tiling(b.width / VEC);
  if (tiling.blocks > 65535) return cudaErrorInvalidValue;
  constexpr bool kInPlace = sizeof(T) == sizeof(float);
  const int64_t elements = b.table_rows * b.width;
  float* const sums = kInPlace ? reinterpret_cast<float*>(dtable) : reinterpret_cast<float*>(b.workspace);
  char* const scratch = b.workspace + w.sums_bytes;
  SPADE_FAST_CHECK(cudaMemsetAsync(sums, 0, size_t(elements) * sizeof(float), b.stream));
  if (b.per_row > 0 && b.table_rows > 0) {
    const SegmentSums to = w.plan.first_level(b.offsets, sums, sums, b.width, scratch);
    SPADE_FAST_RUN((embedding_table_kernel<T, VEC>), dim3(ceil_div(to.pieces, tiling.rows), tiling.blocks), b.stream,
                   dout, out, b.numbers, b.order, FastDiv(uint32_t(b.per_row)), b.relu, to, tiling);
    SPADE_FAST_CHECK(w.plan.combine(to, scratch, b.stream));
  }
  if (!kInPlace && elements > 0) {
    SPADE_FAST_RUN(embedding_convert_kernel<T>, uint32_t(ceil_div<int64_t>(elements, kThreads)), b.stream, sums,
                   elements, dtable);
  }
  float* const parts = reinterpret_cast<float*>(scratch + padded(w.plan.bytes()));
  const int64_t span = ceil_div<int64_t>(ceil_div<int64_t>(b.q, kTarget), tiling.rows) * tiling.rows;
  const int64_t ranges = ceil_div(b.q, span);
  SPADE_FAST_RUN((embedding_bias_kernel<T, VEC>), dim3(uint32_t(ranges), tiling.blocks), b.stream, dout, out, b.q,
                 uint32_t(b.width), b.relu, span, tiling, parts);
  return reduce_parts(parts, 1, ranges, b.width, 1.0f, dbias, b.stream);
}

}  // namespace
}  // namespace spade_fast

using namespace spade_fast;

extern "C" cudaError_t spade_fast_embedding_sum(const void* table, int dtype, const float* bias, const int32_t* codes,
                                                int64_t q, int64_t taps, int64_t rows, int64_t width, int edges,
                                                int relu, void* out, cudaStream_t stream) {
  if (q < 0 || taps < 0 || rows < edges || width < 0 || rows > kMaxBlocks || taps > kMaxBlocks) {
    return cudaErrorInvalidValue;
  }
  if (q * width == 0) return cudaSuccess;
  return with_type(dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int kWide = 16 / int(sizeof(T));
    const auto run = [&](auto vec) -> cudaError_t {
      constexpr int VEC = decltype(vec)::value;
      const RowTiling tiling(width / VEC);
      const int64_t blocks = ceil_div<int64_t>(q, tiling.rows);
      if (blocks > kMaxBlocks || tiling.blocks > 65535) return cudaErrorInvalidValue;
      SPADE_FAST_RUN((embedding_sum_kernel<T, VEC>), dim3(uint32_t(blocks), tiling.blocks), stream,
                     static_cast<const T*>(table), bias, codes, q, int(taps), int32_t(rows), uint32_t(width),
                     edges != 0, relu != 0, tiling, static_cast<T*>(out));
      return cudaSuccess;
    };
    const bool wide = width % kWide == 0 && aligned(table, 16) && aligned(out, 16) && aligned(bias, 16);
    return wide ? run(std::integral_constant<int, kWide>()) : run(std::integral_constant<int, 1>());
  });
}

extern "C" cudaError_t spade_fast_embedding_rows(const int32_t* codes, int64_t q, int64_t taps, int64_t rows, int edges,
                                                 int32_t* numbers, cudaStream_t stream) {
  if (q < 0 || taps < 0 || rows < edges || (taps > 0 && rows > kMaxBlocks / taps)) return cudaErrorInvalidValue;
  const int64_t count = q * taps, blocks = ceil_div<int64_t>(count, kThreads);
  if (count == 0) return cudaSuccess;
  if (blocks > kMaxBlocks) return cudaErrorInvalidValue;
  SPADE_FAST_RUN(embedding_rows_kernel, uint32_t(blocks), stream, codes, count, taps, int32_t(rows), edges != 0,
                 numbers);
  return cudaSuccess;
}

extern "C" size_t spade_fast_embedding_sum_backward_workspace(int64_t q, int64_t per_row, int64_t table_rows,
                                                              int64_t width) {
  const Workspace w(q, per_row, table_rows, width);
  return w.sums_bytes + padded(w.plan.bytes()) + w.parts_bytes;
}

extern "C" cudaError_t spade_fast_embedding_sum_backward(const void* dout, const void* out, int dtype,
                                                         const int32_t* numbers, const int32_t* order,
                                                         const int32_t* offsets, int64_t q, int64_t per_row,
                                                         int64_t table_rows, int64_t width, int relu, void* dtable,
                                                         void* dbias, void* workspace, cudaStream_t stream) {
  if (q < 0 || per_row < 0 || table_rows < 0 || width < 0 || width > kMaxBlocks || table_rows > kMaxBlocks ||
      (per_row > 0 && q > kMaxBlocks / per_row)) {
    return cudaErrorInvalidValue;
  }
  return with_type(dtype, [&](auto t) -> cudaError_t {
    using T = decltype(t);
    if (q * width == 0) {
      if (table_rows * width > 0) SPADE_FAST_CHECK(cudaMemsetAsync(dtable, 0, table_rows * width * sizeof(T), stream));
      return width > 0 ? cudaMemsetAsync(dbias, 0, width * sizeof(T), stream) : cudaSuccess;
    }
    const Backward b{numbers, order, offsets, q, per_row, table_rows, width, relu != 0, static_cast<char*>(workspace),
                     stream};
    const T *from = static_cast<const T*>(dout), *of = static_cast<const T*>(out);
    T *table = static_cast<T*>(dtable), *bias = static_cast<T*>(dbias);
    const bool wide = width % kGather == 0 && aligned(from, 16) && aligned(of, 16) && aligned(table, 16);
    return wide ? run_backward<T, kGather>(b, from, of, table, bias) : run_backward<T, 1>(b, from, of, table, bias);
  });
}
