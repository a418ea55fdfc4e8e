// SPDX-License-Identifier: Apache-2.0
// What label_conv and its backward share: options, and the convolution's input as lists of terms.
#pragma once

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

// A part of what the convolution reads at one position: `weight` times the table's row of a label, or of the edges.
template <typename A>
struct Term {
  int32_t row;
  A weight;

  bool operator==(const Term&) const = default;
};

// The convolution's input, a sparse [images, height, width, rows]. It is made for a few images at a time, because the
// lists of terms of all images would not stay in the cache.
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

  // Calls use(first, count) for images first..first + count - 1. The methods below number these images from 0.
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

  int64_t at_once() const { return at_once_; }  // the most images of one call of `use`
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

  // Adds 1 of each row that the code stands for to a list of `used` terms. Returns the new length of the list.
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

inline void check_codes(const char* op, const at::Tensor& codes, int64_t rows, const Options& options) {
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

}  // namespace
}  // namespace spade_fast::cpu
