// SPDX-License-Identifier: Apache-2.0
// modulation_backward. By pattern: the gradient of the parameters as sums over each pattern's pixels, the sums that
// normalization's gradient needs as sums over patterns, then dx in one pass over the pixels. By pixel: one pass for the
// parameters' gradient and the sums, a second for dx where it depends on them.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <numeric>

#include "modulation_backward_rows.h"

namespace spade_fast::cpu {
namespace {

// What normalization's gradient needs, [groups, C]: of dz·(1 + gamma) and of dz·(1 + gamma)·xhat, mean per pixel of x.
// 0 when mean and rstd are constants.
template <typename A>
struct Correction {
  std::vector<A> first, second;

  Correction(int64_t groups, int64_t c) : first(groups * c, A(0)), second(groups * c, A(0)) {}
};

// Adds parts [count, 2C], in order, and divides by size.
template <typename A>
void combine(const A* parts, int64_t count, int64_t c, double size, A* first, A* second) {
  std::vector<double> total(2 * c, 0.0);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < 2 * c; ++j) total[j] += parts[i * 2 * c + j];
  for (int64_t j = 0; j < c; ++j) {
    first[j] = static_cast<A>(total[j] / size);
    second[j] = static_cast<A>(total[c + j] / size);
  }
}

// Every pixel as a row of A where it lies, or, when its channels are not adjacent, a copy with adjacent ones.
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
           at::TensorList params, const at::Tensor& dx, bool stats)
      : call_(call), x_(x), params_(params), dx_(dx), stats_(stats), correction_(call.groups, call.c) {
    for (const auto& d : douts) douts_.emplace_back(d);
  }

  std::vector<at::Tensor> by_pattern(const int32_t* order, const int32_t* offsets) {
    const int64_t c = call_.c, patterns = call_.patterns;
    std::vector<at::Tensor> sums;
    for (int64_t m = 0; m < call_.outputs; ++m)
      sums.push_back(empty({patterns, 2 * c}, params_[m].options().dtype(c10::CppTypeToScalarType<A>::value)));
    sum_patterns(order, offsets, sums);
    if (stats_) sum_channels(offsets, sums);
    pixel_pass<false>({}, View(dx_), nullptr, 1);
    std::vector<at::Tensor> result{dx_};
    for (int64_t m = 0; m < call_.outputs; ++m) result.push_back(sums[m].to(params_[m].scalar_type()));
    return result;
  }

  std::vector<at::Tensor> by_pixel() {
    std::vector<at::Tensor> result{dx_};
    std::vector<View> dparams;
    for (const auto& p : params_) {
      result.push_back(empty(p.sizes(), p.options().memory_format(at::MemoryFormat::ChannelsLast)));
      dparams.emplace_back(result.back());
    }
    const View dx(dx_);
    if (!stats_) {
      pixel_pass<true>(dparams, dx, nullptr, 1);
      return result;
    }
    const bool in_place = dx.template direct<A>();
    const at::Tensor weighted =
        in_place
            ? dx_
            : empty(
                  x_.sizes(),
                  x_.options().dtype(c10::CppTypeToScalarType<A>::value).memory_format(at::MemoryFormat::ChannelsLast));
    const int64_t block = std::max<int64_t>(1, 512 / call_.w);  // rows of x summed in sequence
    const int64_t blocks = (call_.h + block - 1) / block;
    const auto parts = buffer<A>(call_.n * blocks * 2 * call_.c);
    pixel_pass<true>(dparams, View(weighted), parts.get(), block);
    const int64_t each = call_.groups == 1 ? call_.n * blocks : blocks;
    for (int64_t g = 0; g < call_.groups; ++g)
      combine(parts.get() + g * each * 2 * call_.c, each, call_.c, pixels_per_group(), first(g), second(g));
    corrected(View(weighted), dx);
    return result;
  }

 private:
  static constexpr int64_t kAhead = 8, kPrefetched = 1024;  // pixels; bytes of each

  const ModulationCall<A>& call_;
  const at::Tensor& x_;
  at::TensorList params_;
  const at::Tensor& dx_;
  bool stats_;
  std::vector<View> douts_;
  Correction<A> correction_;

  A* first(int64_t g) { return correction_.first.data() + g * call_.c; }
  A* second(int64_t g) { return correction_.second.data() + g * call_.c; }
  double pixels_per_group() const {
    return static_cast<double>(call_.n) * call_.h * call_.w / static_cast<double>(call_.groups);
  }

  // sums[m] [P, 2C] = Σ over each pattern's pixels of [dz·xhat | dz].
  void sum_patterns(const int32_t* order, const int32_t* offsets, const std::vector<at::Tensor>& sums) {
    const int64_t c = call_.c, r = call_.r, outputs = call_.outputs, width = 2 * c;
    const Pieces pieces(offsets, call_.patterns);
    const auto partial = buffer<A>(outputs * pieces.slots * width);
    at::parallel_for(0, pieces.groups(), 1, [&](int64_t begin, int64_t end) {
      const auto scratch = buffer<A>(4 * (outputs + 1) * c);
      for (int64_t i = pieces.group[begin]; i < pieces.group[end]; ++i) {
        const auto& piece = pieces.pieces[i];
        A* target[2];
        for (int64_t m = 0; m < outputs; ++m) {
          target[m] = piece.slot < 0 ? sums[m].template data_ptr<A>() + piece.segment * width
                                     : partial.get() + (m * pieces.slots + piece.slot) * width;
          std::fill_n(target[m], width, A(0));
        }
        const int64_t ahead = std::min(call_.n * call_.h * r * call_.w * r - piece.end, kAhead);
        sum_piece(order + piece.begin, piece.end - piece.begin, ahead, piece.segment, scratch.get(), target);
      }
    });
    for (int64_t m = 0; m < outputs; ++m)
      add_split(pieces, partial.get() + m * pieces.slots * width, sums[m].template data_ptr<A>(), width);
  }

  // Where an output lies.
  struct Place {
    int64_t image, y, x;
  };

  Place place(int32_t position) const {
    const uint32_t width = call_.w * call_.r, height = call_.h * call_.r, row = position / width;
    return {row / height, row % height, position % width};
  }

  // The pixels of a pattern are scattered: ask for them before they are needed.
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

  // ahead: how many more positions follow those of the piece.
  void sum_piece(const int32_t* positions, int64_t count, int64_t ahead, int64_t pattern, A* scratch,
                 A* const* target) {
    const int64_t c = call_.c, shift = call_.r - 1;  // r is 1 or 2
    int64_t i = 0;
    while (i < count) {
      // Up to four pixels at once; where each sample has its own statistics, of one sample.
      const A *x[4], *dout[2][4];
      const int64_t most = std::min<int64_t>(4, count - i);
      int64_t group = 0, taken = 0;
      for (; taken < most; ++taken) {
        const Place at = place(positions[i + taken]);
        if (taken == 0) group = call_.group(at.image);
        if (call_.group(at.image) != group) break;
        if (i + taken + kAhead < count + ahead) prefetch(positions[i + taken + kAhead]);
        x[taken] = load_tile(call_.x, at.image, at.y >> shift, at.x >> shift, 1, scratch + taken * c).data;
        for (int64_t m = 0; m < call_.outputs; ++m)
          dout[m][taken] = load_tile(douts_[m], at.image, at.y, at.x, 1, scratch + (4 * (m + 1) + taken) * c).data;
      }
      for (int64_t m = 0; m < call_.outputs; ++m)
        add_pixels(x, dout[m], taken, call_.mean + group * c, call_.rstd + group * c, call_.tables[m] + pattern * 2 * c,
                   call_.slopes[m], c, target[m], target[m] + c);
      i += taken;
    }
  }

  // Sums over patterns, in pieces of the patterns of one image.
  void sum_channels(const int32_t* offsets, const std::vector<at::Tensor>& sums) {
    constexpr int64_t kPiece = 128;
    const int64_t c = call_.c, patterns = call_.patterns;
    const int64_t image_pixels = call_.h * call_.r * call_.w * call_.r;
    for (int64_t g = 0; g < call_.groups; ++g) {
      const auto bound = [&](int64_t position) -> int64_t {
        return std::lower_bound(offsets, offsets + patterns, position) - offsets;
      };
      const int64_t begin = call_.groups == 1 ? 0 : bound(g * image_pixels);
      const int64_t end = call_.groups == 1 ? patterns : bound((g + 1) * image_pixels);
      const int64_t pieces = (end - begin + kPiece - 1) / kPiece;
      const auto parts = buffer<A>(pieces * 2 * c);
      at::parallel_for(0, pieces, std::max<int64_t>(1, 65536 / (kPiece * c)), [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) {
          A* part = parts.get() + i * 2 * c;
          std::fill_n(part, 2 * c, A(0));
          const int64_t start = begin + i * kPiece, count = std::min(kPiece, end - start);
          for (int64_t m = 0; m < call_.outputs; ++m)
            add_patterns(call_.tables[m] + start * 2 * c, sums[m].template const_data_ptr<A>() + start * 2 * c, count,
                         c, part, part + c);
        }
      });
      combine(parts.get(), pieces, c, pixels_per_group(), first(g), second(g));
    }
  }

  template <typename Body>
  void for_tiles(int64_t block, const Body& body) {  // body(thread-local state per range, image, y, from, count, block)
    const int64_t blocks = (call_.h + block - 1) / block, tile = call_.tile();
    const int64_t grain = std::max<int64_t>(1, 32768 / (block * call_.w * call_.r * call_.r * call_.c));
    at::parallel_for(0, call_.n * blocks, grain, [&](int64_t begin, int64_t end) {
      auto run = body();
      for (int64_t b = begin; b < end; ++b) {
        const int64_t image = b / blocks, top = b % blocks * block;
        for (int64_t y = top; y < std::min(top + block, call_.h); ++y)
          for (int64_t from = 0; from < call_.w; from += tile)
            run(b, image, y, from, std::min(tile, call_.w - from), y == top && from == 0);
      }
    });
  }

  // One pass over the pixels: dx; and, for parameters by pixel, dparams. With parts [blocks, 2C], weighted instead of
  // dx, and the sums of it over blocks of `block` rows.
  template <bool dense>
  void pixel_pass(const std::vector<View>& dparams, const View& target, A* parts, int64_t block) {
    const int64_t c = call_.c, r = call_.r, tile = call_.tile(), rows = call_.outputs * r;
    for_tiles(block, [&] {
      return
          [&, x_rows = buffer<A>(tile * c), dout_rows = buffer<A>(tile * r * c), sum_rows = buffer<A>(tile * c),
           out_rows = buffer<A>(tile * c), p_rows = buffer<A>(tile * r * 2 * c), dp_rows = buffer<A>(tile * r * 2 * c)](
              int64_t b, int64_t image, int64_t y, int64_t from, int64_t count, bool fresh) {
            const int64_t g = call_.group(image);
            const Pixels<A> in{load_tile(call_.x, image, y, from, count, x_rows.get()), call_.mean + g * c,
                               call_.rstd + g * c, first(g), second(g)};
            const auto out = start_tile(target, image, y, from, out_rows.get());
            const Tile<A> weighted = parts ? out : Tile<A>{sum_rows.get(), c};
            for (int64_t i = 0; i < rows; ++i) {
              const int64_t m = i / r, top = y * r + i % r, left = from * r;
              const auto params = tile_params(call_, m, image, top, left, count * r, p_rows.get());
              const auto dout = load_tile(douts_[m], image, top, left, count * r, dout_rows.get());
              Tile<A> dp{nullptr, 0};
              if constexpr (dense) dp = start_tile(dparams[m], image, top, left, dp_rows.get());
              const auto add = choose_add_outputs<dense, A>(r, i == 0, i == rows - 1 && !parts);
              add(in, params, dout, count, c, call_.slopes[m], weighted, dp, out);
              if constexpr (dense) finish_tile(dparams[m], image, top, left, count * r, dp_rows.get());
            }
            if (parts) {
              A* part = parts + b * 2 * c;
              if (fresh) std::fill_n(part, 2 * c, A(0));
              add_sums(in, Tile<const A>{out.data, out.stride}, count, c, part, part + c);
            }
            finish_tile(target, image, y, from, count, out_rows.get());
          };
    });
  }

  // dx from weighted, which may be dx itself.
  void corrected(const View& weighted, const View& dx) {
    const int64_t c = call_.c, tile = call_.tile();
    for_tiles(1, [&] {
      return [&, x_rows = buffer<A>(tile * c), value_rows = buffer<A>(tile * c), dx_rows = buffer<A>(tile * c)](
                 int64_t, int64_t image, int64_t y, int64_t from, int64_t count, bool) {
        const int64_t g = call_.group(image);
        const Pixels<A> in{load_tile(call_.x, image, y, from, count, x_rows.get()), call_.mean + g * c,
                           call_.rstd + g * c, first(g), second(g)};
        const auto value = load_tile(weighted, image, y, from, count, value_rows.get());
        correct(in, value, count, c, start_tile(dx, image, y, from, dx_rows.get()));
        finish_tile(dx, image, y, from, count, dx_rows.get());
      };
    });
  }
};

