// SPDX-License-Identifier: Apache-2.0
// patterns: the distinct k×k patches of label maps, by a hash table on the device.
//
// A slot of the table holds a pixel and stands for that pixel's patch. Every patch whose hash leads to the slot is
// compared with the slot's patch, so a collision only costs another probe. Equal patches lower the slot's pixel to the
// least of their pixels. In the end that is where the patch first appears, in whatever order threads ran. A patch's
// number is the count of first pixels before its own. One memset and three kernels find the numbers, and one kernel
// writes the results.
#include "common.cuh"

namespace spade_fast {
namespace {

constexpr uint32_t kEmpty = 0xffffffffu;     // a slot without a pixel; the memset writes it
constexpr uint32_t kNumbered = 0x80000000u;  // set in a slot that holds a pattern's number instead of a pixel
constexpr int kMaxParts = 1024;              // the most parts in which pixels are counted
constexpr int64_t kLeastPart = 1024;

struct Maps {
  const int32_t* codes;          // [n, h, w]
  uint32_t count, pixels, h, w;  // of all maps, of one
  int k;
  FastDiv by_pixels, by_width;
};

struct Place {
  int64_t map;  // first pixel of the map
  int y, x;
};

__device__ __forceinline__ Place place_of(const Maps& maps, uint32_t pixel) {
  const uint32_t n = maps.by_pixels.div(pixel), rest = pixel - n * maps.pixels, y = maps.by_width.div(rest);
  return {int64_t(n) * maps.pixels, int(y), int(rest - y * maps.w)};
}

__device__ __forceinline__ int32_t code_at(const Maps& maps, const Place& p, int dy, int dx) {
  const int y = p.y + dy, x = p.x + dx;
  if (uint32_t(y) >= maps.h || uint32_t(x) >= maps.w) return -1;
  return __ldg(maps.codes + p.map + int64_t(y) * maps.w + x);
}

// K > 0: the patch is in registers. K = 0: the patch has any size, and is read again where it is needed.
template <int K>
struct Patch {
  int32_t code[K * K];

