// SPDX-License-Identifier: Apache-2.0
// label_conv_backward: the gradient of label_conv's table and bias, as sums of the output's gradient.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <numeric>

#include "label_conv.h"

namespace spade_fast::cpu {
namespace {

// sums[i] += weight * row[i]
template <typename A>
SPADE_FAST_CLONES void add_scaled(const A* __restrict row, double weight, int64_t width, double* __restrict sums) {
  for (int64_t i = 0; i < width; ++i) sums[i] += weight * static_cast<double>(row[i]);
}

constexpr int64_t kLongest = 256;  // the most rows of a gradient that are summed in A before they go to float64

// The gradient of a few images, [images, height, width, channels] in memory.
template <typename A>
struct Gradient {
  const A* data;
  int64_t images, height, width, channels;

  int64_t rows() const { return images * height * width; }
  const A* row(int64_t image, int64_t y, int64_t x) const {
    return data + ((image * height + y) * width + x) * channels;
  }
};

// dout as rows of A, a few images at a time: where it lies if it has that layout and type, otherwise a copy.
template <typename A>
class GradientRows {
 public:
  GradientRows(const at::Tensor& dout, int64_t at_once)
      : dout_(dout),
        view_(dout),
        in_place_(dout.scalar_type() == c10::CppTypeToScalarType<A>::value &&
                  dout.is_contiguous(at::MemoryFormat::ChannelsLast)),
        copy_(buffer<A>(in_place_ ? 0 : at_once * dout.size(1) * dout.size(2) * dout.size(3))) {}

  Gradient<A> images(int64_t first, int64_t count) {
    const int64_t width = dout_.size(1), ho = dout_.size(2), wo = dout_.size(3);
    if (in_place_) return {dout_.const_data_ptr<A>() + first * ho * wo * width, count, ho, wo, width};
    at::parallel_for(0, count * ho, std::max<int64_t>(1, 16384 / (wo * width)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        gather_tile(view_, first + i / ho, i % ho, 0, wo, copy_.get() + i * wo * width);
    });
    return {copy_.get(), count, ho, wo, width};
  }

 private:
  const at::Tensor& dout_;
  View view_;
  bool in_place_;
  std::unique_ptr<A[]> copy_;
};

// Sums of rows that follow each other in memory.
template <typename A>
class RunSums {
 public:
  explicit RunSums(int64_t width) : width_(width), sum_(buffer<A>(width)) {
    std::iota(sequence_, sequence_ + kLongest, 0);
  }

  // The sum of `count` rows, at most kLongest. It is valid until the next call.
  const A* total(const A* rows, int64_t count) {
    if (count == 1) return rows;
    sum_rows<false, A>(rows, width_, width_, sequence_, nullptr, count, nullptr, sum_.get());
    return sum_.get();
  }

