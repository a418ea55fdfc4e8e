// SPDX-License-Identifier: Apache-2.0
// Mean and sum of squared deviations (M2), per channel or per sample and channel, in fp32.
//
// Every thread keeps Welford's running mean and M2 of the elements it meets. Threads, then blocks, are merged by
// M2 = Σ m2_i + Σ n_i (mean_i - mean)² (Chan et al. 1979). The mean is summed as offsets from the first part's mean.
// The order is fixed, so the result is deterministic. It is accurate whatever the ratio of mean to deviation.
#include "common.cuh"

namespace spade_fast {
namespace {

constexpr int kAhead = 4;      // loads of a thread before the first is used
constexpr int kTarget = 1024;  // blocks of a kernel: about what a large GPU holds at once
constexpr int kMergeChannels = 4;
constexpr int kMergeLanes = kThreads / kMergeChannels;

// Each image's pixels in `splits` ranges of `span` pixels.
struct Split {
  uint32_t pixels, splits, span;
};

// Running mean and M2 of VEC separate streams. Each has had `seen` elements.
template <int VEC>
struct Welford {
  float mean[VEC], m2[VEC], seen = 0.0f;

  __device__ __forceinline__ Welford() {
    fill(mean, 0.0f);
    fill(m2, 0.0f);
  }
  template <typename T>
  __device__ __forceinline__ void add(const Vector<T, VEC>& values) {
    seen += 1.0f;
    const float weight = __fdividef(1.0f, seen);  // the operator / is a call, which would keep registers on a stack
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      const float value = values.get(i), delta = value - mean[i];
      mean[i] += delta * weight;
      m2[i] += delta * (value - mean[i]);
    }
  }
};

// Adds the vectors at from + i·stride, i < count.
template <typename T, int VEC>
__device__ __forceinline__ void add_all(Welford<VEC>& sums, const T* from, int64_t stride, uint32_t count) {
  uint32_t i = 0;
  for (; i + kAhead <= count; i += kAhead) {
    Vector<T, VEC> v[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) v[j].load(from + (i + j) * stride);
#pragma unroll
    for (int j = 0; j < kAhead; ++j) sums.add(v[j]);
  }
  for (; i < count; ++i) {
    Vector<T, VEC> v;
    v.load(from + i * stride);
    sums.add(v);
  }
}

// Merges `count` parts. part(i, &n, &mean, &m2) reads one. Part 0 is not empty.
template <typename F>
__device__ __forceinline__ void merge(uint32_t count, F&& part, float* mean, float* m2) {
  float n, m, q, total = 0.0f, shift = 0.0f, origin;
  part(0, &n, &origin, &q);
  for (uint32_t i = 0; i < count; ++i) {
    part(i, &n, &m, &q);
    total += n;
    if (n > 0.0f) shift += n * (m - origin);
  }
  const float center = origin + __fdividef(shift, total);
  float sum = 0.0f;
  for (uint32_t i = 0; i < count; ++i) {
    part(i, &n, &m, &q);
    if (n > 0.0f) sum += q + n * (m - center) * (m - center);
  }
  *mean = center;
  *m2 = sum;
}

// Channels-last. A block (x: part, y: columns) reads a range of one image's pixels and writes row `part` of means and
// m2s [parts, c].
template <typename T, int VEC>
__global__ void __launch_bounds__(kThreads)
    statistics_rows_kernel(const T* x, uint32_t c, Split split, FastDiv by_splits, RowTiling tiling, float* means,
                           float* m2s) {
  __shared__ float shared_mean[VEC * kThreads], shared_m2[VEC * kThreads];
  const uint32_t n = by_splits.div(blockIdx.x), lo = (blockIdx.x - n * split.splits) * split.span;
  const uint32_t hi = min(lo + split.span, split.pixels);
  const uint32_t row = tiling.row(), column = tiling.vector(row) * VEC;
  const bool active = row < tiling.rows && column < c;
  if (active) {
    Welford<VEC> sums;
    if (lo + row < hi) {
      const T* const from = x + (int64_t(n) * split.pixels + lo + row) * c + column;
      add_all<T, VEC>(sums, from, int64_t(tiling.rows) * c, (hi - lo - row + tiling.rows - 1) / tiling.rows);
    }
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      shared_mean[i * kThreads + threadIdx.x] = sums.mean[i];
      shared_m2[i * kThreads + threadIdx.x] = sums.m2[i];
    }
  }
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < tiling.columns * VEC; i += kThreads) {
    const uint32_t channel = blockIdx.y * tiling.columns * VEC + i, at = i % VEC * kThreads + i / VEC;
    if (channel >= c) break;
    const auto part = [&](uint32_t r, float* count, float* mean, float* m2) {
      *count = lo + r < hi ? float((hi - lo - r + tiling.rows - 1) / tiling.rows) : 0.0f;
      *mean = shared_mean[at + r * tiling.columns];
      *m2 = shared_m2[at + r * tiling.columns];
    };
    const int64_t to = int64_t(blockIdx.x) * c + channel;
    merge(tiling.rows, part, means + to, m2s + to);
  }
}