  __device__ __forceinline__ Patch(const Maps& maps, const Place& p) {
#pragma unroll
    for (int t = 0; t < K * K; ++t) code[t] = code_at(maps, p, t / K - K / 2, t % K - K / 2);
  }
  __device__ __forceinline__ int32_t at(const Maps&, const Place&, int t) const { return code[t]; }
};
template <>
struct Patch<0> {
  __device__ __forceinline__ Patch(const Maps&, const Place&) {}
  __device__ __forceinline__ int32_t at(const Maps& maps, const Place& p, int t) const {
    return code_at(maps, p, t / maps.k - maps.k / 2, t % maps.k - maps.k / 2);
  }
};

template <int K>
__device__ __forceinline__ uint32_t hash_of(const Maps& maps, const Place& p, const Patch<K>& patch) {
#ifdef SPADE_FAST_WEAK_HASH  // for tests: nearly all patches collide
  return uint32_t(patch.at(maps, p, 0)) & 1;
#else
  const int taps = K ? K * K : maps.k * maps.k;
  uint64_t value = uint64_t(p.map) * 0xD6E8FEB86659FD93u + 0x2545F4914F6CDD1Du;
#pragma unroll
  for (int t = 0; t < taps; ++t) {
    value = (value ^ uint32_t(patch.at(maps, p, t))) * 0x9FB21C651E98DF25u;
    value ^= value >> 32;
  }
  return uint32_t(value ^ (value >> 16));
#endif
}

template <int K>
__device__ bool equal(const Maps& maps, const Place& p, const Patch<K>& patch, uint32_t other) {
  const Place q = place_of(maps, other);
  if (p.map != q.map) return false;
  const int taps = K ? K * K : maps.k * maps.k;
  bool same = true;
#pragma unroll
  for (int t = 0; t < taps; ++t) {
    const int k = K ? K : maps.k;
    same = same && patch.at(maps, p, t) == code_at(maps, q, t / k - k / 2, t % k - k / 2);
  }
  return same;
}

// slots[pixel] = where its patch is in the table; table[slot] = the least pixel with that patch.
template <int K>
__global__ void __launch_bounds__(kThreads)
    patterns_insert_kernel(Maps maps, uint32_t mask, uint32_t* table, uint32_t* slots) {
  const uint32_t pixel = blockIdx.x * kThreads + threadIdx.x;
  if (pixel >= maps.count) return;
  const Place p = place_of(maps, pixel);
  const Patch<K> patch(maps, p);
  uint32_t slot = hash_of<K>(maps, p, patch) & mask;
  for (;; slot = (slot + 1) & mask) {  // the table is never full
    uint32_t* const at = table + slot;
    // The value may be old. It is a pixel with the slot's patch all the same, and no less than the newest value.
    uint32_t seen = *const_cast<volatile uint32_t*>(at);
    if (seen == kEmpty) {
      seen = atomicCAS(at, kEmpty, pixel);
      if (seen == kEmpty) break;
    }
    if (equal<K>(maps, p, patch, seen)) {
      if (pixel < seen) atomicMin(at, pixel);
      break;
    }
  }
  slots[pixel] = slot;
}

// Returns the sum of `value` over the block to every thread.
__device__ uint32_t block_sum(uint32_t value) {
  __shared__ uint32_t sums[kThreads];
  sums[threadIdx.x] = value;
  __syncthreads();
  for (int step = kThreads / 2; step > 0; step /= 2) {
    if (threadIdx.x < step) sums[threadIdx.x] += sums[threadIdx.x + step];
    __syncthreads();
  }
  const uint32_t total = sums[0];
  __syncthreads();
  return total;
}

// Returns the sum of `value` over the threads before this one. *total: the sum over all threads.
__device__ uint32_t block_scan(uint32_t value, uint32_t* total) {
  __shared__ uint32_t sums[2][kThreads];
  int from = 0;
  sums[0][threadIdx.x] = value;
  __syncthreads();
  for (int step = 1; step < kThreads; step *= 2, from ^= 1) {
    const uint32_t before = threadIdx.x >= step ? sums[from][threadIdx.x - step] : 0;
    sums[from ^ 1][threadIdx.x] = sums[from][threadIdx.x] + before;
    __syncthreads();
  }
  const uint32_t upto = sums[from][threadIdx.x];
  *total = sums[from][kThreads - 1];
  __syncthreads();
  return upto - value;
}

// firsts[part]: the number of patches that appear first in pixels part·span .. (part + 1)·span - 1.
__global__ void __launch_bounds__(kThreads) patterns_count_kernel(uint32_t count, uint32_t span, const uint32_t* table,
                                                                  const uint32_t* slots, uint32_t* firsts) {
  const uint32_t lo = blockIdx.x * span, hi = min(lo + span, count);
  uint32_t mine = 0;
  for (uint32_t pixel = lo + threadIdx.x; pixel < hi; pixel += kThreads) mine += table[slots[pixel]] == pixel;
  const uint32_t total = block_sum(mine);
  if (threadIdx.x == 0) firsts[blockIdx.x] = total;
}

// Numbers the patches: table[slot] = kNumbered | number, first_pixels[number], starts[n] = patterns before map n.
__global__ void __launch_bounds__(kThreads)
    patterns_number_kernel(uint32_t count, uint32_t pixels, uint32_t num_maps, FastDiv by_pixels, uint32_t span,
                           const uint32_t* firsts, uint32_t* table, const uint32_t* slots, uint32_t* first_pixels,
                           uint32_t* starts, int32_t* total) {
  uint32_t before = 0;
  for (uint32_t part = threadIdx.x; part < blockIdx.x; part += kThreads) before += firsts[part];
  uint32_t number = block_sum(before);
  const uint32_t lo = blockIdx.x * span, hi = min(lo + span, count);
  for (uint32_t start = lo; start < hi; start += kThreads) {
    const uint32_t pixel = start + threadIdx.x;
    const uint32_t slot = pixel < hi ? slots[pixel] : 0;
    // Meanwhile other blocks replace pixels of this table by numbers, but never the first pixels of this block.
    const bool first = pixel < hi && table[slot] == pixel;
    uint32_t found;
    const uint32_t mine = number + block_scan(first, &found);
    if (first) {
      table[slot] = kNumbered | mine;
      first_pixels[mine] = pixel;
    }
    if (pixel < hi) {
      const uint32_t n = by_pixels.div(pixel);
      if (pixel == n * pixels) starts[n] = mine;
    }
    number += found;
  }
  if (blockIdx.x == gridDim.x - 1 && threadIdx.x == 0) {
    starts[num_maps] = number;
    *total = int32_t(number);
  }
}

// Writes the results. Thread i writes pixel i, tap i and map i where they exist.
__global__ void __launch_bounds__(kThreads)
    patterns_write_kernel(Maps maps, uint32_t num_maps, int64_t capacity, int taps, const uint32_t* table,
                          const uint32_t* slots, const uint32_t* first_pixels, const uint32_t* starts,
                          const int32_t* total, int32_t* pattern_ids, int32_t* tap_codes, int64_t* counts,
                          int32_t* overflow) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < maps.count) {
    const int32_t id = int32_t(table[slots[i]] & ~kNumbered);
    pattern_ids[i] = id < capacity ? id : -1;
  }
  if (i < capacity * taps) {
    const int64_t row = i / taps;
    const int t = int(i - row * taps);
    const int32_t found = *total;
    tap_codes[i] =
        row < found ? code_at(maps, place_of(maps, first_pixels[row]), t / maps.k - maps.k / 2, t % maps.k - maps.k / 2)
                    : -1;
  }
  if (i < num_maps) counts[i] = int64_t(starts[i + 1]) - starts[i];
  if (i == 0 && overflow != nullptr) *overflow = *total > capacity;
}

// The parts of the workspace.
struct Table {
  uint32_t size, parts, span;
  uint32_t *table, *slots, *first_pixels, *firsts, *starts;
  size_t bytes;

