// SPDX-License-Identifier: Apache-2.0
#include "common.h"

#include <ATen/ops/empty.h>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace spade_fast::cpu {
namespace {

constexpr int64_t kSide = 16;  // a transposed block is kSide × kSide

template <typename T, typename A>
SPADE_FAST_CLONES void gather_rows(const T* source, int64_t pixel, A* target, int64_t count, int64_t channels) {
  for (int64_t i = 0; i < count; ++i) {
    const T* from = source + i * pixel;
    A* __restrict to = target + i * channels;
    for (int64_t c = 0; c < channels; ++c) to[c] = static_cast<A>(from[c]);
  }
}

template <typename T, typename A>
SPADE_FAST_CLONES void scatter_rows(T* target, int64_t pixel, const A* source, int64_t count, int64_t channels) {
  for (int64_t i = 0; i < count; ++i) {
    const A* from = source + i * channels;
    T* __restrict to = target + i * pixel;
    for (int64_t c = 0; c < channels; ++c) to[c] = static_cast<T>(from[c]);
  }
}

// to[column * to_stride + row] = from[row * from_stride + column]. Blocks go through a buffer that stays in registers
// or in the first-level cache.
template <typename T, typename A>
SPADE_FAST_CLONES void transpose(const T* from, int64_t from_stride, A* to, int64_t to_stride, int64_t rows,
                                 int64_t columns) {
  A block[kSide][kSide];
  for (int64_t r = 0; r < rows; r += kSide) {
    const int64_t height = std::min(kSide, rows - r);
    for (int64_t c = 0; c < columns; c += kSide) {
      const int64_t width = std::min(kSide, columns - c);
      const T* source = from + r * from_stride + c;
      A* target = to + c * to_stride + r;
      if (height == kSide && width == kSide) {
        for (int64_t i = 0; i < kSide; ++i)
          for (int64_t j = 0; j < kSide; ++j) block[i][j] = static_cast<A>(source[i * from_stride + j]);
        for (int64_t j = 0; j < kSide; ++j)
          for (int64_t i = 0; i < kSide; ++i) target[j * to_stride + i] = block[i][j];
      } else {
        for (int64_t j = 0; j < width; ++j)
          for (int64_t i = 0; i < height; ++i) target[j * to_stride + i] = static_cast<A>(source[i * from_stride + j]);
      }
    }
  }
}

template <typename T, typename A>
void gather(const View& view, int64_t offset, int64_t count, A* buffer) {
  const T* source = reinterpret_cast<const T*>(view.data) + offset;
  if (view.channel == 1) return gather_rows(source, view.pixel, buffer, count, view.channels);
  if (view.pixel == 1) return transpose(source, view.channel, buffer, view.channels, view.channels, count);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < view.channels; ++c)
      buffer[i * view.channels + c] = static_cast<A>(source[i * view.pixel + c * view.channel]);
}

template <typename T, typename A>
void scatter(const View& view, int64_t offset, int64_t count, const A* buffer) {
  T* target = reinterpret_cast<T*>(view.data) + offset;
  if (view.channel == 1) return scatter_rows(target, view.pixel, buffer, count, view.channels);
  if (view.pixel == 1) return transpose(buffer, view.channels, target, view.channel, count, view.channels);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < view.channels; ++c)
      target[i * view.pixel + c * view.channel] = static_cast<T>(buffer[i * view.channels + c]);
}

}  // namespace

at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor tensor = at::empty(sizes, options);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kLarge = size_t{8} << 20;
  if (tensor.nbytes() >= kLarge) {
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto begin = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + page - 1) / page * page;
    const auto end = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + tensor.nbytes()) / page * page;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish: the system may ignore it
  }
#endif
  return tensor;
}

template <typename A>
void gather_tile(const View& view, int64_t n, int64_t y, int64_t x, int64_t count, A* buffer) {
  const int64_t offset = view.offset(n, y, x);
  switch (view.type) {
    case at::kDouble: return gather<double>(view, offset, count, buffer);
    case at::kFloat: return gather<float>(view, offset, count, buffer);
    case at::kHalf: return gather<c10::Half>(view, offset, count, buffer);
    case at::kBFloat16: return gather<c10::BFloat16>(view, offset, count, buffer);
    default: TORCH_CHECK(false, "expected a float64, float32, float16 or bfloat16 tensor, got ", view.type);
  }
}

template <typename A>
void scatter_tile(const View& view, int64_t n, int64_t y, int64_t x, int64_t count, const A* buffer) {
  const int64_t offset = view.offset(n, y, x);
  switch (view.type) {
    case at::kDouble: return scatter<double>(view, offset, count, buffer);
    case at::kFloat: return scatter<float>(view, offset, count, buffer);
    case at::kHalf: return scatter<c10::Half>(view, offset, count, buffer);
    case at::kBFloat16: return scatter<c10::BFloat16>(view, offset, count, buffer);
    default: TORCH_CHECK(false, "expected a float64, float32, float16 or bfloat16 tensor, got ", view.type);
  }
}

template void gather_tile(const View&, int64_t, int64_t, int64_t, int64_t, float*);
template void gather_tile(const View&, int64_t, int64_t, int64_t, int64_t, double*);
template void scatter_tile(const View&, int64_t, int64_t, int64_t, int64_t, const float*);
template void scatter_tile(const View&, int64_t, int64_t, int64_t, int64_t, const double*);