// NCHW. A block reads a range of one plane's pixels and writes one element of means and m2s [n·splits, c]. VEC divides
// h·w.
template <typename T, int VEC>
__global__ void __launch_bounds__(kThreads)
    statistics_planes_kernel(const T* x, uint32_t c, Split split, FastDiv by_splits, FastDiv by_channels, float* means,
                             float* m2s) {
  __shared__ float shared_mean[VEC * kThreads], shared_m2[VEC * kThreads];
  __shared__ float row_mean[kThreads], row_m2[kThreads];
  const uint32_t plane = by_splits.div(blockIdx.x), part_of_plane = blockIdx.x - plane * split.splits;
  const uint32_t n = by_channels.div(plane), channel = plane - n * c;
  const uint32_t lo = part_of_plane * split.span, hi = min(lo + split.span, split.pixels), vectors = (hi - lo) / VEC;
  const auto steps = [&](uint32_t t) { return t < vectors ? (vectors - t + kThreads - 1) / kThreads : 0; };
  Welford<VEC> sums;
  add_all<T, VEC>(sums, x + int64_t(plane) * split.pixels + lo + threadIdx.x * VEC, int64_t(kThreads) * VEC,
                  steps(threadIdx.x));
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    shared_mean[i * kThreads + threadIdx.x] = sums.mean[i];
    shared_m2[i * kThreads + threadIdx.x] = sums.m2[i];
  }
  __syncthreads();
  // 16 threads merge a sixteenth each, then one thread merges the sixteen results.
  constexpr uint32_t kGroups = 16, kEach = VEC * kThreads / kGroups;
  const auto count_of = [&](uint32_t i) { return float(steps(i % kThreads)); };
  const auto group_count = [&](uint32_t group) {
    float count = 0.0f;
    for (uint32_t i = group; i < VEC * kThreads; i += kGroups) count += count_of(i);
    return count;
  };
  if (threadIdx.x < kGroups && threadIdx.x < vectors) {
    const auto part = [&](uint32_t i, float* count, float* mean, float* m2) {
      const uint32_t at = i * kGroups + threadIdx.x;
      *count = count_of(at);
      *mean = shared_mean[at];
      *m2 = shared_m2[at];
    };
    merge(kEach, part, row_mean + threadIdx.x, row_m2 + threadIdx.x);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const auto part = [&](uint32_t group, float* count, float* mean, float* m2) {
      *count = group < vectors ? group_count(group) : 0.0f;
      *mean = row_mean[group];
      *m2 = row_m2[group];
    };
    const int64_t to = (int64_t(n) * split.splits + part_of_plane) * c + channel;
    merge(kGroups, part, means + to, m2s + to);
  }
}

// A block (x: group, y: channels) merges the group's `parts` rows of means and m2s [groups·parts, c].
__global__ void __launch_bounds__(kThreads)
    statistics_merge_kernel(const float* means, const float* m2s, uint32_t c, uint32_t parts, Split split,
                            FastDiv by_splits, float* mean, float* m2) {
  __shared__ float sums[kThreads], counts[kThreads];
  const uint32_t lane = threadIdx.x / kMergeChannels,
                 channel = blockIdx.y * kMergeChannels + threadIdx.x % kMergeChannels;
  const bool active = channel < c;
  const int64_t from = int64_t(blockIdx.x) * parts * c + channel;
  const auto count_of = [&](uint32_t k) {
    return float(min(split.span, split.pixels - (k - by_splits.div(k) * split.splits) * split.span));
  };
  const auto add_lanes = [&](float* of) {  // in order of the lanes
    __syncthreads();
    float sum = 0.0f;
    for (uint32_t i = 0; i < kMergeLanes; ++i) sum += of[i * kMergeChannels + threadIdx.x % kMergeChannels];
    __syncthreads();
    return sum;
  };
  const float origin = active ? means[from] : 0.0f;
  float shift = 0.0f, count = 0.0f;
#pragma unroll 4
  for (uint32_t k = lane; active && k < parts; k += kMergeLanes) {
    count += count_of(k);
    shift += count_of(k) * (means[from + int64_t(k) * c] - origin);
  }
  sums[threadIdx.x] = shift;
  counts[threadIdx.x] = count;
  const float all = add_lanes(sums), total = add_lanes(counts), center = origin + __fdividef(all, total);
  float sum = 0.0f;
#pragma unroll 4
  for (uint32_t k = lane; active && k < parts; k += kMergeLanes) {
    const float delta = means[from + int64_t(k) * c] - center;
    sum += m2s[from + int64_t(k) * c] + count_of(k) * delta * delta;
  }
  sums[threadIdx.x] = sum;
  const float squares = add_lanes(sums);
  if (active && lane == 0) {
    mean[int64_t(blockIdx.x) * c + channel] = center;
    m2[int64_t(blockIdx.x) * c + channel] = squares;
  }
}

