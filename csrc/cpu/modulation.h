// SPDX-License-Identifier: Apache-2.0
// What modulation and its backward share: the arguments of a call, checked and converted to the type of the sums.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <optional>

#include "common.h"

namespace spade_fast::cpu {

using Optional = std::optional<at::Tensor>;

// Parameters are [gamma | beta]: by pattern [P, 2C], or by pixel [N, 2C, H·r, W·r].
template <typename A>
struct ModulationCall {
  int64_t n, c, h, w;           // of x
  int64_t r;                    // outputs per pixel of x along each axis: 1 or 2
  int64_t outputs, groups = 1;  // groups: 1, or N when every sample has statistics of its own
  bool dense;
  int64_t patterns = 0;
  View x;
  std::vector<View> params;              // by pixel
  std::vector<const A*> tables;          // by pattern, [P, 2C]
  const int32_t* pattern_ids = nullptr;  // [N, H·r, W·r]
  const A *mean, *rstd;                  // [groups, C]; 0 and 1 without normalization
  std::vector<A> slopes;
  std::vector<at::Tensor> owners;

  ModulationCall(const at::Tensor& input, const Optional& mean_, const Optional& rstd_, at::TensorList parameters,
                 const Optional& pattern_ids_, at::ArrayRef<double> slopes_, int64_t upsample)
      : n(input.size(0)),
        c(input.size(1)),
        h(input.size(2)),
        w(input.size(3)),
        r(upsample),
        outputs(static_cast<int64_t>(parameters.size())),
        dense(!pattern_ids_.has_value()),
        x(input),
        slopes(slopes_.begin(), slopes_.end()) {
    const auto type = c10::CppTypeToScalarType<A>::value;
    TORCH_CHECK(slopes_.size() == parameters.size(), "modulation: expected a slope for each of ", outputs,
                " outputs, got ", slopes_.size());
    TORCH_CHECK(mean_.has_value() == rstd_.has_value(), "modulation: mean and rstd must both be given, or neither");
    if (mean_) {
      groups = mean_->size(0);
      for (const auto* t : {&*mean_, &*rstd_})
        TORCH_CHECK(t->dim() == 2 && t->size(0) == groups && (groups == 1 || groups == n) && t->size(1) == c,
                    "modulation: mean and rstd must have shape [1 or ", n, ", ", c, "], got ", t->sizes());
    }
    const auto options = input.options().dtype(type).memory_format(std::nullopt);
    mean = keep<A>(mean_ ? mean_->to(type).contiguous() : at::full({1, c}, 0, options));
    rstd = keep<A>(rstd_ ? rstd_->to(type).contiguous() : at::full({1, c}, 1, options));
    if (!dense && outputs > 0) patterns = parameters[0].size(0);
    for (const auto& p : parameters) {
      owners.push_back(p);
      if (dense)
        params.emplace_back(p);
      else
        tables.push_back(keep<A>(p.to(type).contiguous()));
    }
    if (!dense) {
      for (const auto& p : parameters)
        TORCH_CHECK(p.size(0) == patterns, "modulation: all params must have equally many rows, got ", patterns,
                    " and ", p.size(0));
      pattern_ids = keep<int32_t>(pattern_ids_->to(at::kInt).contiguous());
      if (pattern_ids_->numel() > 0 && c > 0) {
        int32_t least, most;
        range(pattern_ids, pattern_ids_->numel(), &least, &most);
        TORCH_CHECK_INDEX(least >= 0 && most < patterns, "modulation: ids must be in 0..", patterns - 1, ", got ",
                          least, "..", most);
      }
    }
  }

  int64_t tile() const { return tile_pixels(c); }  // pixels of a row of x that are handled at once
  int64_t tiles_per_row() const { return (w + tile() - 1) / tile(); }
  int64_t group(int64_t image) const { return groups == 1 ? 0 : image; }

  template <typename T>
  const T* keep(const at::Tensor& t) {
    owners.push_back(t);
    return t.const_data_ptr<T>();
  }
};

// The parameters of the outputs of one tile. By pixel, output i has row i; by pattern, row pattern_ids[i].
template <typename A>
struct TileParams {
  const A* data;
  int64_t stride;
  const int32_t* pattern_ids;

  const A* row(int64_t i) const { return data + (pattern_ids ? pattern_ids[i] : i) * stride; }
};

// The parameters of tensor `output` for `count` of its pixels from (image, y, x) on. scratch: [count, 2C].
template <typename A>
TileParams<A> tile_params(const ModulationCall<A>& call, int64_t output, int64_t image, int64_t y, int64_t x,
                          int64_t count, A* scratch) {
  if (!call.dense) {
    const int64_t position = (image * call.h * call.r + y) * call.w * call.r + x;
    return {call.tables[output], 2 * call.c, call.pattern_ids + position};
  }
  const auto tile = load_tile(call.params[output], image, y, x, count, scratch);
  return {tile.data, tile.stride, nullptr};
}

}  // namespace spade_fast::cpu
