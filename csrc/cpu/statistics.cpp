// SPDX-License-Identifier: Apache-2.0
// statistics: mean and summed squared deviation of each channel. Blocks of a fixed size are summed once, as deviations
// from the mean of a few of their elements, so a large mean costs no digits. The blocks are combined in order (Chan et
// al. 1979), so the result has the same bits for any number of threads.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <numeric>

#include "common.h"

namespace spade_fast::cpu {
namespace {

// sum[c] += Σ rows[i][c] - shift[c], squares[c] += Σ (rows[i][c] - shift[c])²
template <typename A>
SPADE_FAST_CLONES void add_deviations(Tile<const A> rows, int64_t count, int64_t channels, const A* shift,
                                      A* __restrict sum, A* __restrict squares) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const A *a = rows.data + i * rows.stride, *b = a + rows.stride, *c = b + rows.stride, *d = c + rows.stride;
    SPADE_FAST_INDEPENDENT
    for (int64_t j = 0; j < channels; ++j) {
      const A s = shift[j], p = a[j] - s, q = b[j] - s, u = c[j] - s, v = d[j] - s;
      sum[j] += (p + q) + (u + v);
      squares[j] += (p * p + q * q) + (u * u + v * v);
    }
  }
  for (; i < count; ++i) {
    const A* a = rows.data + i * rows.stride;
    for (int64_t j = 0; j < channels; ++j) {
      const A p = a[j] - shift[j];
      sum[j] += p;
      squares[j] += p * p;
    }
  }
}

constexpr int64_t kLanes = 64;    // independent sums over the elements of a plane
constexpr int64_t kSamples = 16;  // elements of a block whose mean the deviations are taken from

template <typename T, typename A>
SPADE_FAST_CLONES void add_element_deviations(const T* values, int64_t count, A shift, A* __restrict lanes,
                                              A* __restrict squares) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) {
      const A d = static_cast<A>(values[i + j]) - shift;
      lanes[j] += d;
      squares[j] += d * d;
    }
  for (int64_t j = 0; i + j < count; ++j) {
    const A d = static_cast<A>(values[i + j]) - shift;
    lanes[j] += d;
    squares[j] += d * d;
  }
}

// Count, mean and M2 of every channel in every block of the images: count [blocks], mean and m2 [N, blocks, C].
struct Moments {
  int64_t channels, blocks;
  std::vector<int64_t> count;
  std::unique_ptr<double[]> mean, m2;

  Moments(int64_t n, int64_t c, int64_t blocks)
      : channels(c),
        blocks(blocks),
        count(blocks),
        mean(buffer<double>(n * blocks * c)),
        m2(buffer<double>(n * blocks * c)) {}

  // Sets one element from the sums of `size` deviations from shift, and of their squares.
  void set(int64_t index, int64_t size, double shift, double sum, double squares) {
    const double inverse = 1.0 / static_cast<double>(size);
    mean[index] = shift + sum * inverse;
    m2[index] = std::max(0.0, squares - sum * sum * inverse);
  }
};

// Joins mean and m2 [C] of `count` elements with those of `more` other elements.
SPADE_FAST_CLONES void join(double* __restrict mean, double* __restrict m2, double count, const double* other_mean,
                            const double* other_m2, double more, int64_t channels) {
  const double share = more / (count + more), cross = count * share;
  for (int64_t j = 0; j < channels; ++j) {
    const double delta = other_mean[j] - mean[j];
    mean[j] += delta * share;
    m2[j] += other_m2[j] + delta * delta * cross;
  }
}

// Blocks of pixels. Right for any layout, fast where the channels of a pixel are adjacent.
template <typename A>
Moments by_pixels(const View& x, int64_t n, int64_t c, int64_t h, int64_t w) {
  // About 128 KiB a block, in units of tiles of a row.
  const int64_t tile = std::min<int64_t>(tile_pixels(c), 32);
  const int64_t tiles_per_row = (w + tile - 1) / tile, tiles = h * tiles_per_row;
  const int64_t pixels = std::clamp<int64_t>(32768 / c, 8, 512);
  const int64_t block = std::max<int64_t>(1, pixels / std::min(tile, w));
  const int64_t blocks = (tiles + block - 1) / block;
  Moments moments(n, c, blocks);
  at::parallel_for(0, n * blocks, std::max<int64_t>(1, 32768 / (pixels * c)), [&](int64_t first, int64_t last) {
    const auto scratch = buffer<A>(tile * c), sums = buffer<A>(3 * c);
    A *shift = sums.get(), *sum = shift + c, *squares = sum + c;
    for (int64_t b = first; b < last; ++b) {
      const int64_t image = b / blocks, begin = b % blocks * block, end = std::min(begin + block, tiles);
      std::fill_n(sums.get(), 3 * c, A(0));
      const auto tiles_of = [&](int64_t t) {
        const int64_t from = t % tiles_per_row * tile;
        return std::tuple(t / tiles_per_row, from, std::min(tile, w - from));
      };
      const int64_t samples = std::min(kSamples, end - begin);
      for (int64_t i = 0; i < samples; ++i) {  // the middle pixels of tiles all over the block
        const auto [y, from, size] = tiles_of(begin + i * (end - begin) / samples);
        const A* pixel = load_tile(x, image, y, from + size / 2, 1, scratch.get()).data;
        for (int64_t j = 0; j < c; ++j) shift[j] += pixel[j] / static_cast<A>(samples);
      }
      int64_t count = 0;
      for (int64_t t = begin; t < end; ++t) {
        const auto [y, from, size] = tiles_of(t);
        add_deviations(load_tile(x, image, y, from, size, scratch.get()), size, c, shift, sum, squares);
        count += size;
      }
      if (image == 0) moments.count[b] = count;
      for (int64_t j = 0; j < c; ++j) moments.set(b * c + j, count, shift[j], sum[j], squares[j]);
    }
  });
  return moments;
}