template <typename A>
std::vector<at::Tensor> backward(at::TensorList douts, const at::Tensor& x, const Optional& mean, const Optional& rstd,
                                 at::TensorList params, const Optional& ids, const Optional& order,
                                 const Optional& offsets, at::ArrayRef<double> slopes, int64_t upsample, bool stats) {
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
  // By pattern, pixels are visited in any order: they must be rows.
  const at::Tensor rows = ids ? with_rows<A>(x) : x;
  std::vector<at::Tensor> upstream;
  for (const auto& d : douts) upstream.push_back(ids ? with_rows<A>(d) : d);
  const ModulationCall<A> call(rows, mean, rstd, params, ids, slopes, upsample);
  Backward<A> work(call, rows, upstream, params, dx, stats && mean.has_value());
  if (!ids) return work.by_pixel();
  const int64_t positions = ids->numel(), patterns = call.patterns;
  at::Tensor positions_of, limits;
  TORCH_CHECK(positions < (int64_t{1} << 31), "modulation_backward: at most 2**31 - 1 outputs a channel by pattern");
  if (order && offsets) {
    std::tie(positions_of, limits) =
        checked_segments("modulation_backward: order and offsets", "ids", *order, *offsets, positions, patterns);
  } else {
    positions_of = at::empty({positions}, ids->options().dtype(at::kInt));
    limits = at::empty({patterns + 1}, positions_of.options());
    sort_positions(call.ids, positions, patterns, positions_of.data_ptr<int32_t>(), limits.data_ptr<int32_t>());
  }
  return work.by_pattern(positions_of.const_data_ptr<int32_t>(), limits.const_data_ptr<int32_t>());
}

std::vector<at::Tensor> modulation_backward(at::TensorList douts, const at::Tensor& x, const Optional& mean,
                                            const Optional& rstd, at::TensorList params, const Optional& ids,
                                            const Optional& order, const Optional& offsets, at::ArrayRef<double> slopes,
                                            int64_t upsample, bool stats) {
  const auto run = x.scalar_type() == at::kDouble ? backward<double> : backward<float>;
  return run(douts, x, mean, rstd, params, ids, order, offsets, slopes, upsample, stats);
}

TORCH_LIBRARY_IMPL(spade_fast_native, CPU, m) { m.impl("modulation_backward", modulation_backward); }

}  // namespace
}  // namespace spade_fast::cpu
