// SPDX-License-Identifier: Apache-2.0
// What the CPU implementations share: functions compiled for several instruction sets, tiles of any tensor as rows of
// channels, and the division of segments among threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

// A function compiled for several instruction sets. The loader chooses one for the processor. The function's loops run
// over adjacent channels, so that the compiler vectorizes them.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define SPADE_FAST_HAS_CLONES
#define SPADE_FAST_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define SPADE_FAST_CLONES
#endif

// Says of the loop below that its iterations are independent. Without this GCC adds alias checks and gives up
// vectorizing where there would be too many.
#if defined(__clang__)
#define SPADE_FAST_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define SPADE_FAST_INDEPENDENT _Pragma("GCC ivdep")
#else
#define SPADE_FAST_INDEPENDENT
#endif

namespace spade_fast::cpu {

// 64 bytes of A at any address. Sums of this type stay in registers, whatever the width of the processor's registers.
template <typename A>
using Vector [[gnu::vector_size(64), gnu::aligned(alignof(A)), gnu::may_alias]] = A;

// Sums are float64 for float64 tensors, float32 for all others.
inline at::ScalarType accumulation_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

// The layout of an output shaped like x [N, C, H, W]: channels-last when x's channels are adjacent.
inline at::MemoryFormat memory_format(const at::Tensor& x) {
  return x.size(1) > 1 && x.stride(1) == 1 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

template <typename A>
std::unique_ptr<A[]> buffer(int64_t size) {
  return std::unique_ptr<A[]>(new A[size]);  // not initialized
}

// at::empty, but large tensors ask the system for large pages. Mapping fresh memory in pages of 4 KiB costs more than
// the arithmetic on it.
at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options);

// A tensor [N, C, H, W] of any layout. Strides are in elements.
struct View {
  char* data;
  at::ScalarType type;
  int64_t channels, image, channel, row, pixel;

  explicit View(const at::Tensor& t)
      : data(static_cast<char*>(t.data_ptr())),
        type(t.scalar_type()),
        channels(t.size(1)),
        image(t.stride(0)),
        channel(t.size(1) == 1 ? 1 : t.stride(1)),
        row(t.stride(2)),
        pixel(t.stride(3)) {}

  int64_t offset(int64_t n, int64_t y, int64_t x) const { return n * image + y * row + x * pixel; }

  // Whether pixels are rows of A where they lie.
  template <typename A>
  bool direct() const {
    return type == c10::CppTypeToScalarType<A>::value && channel == 1;
  }

  template <typename A>
  A* at(int64_t n, int64_t y, int64_t x) const {
    return reinterpret_cast<A*>(data) + offset(n, y, x);
  }
};

// Pixels as rows of channels, `stride` elements apart.
template <typename A>
struct Tile {
  A* data;
  int64_t stride;
};

// gather_tile copies `count` pixels from (n, y, x) on, converted to A, to buffer [count, channels]. scatter_tile copies
// them back. A is float or double.
template <typename A>
void gather_tile(const View& view, int64_t n, int64_t y, int64_t x, int64_t count, A* buffer);
template <typename A>
void scatter_tile(const View& view, int64_t n, int64_t y, int64_t x, int64_t count, const A* buffer);

// The pixels where they lie if they are rows of A there, otherwise a copy in buffer.
template <typename A>
Tile<const A> load_tile(const View& view, int64_t n, int64_t y, int64_t x, int64_t count, A* buffer) {
  if (view.direct<A>()) return {view.at<A>(n, y, x), view.pixel};
  gather_tile(view, n, y, x, count, buffer);
  return {buffer, view.channels};
}

// Where to write pixels: where they lie if they are rows of A there, otherwise buffer, which finish_tile copies.
template <typename A>
Tile<A> start_tile(const View& view, int64_t n, int64_t y, int64_t x, A* buffer) {
  if (view.direct<A>()) return {view.at<A>(n, y, x), view.pixel};
  return {buffer, view.channels};
}

template <typename A>
void finish_tile(const View& view, int64_t n, int64_t y, int64_t x, int64_t count, const A* buffer) {
  if (!view.direct<A>()) scatter_tile(view, n, y, x, count, buffer);
}

// How many pixels of a row are handled at once. That many rows of channels stay in the first-level cache.
inline int64_t tile_pixels(int64_t channels) {
  return std::clamp<int64_t>(8192 / std::max<int64_t>(channels, 1), 4, 64);
}

// Stable counting sort. order [count] lists the positions by number: those of number s are at
// order[offsets[s]:offsets[s + 1]], offsets [num + 1]. Numbers below 0 are sorted before offsets[0], numbers from num
// on after offsets[num].
void sort_positions(const int32_t* numbers, int64_t count, int64_t num, int32_t* order, int32_t* offsets);

// order [count] and offsets [num + 1] in int32, checked to be in bounds. Errors begin with `what` and name `of`.
std::pair<at::Tensor, at::Tensor> checked_segments(const char* what, const char* of, const at::Tensor& order,
                                                   const at::Tensor& offsets, int64_t count, int64_t num);

// Segments cut into pieces of a fixed size. Each piece is summed by itself into a row, and the rows of one segment are
// added in order. So the work is balanced even if one segment owns most entries, sums of many terms lose fewer digits,
// and the result does not depend on the number of threads.
struct Pieces {
  static constexpr int64_t kLongest = 256;  // entries of a piece

  struct Piece {
    int64_t segment, begin, end;
    int64_t slot;  // the row of partial sums; -1: the segment's own row of the result
  };
  struct Split {
    int64_t segment, slot, count;
  };
  std::vector<Piece> pieces;   // at least one of every segment
  std::vector<int64_t> group;  // pieces group[i]..group[i + 1] - 1 are about equal work for every i
  std::vector<Split> split;
  int64_t slots = 0;

  Pieces(const int32_t* offsets, int64_t segments);

  int64_t groups() const { return static_cast<int64_t>(group.size()) - 1; }
};

// sums[segment] = the sum of the segment's partial rows, for the segments that were split. A row has `width` elements.
template <typename A>
void add_split(const Pieces& pieces, const A* partial, A* sums, int64_t width);

// The smallest and the largest of `count` values. There is at least one.
void range(const int32_t* values, int64_t count, int32_t* least, int32_t* most);

}  // namespace spade_fast::cpu
