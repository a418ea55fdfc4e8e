// SPDX-License-Identifier: Apache-2.0
// label_conv: the convolution of a one-hot label map, or of its pooled version, as sums of table rows; its gradient.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <limits>

#include "table_rows.h"

namespace spade_fast::cpu {
namespace {

constexpr int64_t kPool = 3;  // avg_pool2d(one_hot, 3, stride=2, padding=1, count_include_pad=False)

struct Options {
  bool edges;
  int64_t kernel, stride, padding;
  bool pooled;

  int64_t taps() const { return kernel * kernel; }
  int64_t input_size(int64_t size) const { return pooled ? (size + 1) / 2 : size; }
  int64_t output_size(int64_t size) const { return (input_size(size) + 2 * padding - kernel) / stride + 1; }
};

// What the convolution reads at one position: `weight` of the table's row of this label (or edge channel).
template <typename A>
struct Term {
  int32_t row;
  A weight;

  bool operator==(const Term&) const = default;
};

// The convolution's input, a sparse [images, height, width, rows], for a few images at a time: label maps are long and
// their lists of terms longer.
template <typename A>
class Input {
 public:
  const int64_t height, width;

  Input(const at::Tensor& codes, int64_t rows, const Options& options)
      : height(options.input_size(codes.size(1))),
        width(options.input_size(codes.size(2))),
        codes_(codes.const_data_ptr<int32_t>()),
        images_(codes.size(0)),
        map_height_(codes.size(1)),
        map_width_(codes.size(2)),
        rows_(rows),
        options_(options),
        slots_((options.pooled ? kPool * kPool : 1) + (options.edges ? 1 : 0)) {
    constexpr int64_t kTerms = 1 << 17;  // the second-level cache holds about as many
    const int64_t fit = std::max<int64_t>(1, kTerms / std::max<int64_t>(1, slots_ * height * width));
    at_once_ = std::min(fit, images_);
    const int64_t positions = at_once_ * height * width;
    terms_ = buffer<Term<A>>(positions * slots_);
    counts_ = buffer<uint8_t>(positions);
    repeats_ = buffer<uint8_t>(positions);
  }

  // Calls use(first, count) for images first..first + count - 1, numbered from 0 in what the methods below are asked.
  template <typename Use>
  void for_images(const Use& use) {
    for (int64_t first = 0; first < images_; first += at_once_) {
      const int64_t count = std::min(at_once_, images_ - first);
      at::parallel_for(0, count * height, std::max<int64_t>(1, 1024 / std::max<int64_t>(1, width)),
                       [&](int64_t begin, int64_t end) {
                         for (int64_t i = begin; i < end; ++i) fill_row(first + i / height, i % height, i * width);
                       });
      use(first, count);
    }
  }

  int64_t at_once() const { return at_once_; }  // the most images
  int64_t slots() const { return slots_; }      // the most terms of a position
  int64_t position(int64_t image, int64_t y, int64_t x) const { return (image * height + y) * width + x; }
  int64_t count(int64_t position) const { return counts_[position]; }
  const Term<A>* terms(int64_t position) const { return terms_.get() + position * slots_; }
  // Whether the position `stride` to the left is in the map and holds the same terms.
  bool repeats(int64_t position) const { return repeats_[position]; }

 private:
  void fill_row(int64_t image, int64_t y, int64_t position) {
    const int32_t* map = codes_ + image * map_height_ * map_width_;
    for (int64_t x = 0; x < width; ++x, ++position) {
      Term<A>* terms = terms_.get() + position * slots_;
      const int64_t used = options_.pooled ? pool(map, y, x, terms) : read(map[y * map_width_ + x], terms, 0);
      counts_[position] = static_cast<uint8_t>(used);
      const int64_t left = position - options_.stride;
      repeats_[position] = x >= options_.stride && counts_[left] == used &&
                           std::equal(terms, terms + used, terms_.get() + left * slots_);
    }
  }