 private:
  int64_t width_;
  std::unique_ptr<A[]> sum_;
  int32_t sequence_[kLongest];
};

struct Range {
  int64_t begin, end;
};

// The output positions along one axis whose tap is inside the input: position i reads i * stride + offset.
Range outputs_inside(int64_t input_size, int64_t output_size, int64_t stride, int64_t offset) {
  const auto first_at_or_after = [&](int64_t limit) {
    return std::clamp<int64_t>((limit - offset + stride - 1) / stride, 0, output_size);
  };
  return {first_at_or_after(0), first_at_or_after(input_size)};
}

// How many output positions in sequence, at most `most`, have a tap that meets the same terms as at `position`.
template <typename A>
int64_t run_length(const Input<A>& input, int64_t position, int64_t stride, int64_t most) {
  int64_t length = 1;
  while (length < most && input.repeats(position + length * stride)) ++length;
  return length;
}

// One tap's share of the table's gradient: sums [rows, channels] += the rows of dout where the tap met a term. Equal
// terms in sequence take the sum of their rows at once.
template <typename A>
void add_tap(const Gradient<A>& dout, const Input<A>& input, const Options& options, int64_t tap, RunSums<A>& runs,
             double* sums) {
  const int64_t stride = options.stride;
  const int64_t down = tap / options.kernel - options.padding, right = tap % options.kernel - options.padding;
  const Range rows = outputs_inside(input.height, dout.height, stride, down);
  const Range columns = outputs_inside(input.width, dout.width, stride, right);
  for (int64_t image = 0; image < dout.images; ++image)
    for (int64_t y = rows.begin; y < rows.end; ++y) {
      const int64_t line = input.position(image, y * stride + down, right);
      for (int64_t x = columns.begin, length; x < columns.end; x += length) {
        const int64_t position = line + x * stride;
        length = run_length(input, position, stride, std::min(columns.end - x, kLongest));
        if (input.count(position) == 0) continue;
        const A* total = runs.total(dout.row(image, y, x), length);
        const Term<A>* terms = input.terms(position);
        for (int64_t j = 0; j < input.count(position); ++j)
          add_scaled(total, terms[j].weight, dout.channels, sums + terms[j].row * dout.channels);
      }
    }
}

// The bias's gradient: sums [channels] += all rows of dout.
template <typename A>
void add_bias(const Gradient<A>& dout, RunSums<A>& runs, double* sums) {
  for (int64_t i = 0; i < dout.rows(); i += kLongest) {
    const A* total = runs.total(dout.data + i * dout.channels, std::min(kLongest, dout.rows() - i));
    add_scaled(total, 1, dout.channels, sums);
  }
}

// dtable [taps, rows, width] and dbias [width] += the gradients. Every tap has sums of its own and goes through the
// images in order, whichever thread does it. So the result has the same bits for any number of threads.
template <typename A>
void backward(const at::Tensor& dout, const at::Tensor& codes, int64_t rows, const Options& options, double* dtable,
              double* dbias) {
  const int64_t width = dout.size(1), taps = options.taps();
  Input<A> input(codes, rows, options);
  GradientRows<A> gradients(dout, input.at_once());
  input.for_images([&](int64_t image, int64_t count) {
    const Gradient<A> gradient = gradients.images(image, count);
    at::parallel_for(0, taps + 1, 1, [&](int64_t first, int64_t last) {
      RunSums<A> runs(width);
      for (int64_t tap = first; tap < std::min(last, taps); ++tap)
        add_tap(gradient, input, options, tap, runs, dtable + tap * rows * width);
      if (last > taps) add_bias(gradient, runs, dbias);
    });
  });
}

std::tuple<at::Tensor, at::Tensor> label_conv_backward(const at::Tensor& dout, const at::Tensor& codes, int64_t rows,
                                                       bool edges, int64_t kernel_size, int64_t stride, int64_t padding,
                                                       bool pooled) {
  const Options options{edges, kernel_size, stride, padding, pooled};
  check_codes("label_conv_backward", codes, rows, options);
  const int64_t n = codes.size(0), ho = options.output_size(codes.size(1)), wo = options.output_size(codes.size(2));
  TORCH_CHECK(
      dout.dim() == 4 && dout.size(0) == n && dout.size(2) == ho && dout.size(3) == wo && dout.is_floating_point(),
      "label_conv_backward: dout must be floating point [", n, ", O, ", ho, ", ", wo, "], got ", dout.scalar_type(),
      " ", dout.sizes());
  const int64_t width = dout.size(1);
  const auto exact = dout.options().dtype(at::kDouble);
  const at::Tensor dtable = at::zeros({options.taps(), rows, width}, exact), dbias = at::zeros({width}, exact);
  if (dout.numel() > 0) {
    const at::Tensor source = codes.contiguous();
    if (dout.scalar_type() == at::kDouble)
      backward<double>(dout, source, rows, options, dtable.data_ptr<double>(), dbias.data_ptr<double>());
    else
      backward<float>(dout, source, rows, options, dtable.data_ptr<double>(), dbias.data_ptr<double>());
  }
  return {dtable.to(dout.scalar_type()), dbias.to(dout.scalar_type())};
}

TORCH_LIBRARY_IMPL(spade_fast_native, CPU, m) { m.impl("label_conv_backward", label_conv_backward); }

}  // namespace
}  // namespace spade_fast::cpu
