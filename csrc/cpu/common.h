// SPDX-License-Identifier: Apache-2.0
// What the CPU implementations share: dispatch to the processor's vector instructions, tiles of any tensor as rows of
// channels, and sums over segments that are the same bits for any number of threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

// A function compiled for several instruction sets, one of which is chosen when the library is loaded. Its loops run
// over contiguous channels, which the compiler vectorizes.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define SPADE_FAST_HAS_CLONES
#define SPADE_FAST_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define SPADE_FAST_CLONES
#endif

// Before a loop whose iterations write nothing that another one reads: spares the compiler its run-time checks, of
// which it makes only so many.
#if defined(__clang__)
#define SPADE_FAST_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define SPADE_FAST_INDEPENDENT _Pragma("GCC ivdep")
#else
#define SPADE_FAST_INDEPENDENT
#endif

namespace spade_fast::cpu {

// 64 bytes of A wherever they lie: sums of this type stay in registers, whatever their size on the processor.
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

// at::empty, for large tensors on large pages where the system gives them when asked: to map fresh memory by pages of
// 4 KiB costs more than the arithmetic on it.
at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options);

// A tensor [N, C, H, W] wherever its elements lie; strides in elements.
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

  // Whether pixels can be used where they are, as rows of A.
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

// Copies `count` pixels from (n, y, x) on, converted, to buffer [count, channels]; and back. A: float, double.
template <typename A>
void gather_tile(const View& view, int64_t n, int64_t y, int64_t x, int64_t count, A* buffer);
template <typename A>
void scatter_tile(const View& view, int64_t n, int64_t y, int64_t x, int64_t count, const A* buffer);

// The pixels in place where possible, otherwise copied to buffer.
template <typename A>
Tile<const A> load_tile(const View& view, int64_t n, int64_t y, int64_t x, int64_t count, A* buffer) {
  if (view.direct<A>()) return {view.at<A>(n, y, x), view.pixel};
  gather_tile(view, n, y, x, count, buffer);
  return {buffer, view.channels};
}

// Where to write pixels: in place where possible, otherwise buffer, for finish_tile to copy.
template <typename A>
Tile<A> start_tile(const View& view, int64_t n, int64_t y, int64_t x, A* buffer) {
  if (view.direct<A>()) return {view.at<A>(n, y, x), view.pixel};
  return {buffer, view.channels};
}

template <typename A>
void finish_tile(const View& view, int64_t n, int64_t y, int64_t x, int64_t count, const A* buffer) {
  if (!view.direct<A>()) scatter_tile(view, n, y, x, count, buffer);
}

// Pixels of a row handled at once: rows of this many channels stay in the first-level cache.
inline int64_t tile_pixels(int64_t channels) {
  return std::clamp<int64_t>(8192 / std::max<int64_t>(channels, 1), 4, 64);
}

// Stable counting sort: order [count] lists the positions by number; number s is at order[offsets[s]:offsets[s + 1]],
// offsets [num + 1]. Numbers below 0 come before offsets[0], those from num on after offsets[num], sorted alike.
void sort_positions(const int32_t* numbers, int64_t count, int64_t num, int32_t* order, int32_t* offsets);

// order [count] and offsets [num + 1] in int32, checked to be in bounds. what, of: for errors, "what must be
// segments(of, num)".
std::pair<at::Tensor, at::Tensor> checked_segments(const char* what, const char* of, const at::Tensor& order,
                                                   const at::Tensor& offsets, int64_t count, int64_t num);

// Segments cut into pieces of a fixed size. Each piece is summed by itself into a row, the pieces of one segment are
// added in order: the work is balanced when one segment owns most entries, sums of many terms lose fewer digits, and
// the result does not depend on the number of threads.
struct Pieces {
  static constexpr int64_t kLongest = 256;  // entries of a piece

  struct Piece {
    int64_t segment, begin, end, slot;  // slot: the row of partial sums, -1: the segment's own row of the result
  };
  struct Split {
    int64_t segment, slot, count;
  };
  std::vector<Piece> pieces;   // one at least of every segment
  std::vector<int64_t> group;  // pieces group[g]..group[g + 1] - 1 are about equal work
  std::vector<Split> split;
  int64_t slots = 0;

  Pieces(const int32_t* offsets, int64_t segments);

  int64_t groups() const { return static_cast<int64_t>(group.size()) - 1; }
};

// sums[segment] = sum of its partial rows, for the segments that were split. Rows of `width`.
template <typename A>
void add_split(const Pieces& pieces, const A* partial, A* sums, int64_t width);

// The smallest and the largest of count values; count > 0.
void range(const int32_t* values, int64_t count, int32_t* least, int32_t* most);

}  // namespace spade_fast::cpu