// `blocks_per_range` blocks read each range of an image's pixels. `step` pixels are read at a time.
Split split_of(int64_t n, int64_t pixels, int64_t blocks_per_range, int64_t step) {
  const int64_t wanted = ceil_div<int64_t>(kTarget, n * blocks_per_range);
  const int64_t most = ceil_div<int64_t>(pixels, kAhead * step);
  int64_t span = ceil_div(pixels, std::max<int64_t>(1, std::min(wanted, most)));
  span = ceil_div(span, step) * step;
  return {uint32_t(pixels), uint32_t(ceil_div(pixels, span)), uint32_t(span)};
}

template <typename T>
constexpr int wide() {
  return 16 / int(sizeof(T));
}

template <typename T, int VEC>
cudaError_t partial_rows(const T* x, int64_t n, int64_t c, int64_t pixels, Split* split, float* means, int64_t rows,
                         cudaStream_t stream) {
  const RowTiling tiling(c / VEC);
  *split = split_of(n, pixels, tiling.blocks, tiling.rows);
  if (n * split->splits > kMaxBlocks || tiling.blocks > 65535) return cudaErrorInvalidValue;
  SPADE_FAST_RUN((statistics_rows_kernel<T, VEC>), dim3(uint32_t(n * split->splits), tiling.blocks), stream, x,
                 uint32_t(c), *split, FastDiv(split->splits), tiling, means, means + rows * c);
  return cudaSuccess;
}

template <typename T, int VEC>
cudaError_t partial_planes(const T* x, int64_t n, int64_t c, int64_t pixels, Split* split, float* means, int64_t rows,
                           cudaStream_t stream) {
  *split = split_of(n, pixels, c, int64_t(kThreads) * VEC);
  if (n * c * split->splits > kMaxBlocks) return cudaErrorInvalidValue;
  SPADE_FAST_RUN((statistics_planes_kernel<T, VEC>), uint32_t(n * c * split->splits), stream, x, uint32_t(c), *split,
                 FastDiv(split->splits), FastDiv(uint32_t(c)), means, means + rows * c);
  return cudaSuccess;
}

// The most rows of partial results.
int64_t most_parts(int64_t n) { return n * ceil_div<int64_t>(kTarget, std::max<int64_t>(n, 1)); }

}  // namespace
}  // namespace spade_fast

using namespace spade_fast;

extern "C" size_t spade_fast_statistics_workspace(int64_t n, int64_t c, int64_t, int64_t) {
  return size_t(2 * most_parts(n) * c) * sizeof(float);
}

extern "C" cudaError_t spade_fast_statistics(const void* x, int dtype, int channels_last, int64_t n, int64_t c,
                                             int64_t h, int64_t w, int per_sample, float* mean, float* m2,
                                             void* workspace, cudaStream_t stream) {
  const int64_t groups = per_sample ? n : 1, pixels = h * w;
  if (groups * c == 0) return cudaSuccess;
  if (n * pixels == 0) {
    SPADE_FAST_CHECK(cudaMemsetAsync(mean, 0, groups * c * sizeof(float), stream));
    return cudaMemsetAsync(m2, 0, groups * c * sizeof(float), stream);
  }
  if (n < 0 || c < 0 || pixels >= kMaxBlocks || c > kMaxBlocks || groups > kMaxBlocks) return cudaErrorInvalidValue;
  float* const means = static_cast<float*>(workspace);
  const int64_t rows = most_parts(n);
  Split split{};
  SPADE_FAST_CHECK(with_type(dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int kWide = wide<T>();
    const T* const from = static_cast<const T*>(x);
    if (channels_last) {
      return c % kWide == 0 && aligned(x, 16) ? partial_rows<T, kWide>(from, n, c, pixels, &split, means, rows, stream)
                                              : partial_rows<T, 1>(from, n, c, pixels, &split, means, rows, stream);
    }
    return pixels % kWide == 0 && aligned(x, 16)
               ? partial_planes<T, kWide>(from, n, c, pixels, &split, means, rows, stream)
               : partial_planes<T, 1>(from, n, c, pixels, &split, means, rows, stream);
  }));
  const uint32_t parts = uint32_t(n * split.splits / groups);
  if (ceil_div<int64_t>(c, kMergeChannels) > 65535) return cudaErrorInvalidValue;
  SPADE_FAST_RUN(statistics_merge_kernel, dim3(uint32_t(groups), uint32_t(ceil_div<int64_t>(c, kMergeChannels))),
                 stream, means, means + rows * c, uint32_t(c), parts, split, FastDiv(split.splits), mean, m2);
  return cudaSuccess;
}
