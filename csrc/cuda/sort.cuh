// SPDX-License-Identifier: Apache-2.0
// Stable sort of (uint32 key, int32 value) pairs: CUB's radix sort, or std::stable_sort when tests run it on a CPU.
#pragma once

#include "common.cuh"

#ifndef SPADE_FAST_ON_CPU
#include <cub/device/device_radix_sort.cuh>
#else
#include <algorithm>
#include <numeric>
#include <vector>
#endif

namespace spade_fast {

// Sorts by the low `bits` bits. If `temporary` is null, it only sets `bytes` to the size that temporary needs.
inline cudaError_t sort_pairs(void* temporary, size_t& bytes, const uint32_t* keys, uint32_t* sorted_keys,
                              const int32_t* values, int32_t* sorted_values, int count, int bits, cudaStream_t stream) {
#ifndef SPADE_FAST_ON_CPU
  return cub::DeviceRadixSort::SortPairs(temporary, bytes, keys, sorted_keys, values, sorted_values, count, 0, bits,
                                         stream);
#else
  if (temporary == nullptr) {
    bytes = 1;
    return cudaSuccess;
  }
  const uint32_t mask = bits == 32 ? ~0u : (1u << bits) - 1;
  std::vector<int> at(count);
  std::iota(at.begin(), at.end(), 0);
  std::stable_sort(at.begin(), at.end(), [&](int a, int b) { return (keys[a] & mask) < (keys[b] & mask); });
  for (int i = 0; i < count; ++i) {
    sorted_keys[i] = keys[at[i]];
    sorted_values[i] = values[at[i]];
  }
  return cudaSuccess;
#endif
}

}  // namespace spade_fast