  // Adds 1 of each row that the code stands for to `used` terms; returns how many they are then.
  int64_t read(int32_t code, Term<A>* terms, int64_t used) const {
    int64_t rows[2];
    const int64_t found = row_numbers(&code, 1, rows_, {rows_, 1}, options_.edges, rows);
    for (int64_t i = 0; i < found; ++i) {
      int64_t at = 0;
      while (at < used && terms[at].row != rows[i]) ++at;
      if (at == used) terms[used++] = {static_cast<int32_t>(rows[i]), 0};
      terms[at].weight += 1;
    }
    return used;
  }

  int64_t pool(const int32_t* map, int64_t y, int64_t x, Term<A>* terms) const {
    const int64_t bottom = std::min(2 * y + 2, map_height_), right = std::min(2 * x + 2, map_width_);
    int64_t used = 0, inside = 0;
    for (int64_t v = std::max<int64_t>(2 * y - 1, 0); v < bottom; ++v)
      for (int64_t u = std::max<int64_t>(2 * x - 1, 0); u < right; ++u) {
        const int32_t code = map[v * map_width_ + u];
        inside += code >= 0;
        used = read(code, terms, used);
      }
    for (int64_t i = 0; i < used; ++i) terms[i].weight /= static_cast<A>(inside);
    return used;
  }

  const int32_t* codes_;
  int64_t images_, map_height_, map_width_, rows_;
  Options options_;
  int64_t slots_, at_once_;
  std::unique_ptr<Term<A>[]> terms_;  // [positions, slots], counts_[position] of them used
  std::unique_ptr<uint8_t[]> counts_, repeats_;
};

// The k·k positions of the input under one output position, as far as they are inside.
template <typename A>
struct Window {
  const Input<A>& input;
  const Options& options;
  int64_t image, top, left;

  // Calls use(tap, position), in order, until it returns false; returns whether it never did.
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

  // Whether the output position to the left has the same sum: most do, maps are piecewise constant.
  bool repeats() const {
    return left >= options.stride && left + options.kernel <= input.width &&
           every([&](int64_t, int64_t position) { return input.repeats(position); });
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
  const int64_t most = options.taps() * input.slots();
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, wo * options.taps()));
  input.for_images([&, steps = steps](int64_t image, int64_t count) {
    at::parallel_for(0, count * ho, grain, [&](int64_t first, int64_t last) {
      const auto row = buffer<A>(view.direct<A>() ? 0 : wo * width);
      const auto numbers = buffer<int64_t>(most);
      const auto weights = buffer<A>(most);
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
          int64_t used = 0;
          window.every([&](int64_t tap, int64_t position) {
            const Term<A>* terms = input.terms(position);
            for (int64_t j = 0; j < input.count(position); ++j, ++used) {
              numbers[used] = tap * steps.tap + terms[j].row * steps.label;
              weights[used] = terms[j].weight;
            }
            return true;
          });
          sum_rows<true>(values, width, width, numbers.get(), weights.get(), used, start, sum);
        }
        finish_tile(view, image + i / ho, y, 0, wo, row.get());
      }
    });
  });
}

