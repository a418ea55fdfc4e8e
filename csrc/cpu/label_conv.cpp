// SPDX-License-Identifier: Apache-2.0
// label_conv: the convolution of a one-hot label map, or of its pooled version, as sums of table rows.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "label_conv.h"

namespace spade_fast::cpu {
namespace {

// Those of the k·k positions under one output position that are inside the input.
template <typename A>
struct Window {
  const Input<A>& input;
  const Options& options;
  int64_t image, top, left;

  // Calls use(tap, position), in order, until a call returns false. Returns whether none did.
  template <typename Use>
  bool every(const Use& use) const {
    const int64_t k = options.kernel;
    const int64_t v0 = std::max<int64_t>(0, -top), v1 = std::min(k, input.height - top);
    const int64_t u0 = std::max<int64_t>(0, -left), u1 = std::min(k, input.width - left);
    for (int64_t v = v0; v < v1; ++v)
      for (int64_t u = u0; u < u1; ++u)
        if (!use(v * k + u, input.position(image, top + v, left + u))) return false;
    return true;
  }

  // Whether the output position to the left has the same sum. Most have, because label maps are piecewise constant.
  bool repeats() const {
    return left >= options.stride && left + options.kernel <= input.width &&
           every([&](int64_t, int64_t position) { return input.repeats(position); });
  }
};

// The terms of one window as rows of the table and their weights.
template <typename A>
struct WindowTerms {
  std::unique_ptr<int64_t[]> numbers;
  std::unique_ptr<A[]> weights;
  int64_t used = 0;

  explicit WindowTerms(int64_t most) : numbers(buffer<int64_t>(most)), weights(buffer<A>(most)) {}

  void collect(const Window<A>& window, Steps steps) {
    used = 0;
    window.every([&](int64_t tap, int64_t position) {
      const Term<A>* terms = window.input.terms(position);
      for (int64_t j = 0; j < window.input.count(position); ++j, ++used) {
        numbers[used] = tap * steps.tap + terms[j].row * steps.label;
        weights[used] = terms[j].weight;
      }
      return true;
    });
  }
};

template <typename A>
void forward(const at::Tensor& codes, const at::Tensor& table, const at::Tensor& bias, const Options& options,
             const at::Tensor& out) {
  const int64_t width = table.size(2), ho = out.size(2), wo = out.size(3);
  const auto [storage, steps] = table_rows<A>(table);
  const A *values = storage.template const_data_ptr<A>(), *start = bias.const_data_ptr<A>();
  const View view(out);
  Input<A> input(codes, table.size(1), options);
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, wo * options.taps()));
  input.for_images([&, steps = steps](int64_t image, int64_t count) {
    at::parallel_for(0, count * ho, grain, [&](int64_t first, int64_t last) {
      const auto row = buffer<A>(view.direct<A>() ? 0 : wo * width);
      WindowTerms<A> terms(options.taps() * input.slots());
      for (int64_t i = first; i < last; ++i) {
        const int64_t y = i % ho;
        const Tile<A> target = start_tile(view, image + i / ho, y, 0, row.get());
        for (int64_t x = 0; x < wo; ++x) {
          A* sum = target.data + x * target.stride;
          const int64_t top = y * options.stride - options.padding, left = x * options.stride - options.padding;
          const Window<A> window{input, options, i / ho, top, left};
          if (x > 0 && window.repeats()) {
            std::copy_n(sum - target.stride, width, sum);
            continue;
          }
          terms.collect(window, steps);
          sum_rows<true>(values, width, width, terms.numbers.get(), terms.weights.get(), terms.used, start, sum);
        }
        finish_tile(view, image + i / ho, y, 0, wo, row.get());
      }
    });
  });
}

at::Tensor label_conv(const at::Tensor& codes, const at::Tensor& table, const std::optional<at::Tensor>& bias,
                      bool edges, int64_t kernel_size, int64_t stride, int64_t padding, bool pooled) {
  const Options options{edges, kernel_size, stride, padding, pooled};
  TORCH_CHECK(table.dim() == 3 && table.size(0) == options.taps() && table.is_floating_point(),
              "label_conv: table must be floating point [", options.taps(), ", L, O], got ", table.scalar_type(), " ",
              table.sizes());
  const int64_t width = table.size(2);
  check_codes("label_conv", codes, table.size(1), options);
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == width), "label_conv: bias must have shape [", width,
              "], got ", bias ? bias->sizes() : at::IntArrayRef());
  const auto type = accumulation_type(table.scalar_type());
  const at::Tensor start = bias ? bias->to(type).contiguous() : at::zeros({width}, table.options().dtype(type));
  const at::Tensor source = codes.contiguous();
  const at::Tensor out =
      empty({codes.size(0), width, options.output_size(codes.size(1)), options.output_size(codes.size(2))},
            table.options().memory_format(at::MemoryFormat::ChannelsLast));
  if (out.numel() == 0) return out;
  if (type == at::kDouble)
    forward<double>(source, table, start, options, out);
  else
    forward<float>(source, table, start, options, out);
  return out;
}

TORCH_LIBRARY_IMPL(spade_fast_native, CPU, m) { m.impl("label_conv", label_conv); }

}  // namespace
}  // namespace spade_fast::cpu