  Table(void* workspace, int64_t count, int64_t maps) {
    size = 64;
    while (size < 2 * count) size *= 2;
    span = uint32_t(ceil_div(std::max(ceil_div<int64_t>(count, kMaxParts), kLeastPart), int64_t(kThreads)) * kThreads);
    parts = uint32_t(ceil_div<int64_t>(count, span));
    table = static_cast<uint32_t*>(workspace);
    slots = table + size;
    first_pixels = slots + count;
    firsts = first_pixels + count;
    starts = firsts + kMaxParts;
    bytes = sizeof(uint32_t) * (size_t(size) + 2 * count + kMaxParts + maps + 1);
  }
};

constexpr int64_t kMaxPixels = int64_t(1) << 30;

bool valid(int64_t n, int64_t h, int64_t w, int k) {
  return n >= 0 && h >= 0 && w >= 0 && k > 0 && k % 2 == 1 && (n == 0 || h == 0 || w == 0 || n * h < kMaxPixels / w);
}

Maps maps_of(const int32_t* codes, int64_t n, int64_t h, int64_t w, int k) {
  return {codes, uint32_t(n * h * w),      uint32_t(h * w),     uint32_t(h), uint32_t(w),
          k,     FastDiv(uint32_t(h * w)), FastDiv(uint32_t(w))};
}

template <int K>
cudaError_t insert(const Maps& maps, const Table& t, cudaStream_t stream) {
  SPADE_FAST_RUN(patterns_insert_kernel<K>, ceil_div<uint32_t>(maps.count, kThreads), stream, maps, t.size - 1, t.table,
                 t.slots);
  return cudaSuccess;
}

}  // namespace
}  // namespace spade_fast

using namespace spade_fast;

extern "C" size_t spade_fast_patterns_workspace(int64_t n, int64_t h, int64_t w) {
  return Table(nullptr, n * h * w, n).bytes;
}

extern "C" cudaError_t spade_fast_patterns_find(const int32_t* codes, int64_t n, int64_t h, int64_t w, int kernel_size,
                                                int32_t* total, void* workspace, cudaStream_t stream) {
  if (!valid(n, h, w, kernel_size)) return cudaErrorInvalidValue;
  if (n * h * w == 0) return cudaMemsetAsync(total, 0, sizeof(*total), stream);
  const Maps maps = maps_of(codes, n, h, w, kernel_size);
  const Table t(workspace, maps.count, n);
  SPADE_FAST_CHECK(cudaMemsetAsync(t.table, 0xff, t.size * sizeof(uint32_t), stream));
  switch (kernel_size) {
    case 1: SPADE_FAST_CHECK(insert<1>(maps, t, stream)); break;
    case 3: SPADE_FAST_CHECK(insert<3>(maps, t, stream)); break;
    case 5: SPADE_FAST_CHECK(insert<5>(maps, t, stream)); break;
    default: SPADE_FAST_CHECK(insert<0>(maps, t, stream));
  }
  SPADE_FAST_RUN(patterns_count_kernel, t.parts, stream, maps.count, t.span, t.table, t.slots, t.firsts);
  SPADE_FAST_RUN(patterns_number_kernel, t.parts, stream, maps.count, maps.pixels, uint32_t(n), maps.by_pixels, t.span,
                 t.firsts, t.table, t.slots, t.first_pixels, t.starts, total);
  return cudaSuccess;
}

extern "C" cudaError_t spade_fast_patterns_write(const int32_t* codes, int64_t n, int64_t h, int64_t w, int kernel_size,
                                                 int64_t capacity, const int32_t* total, int32_t* pattern_ids,
                                                 int32_t* taps, int64_t* counts, int32_t* overflow, void* workspace,
                                                 cudaStream_t stream) {
  if (!valid(n, h, w, kernel_size) || capacity < 0) return cudaErrorInvalidValue;
  const int per_row = kernel_size * kernel_size;
  if (n * h * w == 0) {
    if (n > 0) SPADE_FAST_CHECK(cudaMemsetAsync(counts, 0, n * sizeof(*counts), stream));
    if (overflow != nullptr) SPADE_FAST_CHECK(cudaMemsetAsync(overflow, 0, sizeof(*overflow), stream));
    if (capacity == 0) return cudaSuccess;
    return cudaMemsetAsync(taps, 0xff, capacity * per_row * sizeof(*taps), stream);
  }
  const Maps maps = maps_of(codes, n, h, w, kernel_size);
  const Table t(workspace, maps.count, n);
  const int64_t threads = std::max<int64_t>(maps.count, capacity * per_row);
  if (ceil_div<int64_t>(threads, kThreads) > kMaxBlocks) return cudaErrorInvalidValue;
  SPADE_FAST_RUN(patterns_write_kernel, uint32_t(ceil_div<int64_t>(threads, kThreads)), stream, maps, uint32_t(n),
                 capacity, per_row, t.table, t.slots, t.first_pixels, t.starts, total, pattern_ids, taps, counts,
                 overflow);
  return cudaSuccess;
}
