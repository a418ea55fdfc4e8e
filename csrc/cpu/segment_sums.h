// SPDX-License-Identifier: Apache-2.0
// Sums of rows by number, and by segment.
#pragma once

#include "common.h"

namespace spade_fast::cpu {
namespace {

// sum[i] = start[i] + Σ weights[r] * rows[numbers[r] * stride + i] for `size` vectors of elements.
template <int size, bool weighted, typename A, typename Number>
inline __attribute__((always_inline)) void sum_block(const A* rows, int64_t stride, const Number* numbers,
                                                     const A* weights, int64_t count, const A* start, A* sum) {
  using V = Vector<A>;
  V total[size];
  for (int v = 0; v < size; ++v) total[v] = start ? reinterpret_cast<const V*>(start)[v] : V{};
  for (int64_t r = 0; r < count; ++r) {
    const V* row = reinterpret_cast<const V*>(rows + numbers[r] * stride);
    for (int v = 0; v < size; ++v) total[v] += weighted ? weights[r] * row[v] : row[v];
  }
  for (int v = 0; v < size; ++v) reinterpret_cast<V*>(sum)[v] = total[v];
}

// sum[i] = start[i] + Σ weights[r] * rows[numbers[r] * stride + i]. start may be null. weights may be null unless
// `weighted`.
template <bool weighted, typename A, typename Number>
SPADE_FAST_CLONES void sum_rows(const A* rows, int64_t stride, int64_t width, const Number* numbers, const A* weights,
                                int64_t count, const A* start, A* sum) {
  constexpr int64_t kVector = 64 / sizeof(A);
  int64_t i = 0;
  for (; i + 4 * kVector <= width; i += 4 * kVector)
    sum_block<4, weighted>(rows + i, stride, numbers, weights, count, start ? start + i : nullptr, sum + i);
  for (; i + 2 * kVector <= width; i += 2 * kVector)
    sum_block<2, weighted>(rows + i, stride, numbers, weights, count, start ? start + i : nullptr, sum + i);
  for (; i + kVector <= width; i += kVector)
    sum_block<1, weighted>(rows + i, stride, numbers, weights, count, start ? start + i : nullptr, sum + i);
  for (; i < width; ++i) {
    A total = start ? start[i] : A(0);
    for (int64_t r = 0; r < count; ++r) {
      const A value = rows[numbers[r] * stride + i];
      total += weighted ? weights[r] * value : value;
    }
    sum[i] = total;
  }
}

// sums [segments, width] of the rows of each segment. order has the numbers of the rows, which are `stride` elements
// apart.
template <typename A>
void sum_segments(const A* rows, int64_t stride, int64_t width, const int32_t* order, const Pieces& pieces, A* sums) {
  const auto partial = buffer<A>(pieces.slots * width);
  at::parallel_for(0, pieces.groups(), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = pieces.group[first]; i < pieces.group[last]; ++i) {
      const auto& piece = pieces.pieces[i];
      A* sum = piece.slot < 0 ? sums + piece.segment * width : partial.get() + piece.slot * width;
      sum_rows<false, A>(rows, stride, width, order + piece.begin, nullptr, piece.end - piece.begin, nullptr, sum);
    }
  });
  add_split(pieces, partial.get(), sums, width);
}

}  // namespace
}  // namespace spade_fast::cpu
