// SPDX-License-Identifier: Apache-2.0
// segments: the positions of each segment, by a radix sort.
#include "common.cuh"
#include "sort.cuh"

namespace spade_fast {
namespace {

// keys[i] = segment_ids[i] + 1, or 0 for a negative id. positions[i] = i.
__global__ void __launch_bounds__(kThreads)
    segments_keys_kernel(const int32_t* segment_ids, uint32_t count, uint32_t num, uint32_t* keys, int32_t* positions) {
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= count) return;
  keys[i] = segment_ids[i] < 0 ? 0 : min(uint32_t(segment_ids[i]), num) + 1;
  positions[i] = int32_t(i);
}

// offsets[s]: the number of keys that are at most s.
__global__ void __launch_bounds__(kThreads)
    segments_offsets_kernel(const uint32_t* keys, uint32_t count, uint32_t num, int32_t* offsets) {
  const uint32_t s = blockIdx.x * kThreads + threadIdx.x;
  if (s > num) return;
  uint32_t lo = 0, hi = count;
  while (lo < hi) {
    const uint32_t middle = lo + (hi - lo) / 2;
    if (keys[middle] <= s) {
      lo = middle + 1;
    } else {
      hi = middle;
    }
  }
  offsets[s] = int32_t(lo);
}

size_t padded(int64_t elements) { return size_t(ceil_div<int64_t>(elements, 64)) * 64; }

int bits_for(int64_t num) {  // of keys 0 .. num + 1
  int bits = 1;
  while (bits < 32 && (int64_t(1) << bits) < num + 2) ++bits;
  return bits;
}

}  // namespace
}  // namespace spade_fast

using namespace spade_fast;

extern "C" size_t spade_fast_segments_workspace(int64_t count, int64_t num) {
  size_t bytes = 0;
  sort_pairs(nullptr, bytes, nullptr, nullptr, nullptr, nullptr, int(count), bits_for(num), nullptr);
  return 3 * padded(count) * sizeof(uint32_t) + bytes;
}

extern "C" cudaError_t spade_fast_segments(const int32_t* segment_ids, int64_t count, int64_t num, int32_t* order,
                                           int32_t* offsets, void* workspace, cudaStream_t stream) {
  constexpr int64_t kLimit = int64_t(1) << 31;
  if (count < 0 || count >= kLimit || num < 0 || num >= kLimit - 2) return cudaErrorInvalidValue;
  if (count == 0) return cudaMemsetAsync(offsets, 0, (num + 1) * sizeof(*offsets), stream);
  uint32_t* const keys = static_cast<uint32_t*>(workspace);
  uint32_t* const sorted = keys + padded(count);
  int32_t* const positions = reinterpret_cast<int32_t*>(sorted + padded(count));
  void* const temporary = positions + padded(count);
  size_t bytes = 0;
  SPADE_FAST_CHECK(sort_pairs(nullptr, bytes, keys, sorted, positions, order, int(count), bits_for(num), stream));
  SPADE_FAST_RUN(segments_keys_kernel, ceil_div<uint32_t>(uint32_t(count), kThreads), stream, segment_ids,
                 uint32_t(count), uint32_t(num), keys, positions);
  SPADE_FAST_CHECK(sort_pairs(temporary, bytes, keys, sorted, positions, order, int(count), bits_for(num), stream));
  SPADE_FAST_RUN(segments_offsets_kernel, ceil_div<uint32_t>(uint32_t(num) + 1, kThreads), stream, sorted,
                 uint32_t(count), uint32_t(num), offsets);
  return cudaSuccess;
}
