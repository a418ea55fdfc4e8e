// SPDX-License-Identifier: Apache-2.0
// statistics: mean and summed squared deviation of each channel. Blocks of a fixed size are summed twice while they
// are in cache (the second time about their own mean), then combined in order (Chan et al. 1979): a large mean costs no
// digits, and the result is the same bits for any number of threads.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "cpu.h"

namespace spade_fast::cpu {
namespace {

// sum[c] += Σ rows[i][c]
template <typename A>
SPADE_FAST_CLONES void add_pixels(Tile<const A> rows, int64_t count, int64_t channels, A* __restrict sum) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const A *a = rows.data + i * rows.stride, *b = a + rows.stride, *c = b + rows.stride, *d = c + rows.stride;
    for (int64_t j = 0; j < channels; ++j) sum[j] += (a[j] + b[j]) + (c[j] + d[j]);
  }
  for (; i < count; ++i) {
    const A* a = rows.data + i * rows.stride;
    for (int64_t j = 0; j < channels; ++j) sum[j] += a[j];
  }
}

// sum[c] += Σ rows[i][c] - shift[c], squares[c] += Σ (rows[i][c] - shift[c])²
template <typename A>
SPADE_FAST_CLONES void add_deviations(
    Tile<const A> rows, int64_t count, int64_t channels, const A* shift, A* __restrict sum, A* __restrict squares) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const A *a = rows.data + i * rows.stride, *b = a + rows.stride, *c = b + rows.stride, *d = c + rows.stride;
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

constexpr int64_t kLanes = 64;  // independent sums over the elements of a plane

template <typename T, typename A>
SPADE_FAST_CLONES void add_elements(const T* values, int64_t count, A* __restrict lanes) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += static_cast<A>(values[i + j]);
  for (int64_t j = 0; i + j < count; ++j) lanes[j] += static_cast<A>(values[i + j]);
}

