// SPDX-License-Identifier: Apache-2.0
// modulation_backward, the gradients of x and of the parameters.
//
// By pattern, the parameters' gradient is a sum over each pattern's pixels. The sums that normalization's gradient needs
// are then sums over patterns, and dx takes one pass over the pixels. By pixel, one pass computes the parameters' gradient
// and these sums. A second pass computes dx if it depends on the sums.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "modulation_backward_pixels.h"

namespace spade_fast::cpu {
namespace {

// t itself if the channels of a pixel are adjacent, else a copy in which they are.
template <typename A>
at::Tensor with_rows(const at::Tensor& t) {
  const View view(t);
  if (view.channel == 1) return t;
  const int64_t n = t.size(0), c = t.size(1), h = t.size(2), w = t.size(3);
  const at::Tensor copy = empty(
      t.sizes(), t.options().dtype(c10::CppTypeToScalarType<A>::value).memory_format(at::MemoryFormat::ChannelsLast));
  at::parallel_for(0, n * h, std::max<int64_t>(1, 32768 / (w * c)), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) gather_tile(view, i / h, i % h, 0, w, copy.data_ptr<A>() + i * w * c);
  });
  return copy;
}

template <typename A>
class Backward {
 public:
  Backward(const ModulationCall<A>& call, const at::Tensor& x, const std::vector<at::Tensor>& douts,
           at::TensorList params, const at::Tensor& dx, bool stats_from_x)
      : call_(call),
        x_(x),
        params_(params),
        dx_(dx),
        stats_from_x_(stats_from_x),
        douts_(douts.begin(), douts.end()),
        correction_(call.groups, call.c),
        passes_(call_, douts_, correction_) {}

  std::vector<at::Tensor> by_pattern(const int32_t* order, const int32_t* offsets) {
    const int64_t c = call_.c, patterns = call_.patterns;
    std::vector<at::Tensor> sums;
    for (const auto& p : params_) sums.push_back(empty({patterns, 2 * c}, p.options().dtype(kSumType)));
    sum_patterns(order, offsets, sums);
    if (stats_from_x_) sum_channels(offsets, sums);
    passes_.template through_outputs<false>({View(dx_), {}});
    std::vector<at::Tensor> result{dx_};
    for (int64_t output = 0; output < call_.outputs; ++output)
      result.push_back(sums[output].to(params_[output].scalar_type()));
    return result;
  }

  std::vector<at::Tensor> by_pixel() {
    std::vector<at::Tensor> result{dx_};
    PassOutputs<A> to{View(dx_), {}};
    for (const auto& p : params_) {
      result.push_back(empty(p.sizes(), p.options().memory_format(at::MemoryFormat::ChannelsLast)));
      to.dparams.emplace_back(result.back());
    }
    if (!stats_from_x_) {
      passes_.template through_outputs<true>(to);
      return result;
    }
    const View dx = to.target;
    const auto options = x_.options().dtype(kSumType).memory_format(at::MemoryFormat::ChannelsLast);
    const at::Tensor weighted = dx.template direct<A>() ? dx_ : empty(x_.sizes(), options);
    const int64_t block_rows = std::max<int64_t>(1, 512 / call_.w);
    const int64_t blocks = (call_.h + block_rows - 1) / block_rows;
    const auto block_sums = buffer<A>(call_.n * blocks * 2 * call_.c);
    to = {View(weighted), to.dparams, block_sums.get(), block_rows};
    passes_.template through_outputs<true>(to);
    const int64_t blocks_of_group = call_.groups == 1 ? call_.n * blocks : blocks;
    for (int64_t group = 0; group < call_.groups; ++group) {
      const A* sums = block_sums.get() + group * blocks_of_group * 2 * call_.c;
      correction_.set(group, sums, blocks_of_group, pixels_per_group());
    }
    passes_.through_statistics(View(weighted), dx);
    return result;
  }

 private:
  static constexpr at::ScalarType kSumType = c10::CppTypeToScalarType<A>::value;
  static constexpr int64_t kAhead = 8;          // pixels between a prefetch and the use
  static constexpr int64_t kPrefetched = 1024;  // the most bytes of a pixel that are prefetched

  const ModulationCall<A>& call_;
  const at::Tensor& x_;
  at::TensorList params_;
  const at::Tensor& dx_;
  bool stats_from_x_;
  std::vector<View> douts_;
  Correction<A> correction_;
  PixelPasses<A> passes_;

