// SPDX-License-Identifier: Apache-2.0
// The rows of a table that codes stand for. embedding_sum and label_conv share them.
#pragma once

#include <ATen/ops/empty.h>

#include "segment_sums.h"

namespace spade_fast::cpu {
namespace {

// Numbers the rows of a table [T, L, Hd]: the row of a tap and a label is number tap * steps.tap + label * steps.label.
struct Steps {
  int64_t tap, label;
};

// Finds the rows of the table [T, rows, Hd] that one row of codes adds up. Returns how many they are. numbers [2T].
inline int64_t row_numbers(const int32_t* codes, int64_t taps, int64_t rows, Steps steps, bool edges,
                           int64_t* numbers) {
  int64_t count = 0;
  for (int64_t t = 0; t < taps; ++t) {
    const int32_t code = codes[t];
    if (code < 0) continue;
    const int64_t label = edges ? code >> 1 : code;
    if (label < rows - (edges ? 1 : 0)) numbers[count++] = t * steps.tap + label * steps.label;
    if (edges && (code & 1)) numbers[count++] = t * steps.tap + (rows - 1) * steps.label;
  }
  return count;
}

// The table's rows in the type of the sums. The table may be a convolution's weight [Hd, L, k, k], where taps and
// labels are adjacent in memory. It is then transposed in blocks, and its rows keep the order of memory.
template <typename A>
std::pair<at::Tensor, Steps> table_rows(const at::Tensor& table) {
  const int64_t taps = table.size(0), rows = table.size(1), width = table.size(2);
  const Steps lie{table.stride(0), table.stride(1)};
  const bool together = (lie.tap == 1 && lie.label == taps) || (lie.label == 1 && lie.tap == rows);
  const auto type = c10::CppTypeToScalarType<A>::value;
  if (table.stride(2) == 1 || !together) return {table.to(type).contiguous(), {rows, 1}};
  const at::Tensor columns = table.as_strided({1, width, 1, taps * rows}, {0, table.stride(2), 0, 1});
  const at::Tensor values = at::empty({taps * rows, width}, table.options().dtype(type));
  const View view(columns);
  at::parallel_for(0, taps * rows, 256, [&](int64_t first, int64_t last) {
    gather_tile(view, 0, 0, first, last - first, values.data_ptr<A>() + first * width);
  });
  return {values, lie};
}

}  // namespace
}  // namespace spade_fast::cpu
