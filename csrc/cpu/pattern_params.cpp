// SPDX-License-Identifier: Apache-2.0
// pattern_params: gamma and beta of every distinct pattern, from the hidden rows of its k×k taps. And the gradient.
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include "segment_sums.h"

namespace spade_fast::cpu {
namespace {

// params[p] = bias + Σ over taps t of values[taps[p, t], t], with values = rows · weights. Channels are done in blocks:
// one GEMM gives the values of a block for every tap, and the sums then read them from the cache.
constexpr int64_t kBlock = int64_t{1} << 19;  // elements of `values` for a block

struct Sizes {
  int64_t hidden, width, patterns, taps, channels;  // Q, Hd, P, T, 2C
};

Sizes check(const char* op, const at::Tensor& a, const at::Tensor& taps, const at::Tensor& w_gamma,
            const at::Tensor& w_beta) {
  TORCH_CHECK(taps.scalar_type() == at::kInt, op, ": taps must be int32, got ", taps.scalar_type());
  TORCH_CHECK(a.dim() == 2 && taps.dim() == 2 && w_gamma.dim() == 4 && w_gamma.sizes() == w_beta.sizes() &&
                  w_gamma.size(1) == a.size(1) && w_gamma.size(2) * w_gamma.size(3) == taps.size(1),
              op, ": expected a [Q, Hd], taps [P, k*k] and two weights [C, Hd, k, k], got ", a.sizes(), ", ",
              taps.sizes(), ", ", w_gamma.sizes(), " and ", w_beta.sizes());
  const Sizes s{a.size(0), a.size(1), taps.size(0), taps.size(1), 2 * w_gamma.size(0)};
  constexpr int64_t kMost = (int64_t{1} << 31) - 3;
  TORCH_CHECK(s.patterns * s.taps <= kMost && s.hidden * s.taps <= kMost, op, ": at most 2**31 - 3 taps, got ",
              taps.sizes(), " of ", a.sizes());
  int32_t least = 0, most = 0;
  if (taps.numel() > 0) range(taps.const_data_ptr<int32_t>(), taps.numel(), &least, &most);
  TORCH_CHECK(most < std::max<int64_t>(s.hidden, 1), op, ": taps must be below ", s.hidden, ", got ", most);
  return s;
}

// A convolution's weight [C, Hd, k, k] as [C, T, Hd]. A weight that is stored channels-last is not copied.
at::Tensor matrix(const at::Tensor& weight, at::ScalarType type) {
  return weight.to(type).permute({0, 2, 3, 1}).contiguous().view({weight.size(0), -1, weight.size(1)});
}

// Channels of a block. The temporary [Q, T, block] is then small, and the GEMM's T * block columns are enough.
int64_t block_channels(const Sizes& s) {
  const int64_t most = kBlock / std::max<int64_t>(1, s.hidden * s.taps);
  return std::min(s.channels / 2, std::clamp<int64_t>(most / 16 * 16, 16, 256));
}

// Calls block(half, c, count) for channels c..c + count - 1 of gamma (half 0), then of beta (half 1).
template <typename F>
void for_blocks(const Sizes& s, F block) {
  const int64_t half = s.channels / 2, step = block_channels(s);
  for (int i = 0; i < 2; ++i)
    for (int64_t c = 0; c < half; c += step) block(i, c, std::min(step, half - c));
}

// Weights [block, T, Hd] as [T, block, Hd], and back.
template <typename A>
void swap_taps(const A* from, int64_t rows, int64_t columns, int64_t width, A* to) {
  at::parallel_for(0, rows, 8, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      for (int64_t j = 0; j < columns; ++j)
        std::copy_n(from + (i * columns + j) * width, width, to + (j * rows + i) * width);
  });
}

template <typename A>
void forward(const at::Tensor& rows, const int32_t* taps, const at::Tensor (&weights)[2], const at::Tensor& bias,
             const Sizes& s, const at::Tensor& params) {
  const int64_t step = block_channels(s);
  const at::Tensor packed = at::empty({s.taps * step * s.width}, rows.options());
  const at::Tensor storage = at::empty({s.hidden * s.taps * step}, rows.options());
  for_blocks(s, [&](int half, int64_t c, int64_t block) {
    const int64_t columns = s.taps * block, channel = half * (s.channels / 2) + c;
    const at::Tensor weight = weights[half].narrow(0, c, block);
    at::Tensor values = storage.narrow(0, 0, s.hidden * columns).view({s.hidden, columns});
    swap_taps(weight.const_data_ptr<A>(), block, s.taps, s.width, packed.data_ptr<A>());
    at::mm_out(values, rows, packed.narrow(0, 0, columns * s.width).view({columns, s.width}).t());
    const A *value = values.const_data_ptr<A>(), *start = bias.const_data_ptr<A>() + channel;
    A* out = params.data_ptr<A>() + channel;
    at::parallel_for(0, s.patterns, std::max<int64_t>(1, 32768 / columns), [&](int64_t first, int64_t last) {
      const auto numbers = buffer<int64_t>(s.taps);
      for (int64_t p = first; p < last; ++p) {
        int64_t used = 0;
        for (int64_t t = 0; t < s.taps; ++t)
          if (const int32_t q = taps[p * s.taps + t]; q >= 0) numbers[used++] = q * s.taps + t;
        sum_rows<false, A>(value, block, block, numbers.get(), nullptr, used, start, out + p * s.channels);
      }
    });
  });
}

at::Tensor pattern_params(const at::Tensor& a, const at::Tensor& taps, const at::Tensor& w_gamma,
                          const at::Tensor& b_gamma, const at::Tensor& w_beta, const at::Tensor& b_beta,
                          const std::optional<at::Tensor>&, const std::optional<at::Tensor>&) {
  const at::Tensor codes = taps.contiguous();
  const Sizes s = check("pattern_params", a, codes, w_gamma, w_beta);
  TORCH_CHECK(2 * b_gamma.numel() == s.channels && 2 * b_beta.numel() == s.channels,
              "pattern_params: biases must have shape [", s.channels / 2, "], got ", b_gamma.sizes(), " and ",
              b_beta.sizes());
  const auto type = accumulation_type(a.scalar_type());
  const at::Tensor rows = a.to(type).contiguous(), bias = at::cat({b_gamma.to(type), b_beta.to(type)});
  const at::Tensor weights[2] = {matrix(w_gamma, type), matrix(w_beta, type)};
  const at::Tensor params = at::empty({s.patterns, s.channels}, rows.options());
  const auto* code = codes.const_data_ptr<int32_t>();
  if (params.numel() > 0) {
    if (type == at::kDouble)
      forward<double>(rows, code, weights, bias, s, params);
    else
      forward<float>(rows, code, weights, bias, s, params);
  }
  return params.to(a.scalar_type());
}

// Where each hidden row is used: segment q * T + t lists the patterns with row q under tap t.
struct Uses {
  at::Tensor order, offsets;