  double pixels_per_group() const {
    return static_cast<double>(call_.n) * call_.h * call_.w / static_cast<double>(call_.groups);
  }

  // sums[output] [P, 2C] = Σ over each pattern's pixels of [dz·xhat | dz].
  void sum_patterns(const int32_t* order, const int32_t* offsets, const std::vector<at::Tensor>& sums) {
    const int64_t c = call_.c, r = call_.r, outputs = call_.outputs, width = 2 * c;
    const Pieces pieces(offsets, call_.patterns);
    const auto partial = buffer<A>(outputs * pieces.slots * width);
    at::parallel_for(0, pieces.groups(), 1, [&](int64_t begin, int64_t end) {
      const auto scratch = buffer<A>(4 * (outputs + 1) * c);
      for (int64_t i = pieces.group[begin]; i < pieces.group[end]; ++i) {
        const auto& piece = pieces.pieces[i];
        A* target[2];
        for (int64_t output = 0; output < outputs; ++output) {
          target[output] = piece.slot < 0 ? sums[output].template data_ptr<A>() + piece.segment * width
                                          : partial.get() + (output * pieces.slots + piece.slot) * width;
          std::fill_n(target[output], width, A(0));
        }
        const int64_t ahead = std::min(call_.n * call_.h * r * call_.w * r - piece.end, kAhead);
        sum_piece(order + piece.begin, piece.end - piece.begin, ahead, piece.segment, scratch.get(), target);
      }
    });
    for (int64_t output = 0; output < outputs; ++output)
      add_split(pieces, partial.get() + output * pieces.slots * width, sums[output].template data_ptr<A>(), width);
  }

  // The pixel of an output's position.
  struct Place {
    int64_t image, y, x;
  };

  Place place(int32_t position) const {
    const uint32_t width = call_.w * call_.r, height = call_.h * call_.r, row = position / width;
    return {row / height, row % height, position % width};
  }

  // Asks for a pixel before it is needed, because the pixels of a pattern are scattered.
  void prefetch(int32_t position) const {
    if (!call_.x.template direct<A>()) return;
    const int64_t shift = call_.r - 1, size = std::min<int64_t>(call_.c, kPrefetched / sizeof(A));
    const Place at = place(position);
    const auto touch = [size](const A* row) {
      for (int64_t j = 0; j < size; j += 64 / sizeof(A)) __builtin_prefetch(row + j);
    };
    touch(call_.x.template at<A>(at.image, at.y >> shift, at.x >> shift));
    for (const View& d : douts_)
      if (d.template direct<A>()) touch(d.template at<A>(at.image, at.y, at.x));
  }

  // Adds the pixels at `positions` to target[output] [2C]. ahead: how many positions follow those of the piece.
  void sum_piece(const int32_t* positions, int64_t count, int64_t ahead, int64_t pattern, A* scratch,
                 A* const* target) {
    const int64_t c = call_.c, shift = call_.r - 1;  // r is 1 or 2
    int64_t i = 0;
    while (i < count) {
      // Up to four pixels at once. They share mean and rstd, so they are of one sample where samples have their own.
      const A *x[4], *dout[2][4];
      const int64_t most = std::min<int64_t>(4, count - i);
      int64_t group = 0, taken = 0;
      for (; taken < most; ++taken) {
        const Place at = place(positions[i + taken]);
        if (taken == 0) group = call_.group(at.image);
        if (call_.group(at.image) != group) break;
        if (i + taken + kAhead < count + ahead) prefetch(positions[i + taken + kAhead]);
        x[taken] = load_tile(call_.x, at.image, at.y >> shift, at.x >> shift, 1, scratch + taken * c).data;
        for (int64_t output = 0; output < call_.outputs; ++output)
          dout[output][taken] =
              load_tile(douts_[output], at.image, at.y, at.x, 1, scratch + (4 * (output + 1) + taken) * c).data;
      }
      for (int64_t output = 0; output < call_.outputs; ++output)
        add_pixels(x, dout[output], taken, call_.mean + group * c, call_.rstd + group * c,
                   call_.tables[output] + pattern * 2 * c, call_.slopes[output], c, target[output], target[output] + c);
      i += taken;
    }
  }