void sort_positions(const int32_t* numbers, int64_t count, int64_t num, int32_t* order, int32_t* offsets) {
  // Bucket 0 holds the numbers below 0, bucket num + 1 those from num on. Each part of the positions counts its own
  // numbers and writes behind the earlier parts. So the stable order is the same for any number of parts.
  const int64_t buckets = num + 2;
  const auto bucket = [num](int32_t v) -> int64_t { return v < 0 ? 0 : std::min<int64_t>(v, num) + 1; };
  const int64_t wanted = std::min<int64_t>(at::get_num_threads(), std::min(count / 32768, count / buckets));
  const int64_t parts = std::max<int64_t>(1, wanted);
  std::vector<int32_t> next(parts * buckets, 0);
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      int32_t* own = next.data() + part * buckets;
      for (int64_t i = part * count / parts; i < (part + 1) * count / parts; ++i) ++own[bucket(numbers[i])];
    }
  });
  int32_t total = 0;
  for (int64_t b = 0; b < buckets; ++b) {
    if (b > 0) offsets[b - 1] = total;
    for (int64_t part = 0; part < parts; ++part) {
      int32_t& here = next[part * buckets + b];
      const int32_t size = here;
      here = total;
      total += size;
    }
  }
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      int32_t* own = next.data() + part * buckets;
      for (int64_t i = part * count / parts; i < (part + 1) * count / parts; ++i)
        order[own[bucket(numbers[i])]++] = static_cast<int32_t>(i);
    }
  });
  const auto by_number = [numbers](int32_t a, int32_t b) { return numbers[a] < numbers[b]; };
  for (auto [begin, end] :
       {std::pair<int64_t, int64_t>(0, offsets[0]), std::pair<int64_t, int64_t>(offsets[num], count)})
    if (!std::is_sorted(order + begin, order + end, by_number)) std::stable_sort(order + begin, order + end, by_number);
}

std::pair<at::Tensor, at::Tensor> checked_segments(const char* what, const char* of, const at::Tensor& order,
                                                   const at::Tensor& offsets, int64_t count, int64_t num) {
  TORCH_CHECK(order.numel() == count && offsets.numel() == num + 1, what, " must be segments(", of, ", ", num,
              "), got ", order.sizes(), " and ", offsets.sizes());
  const at::Tensor positions = order.to(at::kInt).contiguous(), limits = offsets.to(at::kInt).contiguous();
  int32_t least = 0, most = -1;
  if (count > 0) range(positions.const_data_ptr<int32_t>(), count, &least, &most);
  const auto* limit = limits.const_data_ptr<int32_t>();
  TORCH_CHECK_INDEX(
      least >= 0 && most < count && limit[0] >= 0 && limit[num] <= count && std::is_sorted(limit, limit + num + 1),
      what, " are not segments(", of, ", ", num, ")");
  return {positions, limits};
}

Pieces::Pieces(const int32_t* offsets, int64_t segments) {
  constexpr int64_t kWork = 1024;   // entries of a group
  constexpr int64_t kOverhead = 8;  // what a piece costs beside its entries, in entries
  pieces.reserve(segments);
  group.push_back(0);
  int64_t work = 0;
  for (int64_t s = 0; s < segments; ++s) {
    const int64_t begin = offsets[s], end = offsets[s + 1];
    const int64_t count = std::max<int64_t>(1, (end - begin + kLongest - 1) / kLongest);
    if (count > 1) split.push_back({s, slots, count});
    for (int64_t i = 0; i < count; ++i) {
      const int64_t from = begin + i * kLongest, to = std::min(from + kLongest, end);
      pieces.push_back({s, from, std::max(from, to), count > 1 ? slots++ : -1});
      work += kOverhead + to - from;
      if (work >= kWork) {
        group.push_back(static_cast<int64_t>(pieces.size()));
        work = 0;
      }
    }
  }
  if (group.back() != static_cast<int64_t>(pieces.size())) group.push_back(static_cast<int64_t>(pieces.size()));
}

namespace {

template <typename A>
SPADE_FAST_CLONES void add_rows(const A* rows, int64_t count, A* sum, int64_t width) {
  for (int64_t i = 0; i < width; ++i) sum[i] = rows[i];
  for (int64_t r = 1; r < count; ++r)
    for (int64_t i = 0; i < width; ++i) sum[i] += rows[r * width + i];
}

}  // namespace

template <typename A>
void add_split(const Pieces& pieces, const A* partial, A* sums, int64_t width) {
  at::parallel_for(0, static_cast<int64_t>(pieces.split.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const auto& split = pieces.split[i];
      add_rows(partial + split.slot * width, split.count, sums + split.segment * width, width);
    }
  });
}

template void add_split(const Pieces&, const float*, float*, int64_t);
template void add_split(const Pieces&, const double*, double*, int64_t);

SPADE_FAST_CLONES void range(const int32_t* values, int64_t count, int32_t* least, int32_t* most) {
  int32_t low = values[0], high = values[0];
  for (int64_t i = 1; i < count; ++i) {
    low = std::min(low, values[i]);
    high = std::max(high, values[i]);
  }
  *least = low;
  *most = high;
}

}  // namespace spade_fast::cpu