  Uses(const at::Tensor& taps, const std::optional<at::Tensor>& tap_order, const std::optional<at::Tensor>& tap_offsets,
       const Sizes& s) {
    if (tap_order && tap_offsets) {
      std::tie(order, offsets) = checked_segments("pattern_params_backward: tap_order and tap_offsets", "taps",
                                                  *tap_order, *tap_offsets, taps.numel(), s.hidden * s.taps);
      return;
    }
    order = at::empty({taps.numel()}, taps.options());
    offsets = at::empty({s.hidden * s.taps + 1}, taps.options());
    const auto keys = buffer<int32_t>(taps.numel());
    const auto* code = taps.const_data_ptr<int32_t>();
    for (int64_t i = 0; i < taps.numel(); ++i)
      keys[i] = code[i] < 0 ? -1 : static_cast<int32_t>(code[i] * s.taps + i % s.taps);
    sort_positions(keys.get(), taps.numel(), s.hidden * s.taps, order.data_ptr<int32_t>(), offsets.data_ptr<int32_t>());
  }
};

template <typename A>
void backward(const at::Tensor& gradient, const at::Tensor& rows, const at::Tensor (&weights)[2], const Uses& uses,
              const Sizes& s, at::Tensor da, const at::Tensor (&dweights)[2]) {
  const int64_t step = block_channels(s);
  const at::Tensor packed = at::empty({s.taps * step * s.width}, rows.options());
  const at::Tensor storage = at::empty({s.hidden * s.taps * step}, rows.options());
  const auto source = buffer<int32_t>(uses.order.numel());
  const auto* order = uses.order.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < uses.order.numel(); ++i) source[i] = order[i] / static_cast<int32_t>(s.taps);
  const Pieces pieces(uses.offsets.const_data_ptr<int32_t>(), s.hidden * s.taps);
  for_blocks(s, [&](int half, int64_t c, int64_t block) {
    const int64_t columns = s.taps * block, channel = half * (s.channels / 2) + c;
    const at::Tensor weight = weights[half].narrow(0, c, block), dweight = dweights[half].narrow(0, c, block);
    const at::Tensor dvalues = storage.narrow(0, 0, s.hidden * columns).view({s.hidden, columns});
    sum_segments(gradient.const_data_ptr<A>() + channel, s.channels, block, source.get(), pieces,
                 dvalues.data_ptr<A>());
    at::Tensor whole = packed.narrow(0, 0, columns * s.width).view({columns, s.width});
    swap_taps(weight.const_data_ptr<A>(), block, s.taps, s.width, whole.data_ptr<A>());
    c + half == 0 ? at::mm_out(da, dvalues, whole) : at::addmm_out(da, da, dvalues, whole);
    at::mm_out(whole, dvalues.t(), rows);
    swap_taps(whole.const_data_ptr<A>(), s.taps, block, s.width, dweight.data_ptr<A>());
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> pattern_params_backward(
    const at::Tensor& dparams, const at::Tensor& a, const at::Tensor& taps, const at::Tensor& w_gamma,
    const at::Tensor& w_beta, const std::optional<at::Tensor>& tap_order,
    const std::optional<at::Tensor>& tap_offsets) {
  const at::Tensor codes = taps.contiguous();
  const Sizes s = check("pattern_params_backward", a, codes, w_gamma, w_beta);
  TORCH_CHECK(dparams.dim() == 2 && dparams.size(0) == s.patterns && dparams.size(1) == s.channels,
              "pattern_params_backward: dparams must have shape [", s.patterns, ", ", s.channels, "], got ",
              dparams.sizes());
  const auto type = accumulation_type(a.scalar_type());
  const at::Tensor rows = a.to(type).contiguous(), gradient = dparams.to(type).contiguous();
  const at::Tensor weights[2] = {matrix(w_gamma, type), matrix(w_beta, type)};
  const int64_t half = s.channels / 2;
  const at::Tensor da = at::empty({s.hidden, s.width}, rows.options());
  const at::Tensor dweights[2] = {at::empty({half, s.taps, s.width}, rows.options()),
                                  at::empty({half, s.taps, s.width}, rows.options())};
  if (s.patterns == 0 || s.channels == 0 || rows.numel() == 0) {
    for (at::Tensor zero : {da, dweights[0], dweights[1]}) zero.zero_();
  } else {
    const Uses uses(codes, tap_order, tap_offsets, s);
    if (type == at::kDouble)
      backward<double>(gradient, rows, weights, uses, s, da, dweights);
    else
      backward<float>(gradient, rows, weights, uses, s, da, dweights);
  }
  const at::Tensor dbias = gradient.sum(0).to(w_gamma.scalar_type());
  const int64_t k = w_gamma.size(2);
  const auto dw = [&](int i) {
    return dweights[i].view({half, k, -1, s.width}).permute({0, 3, 1, 2}).to(w_gamma.scalar_type());
  };
  return {da.to(a.scalar_type()), dw(0), dbias.narrow(0, 0, half).clone(), dw(1), dbias.narrow(0, half, half).clone()};
}

TORCH_LIBRARY_IMPL(spade_fast_native, CPU, m) {
  m.impl("pattern_params", pattern_params);
  m.impl("pattern_params_backward", pattern_params_backward);
}

}  // namespace
}  // namespace spade_fast::cpu