template <typename T, typename A>
SPADE_FAST_CLONES void add_element_deviations(
    const T* values, int64_t count, A shift, A* __restrict lanes, A* __restrict squares) {
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

struct Moments {
  double count = 0, mean = 0, m2 = 0;

  // n elements with sums `sum` and `squares` of their deviations from shift.
  static Moments of(int64_t n, double shift, double sum, double squares) {
    const double size = static_cast<double>(n);
    return {size, shift + sum / size, std::max(0.0, squares - sum * sum / size)};
  }

  void add(const Moments& other) {
    if (other.count == 0) return;
    const double total = count + other.count, delta = other.mean - mean;
    mean += delta * (other.count / total);
    m2 += other.m2 + delta * delta * (count * other.count / total);
    count = total;
  }
};

// moments [N, blocks, C] of blocks of pixels; for channels adjacent in memory, right for any layout.
template <typename A>
std::vector<Moments> by_pixels(const View& x, int64_t n, int64_t c, int64_t h, int64_t w, int64_t* blocks) {
  // About 128 KiB a block, in units of tiles of a row.
  const int64_t tile = tile_pixels(c), tiles_per_row = (w + tile - 1) / tile, tiles = h * tiles_per_row;
  const int64_t pixels = std::clamp<int64_t>(32768 / c, 8, 512);
  const int64_t block = std::max<int64_t>(1, pixels / std::min(tile, w));
  *blocks = (tiles + block - 1) / block;
  std::vector<Moments> moments(n * *blocks * c);
  at::parallel_for(0, n * *blocks, std::max<int64_t>(1, 32768 / (pixels * c)), [&](int64_t first, int64_t last) {
    const auto scratch = buffer<A>(tile * c), sums = buffer<A>(3 * c);
    A *shift = sums.get(), *sum = shift + c, *squares = sum + c;
    for (int64_t b = first; b < last; ++b) {
      const int64_t image = b / *blocks, begin = b % *blocks * block, end = std::min(begin + block, tiles);
      int64_t count = 0;
      const auto for_tiles = [&](const auto& body) {
        for (int64_t t = begin; t < end; ++t) {
          const int64_t y = t / tiles_per_row, from = t % tiles_per_row * tile, size = std::min(tile, w - from);
          body(load_tile(x, image, y, from, size, scratch.get()), size);
        }
      };
      std::fill_n(sums.get(), 3 * c, A(0));
      for_tiles([&](Tile<const A> rows, int64_t size) {
        add_pixels(rows, size, c, shift);
        count += size;
      });
      for (int64_t j = 0; j < c; ++j) shift[j] /= static_cast<A>(count);
      for_tiles([&](Tile<const A> rows, int64_t size) { add_deviations(rows, size, c, shift, sum, squares); });
      for (int64_t j = 0; j < c; ++j) moments[b * c + j] = Moments::of(count, shift[j], sum[j], squares[j]);
    }
  });
  return moments;
}

// The same where the pixels of a channel are adjacent: blocks of 16384 of a plane's elements, or of its rows.
template <typename T, typename A>
std::vector<Moments> by_planes(const View& x, int64_t n, int64_t c, int64_t h, int64_t w, int64_t* blocks) {
  constexpr int64_t kBlock = 16384;
  if (x.row == w) {  // rows follow each other: one long row
    w *= h;
    h = 1;
  }
  const int64_t cuts = (w + kBlock - 1) / kBlock, rows = std::max<int64_t>(1, kBlock / w);  // of a row; a block
  const int64_t chunks = (h + rows - 1) / rows;
  *blocks = cuts * chunks;
  std::vector<Moments> moments(n * *blocks * c);
  at::parallel_for(0, n * c * *blocks, std::max<int64_t>(1, 32768 / (h * w)), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t image = i / (c * *blocks), channel = i / *blocks % c, b = i % *blocks;
      const int64_t begin = b % cuts * kBlock, size = std::min(kBlock, w - begin);
      const int64_t top = b / cuts * rows, bottom = std::min(top + rows, h);
      const T* plane = reinterpret_cast<const T*>(x.data) + x.offset(image, 0, begin) + channel * x.channel;
      A lanes[kLanes] = {}, squares[kLanes] = {};
      const auto total = [](const A* values) {
        double sum = 0;
        for (int64_t j = 0; j < kLanes; ++j) sum += values[j];
        return sum;
      };
      for (int64_t y = top; y < bottom; ++y) add_elements(plane + y * x.row, size, lanes);
      const int64_t count = size * (bottom - top);
      const A shift = static_cast<A>(total(lanes) / static_cast<double>(count));
      std::fill_n(lanes, kLanes, A(0));
      for (int64_t y = top; y < bottom; ++y) add_element_deviations(plane + y * x.row, size, shift, lanes, squares);
      moments[(image * *blocks + b) * c + channel] = Moments::of(count, shift, total(lanes), total(squares));
    }
  });
  return moments;
}

template <typename A>
void fill(const at::Tensor& x, bool per_sample, const at::Tensor& mean, const at::Tensor& m2) {
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  const View view(x);
  int64_t blocks = 0;
  std::vector<Moments> moments;
  const bool planes = (view.pixel == 1 || w == 1) && (view.channel != 1 || c == 1);
  if (!planes) {
    moments = by_pixels<A>(view, n, c, h, w, &blocks);
  } else {
    switch (view.type) {
      case at::kHalf: moments = by_planes<c10::Half, A>(view, n, c, h, w, &blocks); break;
      case at::kBFloat16: moments = by_planes<c10::BFloat16, A>(view, n, c, h, w, &blocks); break;
      default: moments = by_planes<A, A>(view, n, c, h, w, &blocks);
    }
  }
  const int64_t groups = per_sample ? n : 1, each = per_sample ? blocks : n * blocks;
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t j = 0; j < c; ++j) {
      Moments total;
      for (int64_t b = 0; b < each; ++b) total.add(moments[(g * each + b) * c + j]);
      mean.data_ptr<A>()[g * c + j] = static_cast<A>(total.mean);
      m2.data_ptr<A>()[g * c + j] = static_cast<A>(total.m2);
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
      fill<double>(x, per_sample, mean, m2);
    else
      fill<float>(x, per_sample, mean, m2);
  }
  return {mean, m2};
}

TORCH_LIBRARY_IMPL(spade_fast_native, CPU, m) { m.impl("statistics", statistics); }

}  // namespace
}  // namespace spade_fast::cpu