  // The correction from the patterns' sums, in pieces of the patterns of one group.
  void sum_channels(const int32_t* offsets, const std::vector<at::Tensor>& sums) {
    constexpr int64_t kPiece = 128;
    const int64_t c = call_.c, patterns = call_.patterns;
    const int64_t image_pixels = call_.h * call_.r * call_.w * call_.r;
    for (int64_t group = 0; group < call_.groups; ++group) {
      const auto bound = [&](int64_t position) -> int64_t {
        return std::lower_bound(offsets, offsets + patterns, position) - offsets;
      };
      const int64_t begin = call_.groups == 1 ? 0 : bound(group * image_pixels);
      const int64_t end = call_.groups == 1 ? patterns : bound((group + 1) * image_pixels);
      const int64_t pieces = (end - begin + kPiece - 1) / kPiece;
      const auto parts = buffer<A>(pieces * 2 * c);
      at::parallel_for(0, pieces, std::max<int64_t>(1, 65536 / (kPiece * c)), [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) {
          A* part = parts.get() + i * 2 * c;
          std::fill_n(part, 2 * c, A(0));
          const int64_t start = begin + i * kPiece, count = std::min(kPiece, end - start);
          for (int64_t output = 0; output < call_.outputs; ++output)
            add_patterns(call_.tables[output] + start * 2 * c,
                         sums[output].template const_data_ptr<A>() + start * 2 * c, count, c, part, part + c);
        }
      });
      correction_.set(group, parts.get(), pieces, pixels_per_group());
    }
  }
};

template <typename A>
std::vector<at::Tensor> backward(at::TensorList douts, const at::Tensor& x, const Optional& mean, const Optional& rstd,
                                 at::TensorList params, const Optional& pattern_ids, const Optional& order,
                                 const Optional& offsets, at::ArrayRef<double> slopes, int64_t upsample,
                                 bool stats_from_x) {
  const at::Tensor dx = empty(x.sizes(), x.options().memory_format(memory_format(x)));
  TORCH_CHECK(douts.size() == params.size(), "modulation_backward: expected ", params.size(), " douts, got ",
              douts.size());
  for (const auto& d : douts)
    TORCH_CHECK(d.dim() == 4 && d.size(0) == x.size(0) && d.size(1) == x.size(1) && d.size(2) == x.size(2) * upsample &&
                    d.size(3) == x.size(3) * upsample,
                "modulation_backward: douts must have the outputs' shape, got ", d.sizes(), " for x ", x.sizes());
  if (x.numel() == 0) {
    std::vector<at::Tensor> result{dx};
    for (const auto& p : params) result.push_back(at::zeros(p.sizes(), p.options()));
    return result;
  }
  // By pattern, pixels are visited in any order, so each must be a row of channels.
  const at::Tensor rows = pattern_ids ? with_rows<A>(x) : x;
  std::vector<at::Tensor> upstream;
  for (const auto& d : douts) upstream.push_back(pattern_ids ? with_rows<A>(d) : d);
  const ModulationCall<A> call(rows, mean, rstd, params, pattern_ids, slopes, upsample);
  Backward<A> work(call, rows, upstream, params, dx, stats_from_x && mean.has_value());
  if (!pattern_ids) return work.by_pixel();
  const int64_t positions = pattern_ids->numel(), patterns = call.patterns;
  at::Tensor positions_of, limits;
  TORCH_CHECK(positions < (int64_t{1} << 31), "modulation_backward: at most 2**31 - 1 outputs a channel by pattern");
  if (order && offsets) {
    std::tie(positions_of, limits) =
        checked_segments("modulation_backward: order and offsets", "ids", *order, *offsets, positions, patterns);
  } else {
    positions_of = at::empty({positions}, pattern_ids->options().dtype(at::kInt));
    limits = at::empty({patterns + 1}, positions_of.options());
    sort_positions(call.pattern_ids, positions, patterns, positions_of.data_ptr<int32_t>(), limits.data_ptr<int32_t>());
  }
  return work.by_pattern(positions_of.const_data_ptr<int32_t>(), limits.const_data_ptr<int32_t>());
}

std::vector<at::Tensor> modulation_backward(at::TensorList douts, const at::Tensor& x, const Optional& mean,
                                            const Optional& rstd, at::TensorList params, const Optional& pattern_ids,
                                            const Optional& order, const Optional& offsets, at::ArrayRef<double> slopes,
                                            int64_t upsample, bool stats_from_x) {
  const auto run = x.scalar_type() == at::kDouble ? backward<double> : backward<float>;
  return run(douts, x, mean, rstd, params, pattern_ids, order, offsets, slopes, upsample, stats_from_x);
}

TORCH_LIBRARY_IMPL(spade_fast_native, CPU, m) { m.impl("modulation_backward", modulation_backward); }

}  // namespace
}  // namespace spade_fast::cpu
