// SPDX-License-Identifier: Apache-2.0
// Sums over rows in a fixed order, first of a block's threads, then of the blocks.
#pragma once

#include "common.cuh"

namespace spade_fast {
namespace {  // kernels of its own for every file

// to[column] = the sum of `values` over the block's rows, for the block's columns below c. All threads call it.
template <int VEC>
__device__ __forceinline__ void sum_block_rows(const float (&values)[VEC], const RowTiling& tiling, uint32_t c,
                                               float* to) {
  __shared__ float shared[VEC * kThreads];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < VEC; ++i) shared[i * kThreads + threadIdx.x] = values[i];
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < tiling.columns * VEC; i += kThreads) {
    const uint32_t column = blockIdx.y * tiling.columns * VEC + i, at = i % VEC * kThreads + i / VEC;
    if (column >= c) break;
    float sum = 0.0f;
    for (uint32_t r = 0; r < tiling.rows; ++r) sum += shared[at + r * tiling.columns];
    to[column] = sum;
  }
}

constexpr uint32_t kReduceColumns = 4;
constexpr uint32_t kReduceLanes = kThreads / kReduceColumns;

// out[group, column] = scale · the sum of parts [groups, count, width] over its second axis.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    reduce_parts_kernel(const float* parts, uint32_t count, uint32_t width, float scale, T* out) {
  __shared__ float sums[kThreads];
  const uint32_t lane = threadIdx.x / kReduceColumns;
  const uint32_t column = blockIdx.y * kReduceColumns + threadIdx.x % kReduceColumns;
  float sum = 0.0f;
  if (column < width) {
    const float* const from = parts + int64_t(blockIdx.x) * count * width + column;
#pragma unroll 4
    for (uint32_t k = lane; k < count; k += kReduceLanes) sum += from[int64_t(k) * width];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (lane == 0 && column < width) {
    float total[1] = {0.0f};
    for (uint32_t i = 0; i < kReduceLanes; ++i) total[0] += sums[i * kReduceColumns + threadIdx.x];
    total[0] *= scale;
    store_floats<T, 1>(out + int64_t(blockIdx.x) * width + column, total);
  }
}

template <typename T>
cudaError_t reduce_parts(const float* parts, int64_t groups, int64_t count, int64_t width, float scale, T* out,
                         cudaStream_t stream) {
  const int64_t blocks = ceil_div<int64_t>(width, kReduceColumns);
  if (groups > kMaxBlocks || blocks > 65535) return cudaErrorInvalidValue;
  SPADE_FAST_RUN(reduce_parts_kernel<T>, dim3(uint32_t(groups), uint32_t(blocks)), stream, parts, uint32_t(count),
                 uint32_t(width), scale, out);
  return cudaSuccess;
}

}  // namespace
}  // namespace spade_fast