// Blocks of a plane's elements, where the pixels of a channel are adjacent: parts of a row, or whole rows.
template <typename T, typename A>
Moments by_planes(const View& x, int64_t n, int64_t c, int64_t h, int64_t w) {
  constexpr int64_t kBlock = 16384;
  if (x.row == w) {  // rows follow each other: one long row
    w *= h;
    h = 1;
  }
  const int64_t cuts = (w + kBlock - 1) / kBlock;         // blocks along a row
  const int64_t rows = std::max<int64_t>(1, kBlock / w);  // rows of a block
  const int64_t chunks = (h + rows - 1) / rows;
  const int64_t blocks = cuts * chunks;
  Moments moments(n, c, blocks);
  at::parallel_for(0, n * c * blocks, std::max<int64_t>(1, 32768 / (h * w)), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t image = i / (c * blocks), channel = i / blocks % c, b = i % blocks;
      const int64_t begin = b % cuts * kBlock, size = std::min(kBlock, w - begin);
      const int64_t top = b / cuts * rows, bottom = std::min(top + rows, h);
      const T* plane = reinterpret_cast<const T*>(x.data) + x.offset(image, 0, begin) + channel * x.channel;
      A lanes[kLanes] = {}, squares[kLanes] = {};
      const int64_t count = size * (bottom - top), samples = std::min(4 * kSamples, count);
      A shift = 0;
      for (int64_t k = 0; k < samples; ++k) {
        const int64_t at = k * count / samples;
        shift += static_cast<A>(plane[(top + at / size) * x.row + at % size]) / static_cast<A>(samples);
      }
      for (int64_t y = top; y < bottom; ++y) add_element_deviations(plane + y * x.row, size, shift, lanes, squares);
      const auto total = [](const A* values) { return std::accumulate(values, values + kLanes, 0.0); };
      if (image == 0 && channel == 0) moments.count[b] = count;
      moments.set((image * blocks + b) * c + channel, count, shift, total(lanes), total(squares));
    }
  });
  return moments;
}

template <typename A>
Moments moments(const at::Tensor& x) {
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  const View view(x);
  const bool planes = (view.pixel == 1 || w == 1) && (view.channel != 1 || c == 1);
  if (!planes) return by_pixels<A>(view, n, c, h, w);
  switch (view.type) {
    case at::kHalf: return by_planes<c10::Half, A>(view, n, c, h, w);
    case at::kBFloat16: return by_planes<c10::BFloat16, A>(view, n, c, h, w);
    default: return by_planes<A, A>(view, n, c, h, w);
  }
}

template <typename A>
void fill(const at::Tensor& x, bool per_sample, A* mean, A* m2) {
  const Moments parts = moments<A>(x);
  const int64_t n = x.size(0), c = x.size(1), groups = per_sample ? n : 1, images = per_sample ? 1 : n;
  for (int64_t group = 0; group < groups; ++group) {
    std::vector<double> total_mean(c, 0.0), total_m2(c, 0.0);
    int64_t count = 0;
    for (int64_t i = 0; i < images * parts.blocks; ++i) {
      const int64_t first = (group * images * parts.blocks + i) * c, size = parts.count[i % parts.blocks];
      join(total_mean.data(), total_m2.data(), count, parts.mean.get() + first, parts.m2.get() + first, size, c);
      count += size;
    }
    std::copy(total_mean.begin(), total_mean.end(), mean + group * c);
    std::copy(total_m2.begin(), total_m2.end(), m2 + group * c);
  }
}

std::tuple<at::Tensor, at::Tensor> statistics(const at::Tensor& x, bool per_sample) {
  TORCH_CHECK(x.dim() == 4 && x.is_floating_point(), "statistics: x must be floating point [N, C, H, W], got ",
              x.scalar_type(), " ", x.sizes());
  const auto options = x.options().dtype(accumulation_type(x.scalar_type())).memory_format(std::nullopt);
  const at::Tensor mean = at::zeros({per_sample ? x.size(0) : 1, x.size(1)}, options);
  const at::Tensor m2 = at::zeros_like(mean);
  if (x.numel() > 0) {
    if (x.scalar_type() == at::kDouble)
      fill(x, per_sample, mean.data_ptr<double>(), m2.data_ptr<double>());
    else
      fill(x, per_sample, mean.data_ptr<float>(), m2.data_ptr<float>());
  }
  return {mean, m2};
}

TORCH_LIBRARY_IMPL(spade_fast_native, CPU, m) { m.impl("statistics", statistics); }

}  // namespace
}  // namespace spade_fast::cpu
