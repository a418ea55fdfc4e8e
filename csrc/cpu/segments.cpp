// SPDX-License-Identifier: Apache-2.0
// segments: the positions of each segment, by a counting sort.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common.h"

namespace spade_fast::cpu {
namespace {

std::tuple<at::Tensor, at::Tensor> segments(const at::Tensor& segment_ids, int64_t num) {
  TORCH_CHECK(segment_ids.numel() < (int64_t{1} << 31), "segments: at most 2**31 - 1 positions, got ",
              segment_ids.numel());
  TORCH_CHECK(num >= 0 && num < (int64_t{1} << 31) - 2, "segments: num must be in 0..2**31 - 3, got ", num);
  const at::Tensor numbers = segment_ids.to(at::kInt).contiguous();
  const at::Tensor order = at::empty({segment_ids.numel()}, numbers.options());
  const at::Tensor offsets = at::empty({num + 1}, numbers.options());
  sort_positions(numbers.const_data_ptr<int32_t>(), segment_ids.numel(), num, order.data_ptr<int32_t>(),
                 offsets.data_ptr<int32_t>());
  return {order, offsets};
}

TORCH_LIBRARY_IMPL(spade_fast_native, CPU, m) { m.impl("segments", segments); }

}  // namespace
}  // namespace spade_fast::cpu