void check_codes(const char* op, const at::Tensor& codes, int64_t rows, const Options& options) {
  TORCH_CHECK(codes.dim() == 3 && codes.scalar_type() == at::kInt, op, ": codes must be int32 [N, H, W], got ",
              codes.scalar_type(), " ", codes.sizes());
  TORCH_CHECK(options.kernel >= 1 && options.stride >= 1 && options.padding >= 0, op,
              ": kernel_size and stride must be at least 1, padding at least 0, got ", options.kernel, ", ",
              options.stride, " and ", options.padding);
  TORCH_CHECK(rows >= (options.edges ? 1 : 0) && rows <= std::numeric_limits<int32_t>::max(), op, ": expected ",
              options.edges ? 1 : 0, " to 2**31 - 1 table rows, got ", rows);
  for (int64_t axis : {1, 2})
    TORCH_CHECK(options.input_size(codes.size(axis)) + 2 * options.padding >= options.kernel, op, ": a ",
                options.kernel, "x", options.kernel, " kernel does not fit codes ", codes.sizes());
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

// sums[i] += weight * row[i]
template <typename A>
SPADE_FAST_CLONES void add_scaled(const A* __restrict row, double weight, int64_t width, double* __restrict sums) {
  for (int64_t i = 0; i < width; ++i) sums[i] += weight * static_cast<double>(row[i]);
}

constexpr int64_t kLongest = 256;  // rows of a gradient that are summed in sequence, before they go to float64

// One tap's share of the table's gradient: sums [rows, width] += the rows of dout [count, Ho, Wo, width], each where
// the tap met a term. Equal terms in sequence take the sum of their rows at once.
template <typename A>
void add_tap(const A* dout, int64_t count, int64_t ho, int64_t wo, int64_t width, const Input<A>& input,
             const Options& options, int64_t tap, const int32_t* sequence, A* run, double* sums) {
  const int64_t down = tap / options.kernel - options.padding, right = tap % options.kernel - options.padding;
  // Output positions whose tap is inside the input.
  const auto before = [&](int64_t size, int64_t offset, int64_t outputs) {
    return std::clamp<int64_t>((size - offset + options.stride - 1) / options.stride, 0, outputs);
  };
  const int64_t y0 = before(0, down, ho), y1 = before(input.height, down, ho);
  const int64_t x0 = before(0, right, wo), x1 = before(input.width, right, wo);
  for (int64_t image = 0; image < count; ++image)
    for (int64_t y = y0; y < y1; ++y) {
      const A* row = dout + (image * ho + y) * wo * width;
      const int64_t line = input.position(image, y * options.stride + down, right);
      for (int64_t x = x0, next; x < x1; x = next) {
        const int64_t position = line + x * options.stride, stop = std::min(x1, x + kLongest);
        for (next = x + 1; next < stop && input.repeats(line + next * options.stride);) ++next;
        if (input.count(position) == 0) continue;
        const A* total = row + x * width;
        if (next - x > 1) {
          sum_rows<false, A>(total, width, width, sequence, nullptr, next - x, nullptr, run);
          total = run;
        }
        for (int64_t j = 0; j < input.count(position); ++j) {
          const Term<A>& term = input.terms(position)[j];
          add_scaled(total, term.weight, width, sums + term.row * width);
        }
      }
    }
}

// dtable [taps, rows, width] and dbias [width] += the gradients. A tap has rows of its own and goes through the images
// in order, whichever thread does: the same bits for any number of threads.
template <typename A>
void backward(const at::Tensor& dout, const at::Tensor& codes, int64_t rows, const Options& options, double* dtable,
              double* dbias) {
  const int64_t width = dout.size(1), ho = dout.size(2), wo = dout.size(3), taps = options.taps();
  const bool in_place =
      dout.scalar_type() == c10::CppTypeToScalarType<A>::value && dout.is_contiguous(at::MemoryFormat::ChannelsLast);
  const View view(dout);
  Input<A> input(codes, rows, options);
  const auto copy = buffer<A>(in_place ? 0 : input.at_once() * ho * wo * width);
  int32_t sequence[kLongest];
  for (int64_t i = 0; i < kLongest; ++i) sequence[i] = static_cast<int32_t>(i);
  input.for_images([&](int64_t image, int64_t count) {
    if (!in_place)
      at::parallel_for(0, count * ho, std::max<int64_t>(1, 16384 / (wo * width)), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i)
          gather_tile(view, image + i / ho, i % ho, 0, wo, copy.get() + i * wo * width);
      });
    const A* gradient = in_place ? dout.const_data_ptr<A>() + image * ho * wo * width : copy.get();
    at::parallel_for(0, taps + 1, 1, [&](int64_t first, int64_t last) {
      const auto run = buffer<A>(width);
      for (int64_t tap = first; tap < last; ++tap) {
        if (tap < taps) {
          double* sums = dtable + tap * rows * width;
          add_tap(gradient, count, ho, wo, width, input, options, tap, sequence, run.get(), sums);
          continue;
        }
        for (int64_t i = 0; i < count * ho * wo; i += kLongest) {
          const int64_t terms = std::min(kLongest, count * ho * wo - i);
          sum_rows<false, A>(gradient + i * width, width, width, sequence, nullptr, terms, nullptr, run.get());
          add_scaled(run.get(), 1, width, dbias);
        }
      }
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

TORCH_LIBRARY_IMPL(spade_fast_native, CPU, m) {
  m.impl("label_conv", label_conv);
  m.impl("label_conv_backward", label_conv_backward);
}

}  // namespace
}  // namespace spade_fast::cpu
