// SPDX-License-Identifier: Apache-2.0
// embedding_sum: for each row of codes, the sum of one table row a tap, then bias and ReLU. And the gradient.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "table_rows.h"

namespace spade_fast::cpu {
namespace {

constexpr int32_t kNothing = -1;

template <typename A>
SPADE_FAST_CLONES void rectify(A* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = values[i] < 0 ? 0 : values[i];
}

template <typename A>
void forward(const at::Tensor& table, const at::Tensor& bias, const int32_t* codes, bool edges, bool relu, A* out,
             int64_t count) {
  const int64_t taps = table.size(0), rows = table.size(1), width = table.size(2);
  const auto [storage, steps] = table_rows<A>(table);
  const A *values = storage.template const_data_ptr<A>(), *start = bias.const_data_ptr<A>();
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, taps * width));
  at::parallel_for(0, count, grain, [&, steps = steps](int64_t first, int64_t last) {
    const auto numbers = buffer<int64_t>(2 * taps);
    for (int64_t q = first; q < last; ++q) {
      const int64_t used = row_numbers(codes + q * taps, taps, rows, steps, edges, numbers.get());
      sum_rows<false, A>(values, width, width, numbers.get(), nullptr, used, start, out + q * width);
      if (relu) rectify(out + q * width, width);
    }
  });
}

at::Tensor embedding_sum(const at::Tensor& table, const std::optional<at::Tensor>& bias, const at::Tensor& codes,
                         bool edges, bool relu) {
  const auto type = accumulation_type(table.scalar_type());
  const int64_t width = table.size(2);
  TORCH_CHECK(codes.scalar_type() == at::kInt, "embedding_sum: codes must be int32, got ", codes.scalar_type());
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == width), "embedding_sum: bias must have shape [", width,
              "], got ", bias ? bias->sizes() : at::IntArrayRef());
  const auto options = table.options().dtype(type);
  const at::Tensor start = bias ? bias->to(type).contiguous() : at::zeros({width}, options);
  const at::Tensor source = codes.contiguous();
  const at::Tensor out = at::empty({codes.size(0), width}, options);
  const auto* code = source.const_data_ptr<int32_t>();
  if (type == at::kDouble)
    forward<double>(table, start, code, edges, relu, out.data_ptr<double>(), codes.size(0));
  else
    forward<float>(table, start, code, edges, relu, out.data_ptr<float>(), codes.size(0));
  return out.to(table.scalar_type());
}

template <typename T, typename A>
SPADE_FAST_CLONES void mask_rows(const T* dout, const T* out, bool relu, A* __restrict gradient, int64_t count) {
  if (relu)
    for (int64_t i = 0; i < count; ++i) gradient[i] = static_cast<A>(out[i]) > 0 ? static_cast<A>(dout[i]) : A(0);
  else
    for (int64_t i = 0; i < count; ++i) gradient[i] = static_cast<A>(dout[i]);
}

// gradient [Q, Hd]: dout where the ReLU is open, else 0.
template <typename A>
void masked(const at::Tensor& dout, const at::Tensor& out, bool relu, A* gradient) {
  at::parallel_for(0, dout.numel(), 32768, [&](int64_t first, int64_t last) {
    const auto rows = [&](auto zero) {
      using T = decltype(zero);
      mask_rows(dout.const_data_ptr<T>() + first, out.const_data_ptr<T>() + first, relu, gradient + first,
                last - first);
    };
    switch (dout.scalar_type()) {
      case at::kHalf: return rows(c10::Half());
      case at::kBFloat16: return rows(c10::BFloat16());
      default: return rows(A());
    }
  });
}

template <typename A>
void backward(const at::Tensor& dout, const at::Tensor& out, const at::Tensor& codes, int64_t rows, bool edges,
              bool relu, const at::Tensor& dtable, const at::Tensor& dbias) {
  const int64_t count = codes.size(0), taps = codes.size(1), width = dout.size(1), columns = edges ? 2 * taps : taps;
  const auto gradient = buffer<A>(count * width);
  masked(dout, out, relu, gradient.get());
  // For each table row, in order, the sums that it is a part of: positions sorted by row number. A row of codes has
  // `columns` positions.
  const auto numbers = buffer<int32_t>(count * columns), order = buffer<int32_t>(count * columns);
  const auto offsets = buffer<int32_t>(taps * rows + 1);
  const auto* code = codes.const_data_ptr<int32_t>();
  const auto one = buffer<int64_t>(columns);
  for (int64_t q = 0; q < count; ++q) {
    const int64_t used = row_numbers(code + q * taps, taps, rows, {rows, 1}, edges, one.get());
    int32_t* row = numbers.get() + q * columns;
    for (int64_t j = 0; j < columns; ++j) row[j] = j < used ? static_cast<int32_t>(one[j]) : kNothing;
  }
  sort_positions(numbers.get(), count * columns, taps * rows, order.get(), offsets.get());
  for (int64_t i = 0; i < count * columns; ++i) order[i] /= static_cast<int32_t>(columns);
  sum_segments(gradient.get(), width, width, order.get(), Pieces(offsets.get(), taps * rows), dtable.data_ptr<A>());
  // The bias is a part of every sum.
  const auto all = buffer<int32_t>(count);
  for (int64_t q = 0; q < count; ++q) all[q] = static_cast<int32_t>(q);
  const int32_t limits[2] = {0, static_cast<int32_t>(count)};
  sum_segments(gradient.get(), width, width, all.get(), Pieces(limits, 1), dbias.data_ptr<A>());
}

std::tuple<at::Tensor, at::Tensor> embedding_sum_backward(const at::Tensor& dout, const at::Tensor& out,
                                                          const at::Tensor& codes, int64_t rows, bool edges,
                                                          bool relu) {
  const auto type = accumulation_type(dout.scalar_type());
  const int64_t taps = codes.size(1), width = dout.size(1), places = codes.numel() * (edges ? 2 : 1);
  TORCH_CHECK(codes.scalar_type() == at::kInt, "embedding_sum_backward: codes must be int32, got ",
              codes.scalar_type());
  TORCH_CHECK(dout.sizes() == out.sizes() && dout.size(0) == codes.size(0) && dout.scalar_type() == out.scalar_type(),
              "embedding_sum_backward: dout and out must be alike, a row for each row of codes; got ", dout.sizes(),
              ", ", out.sizes(), " and ", codes.sizes());
  constexpr int64_t kMost = (int64_t{1} << 31) - 3;
  TORCH_CHECK(places <= kMost && taps * rows <= kMost,
              "embedding_sum_backward: at most 2**31 - 3 codes and table rows");
  const at::Tensor dtable = at::empty({taps, rows, width}, dout.options().dtype(type));
  const at::Tensor dbias = at::empty({width}, dtable.options());
  const at::Tensor upstream = dout.contiguous(), activation = out.contiguous(), source = codes.contiguous();
  if (type == at::kDouble)
    backward<double>(upstream, activation, source, rows, edges, relu, dtable, dbias);
  else
    backward<float>(upstream, activation, source, rows, edges, relu, dtable, dbias);
  return {dtable.to(dout.scalar_type()), dbias.to(dout.scalar_type())};
}

TORCH_LIBRARY_IMPL(spade_fast_native, CPU, m) {
  m.impl("embedding_sum", embedding_sum);
  m.impl("embedding_sum_backward", embedding_sum_backward);
}

}  // namespace
}  // namespace spade_fast::cpu
