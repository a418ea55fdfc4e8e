// SPDX-License-Identifier: Apache-2.0
// modulation_backward. By pattern: the gradient of the parameters as sums over each pattern's pixels, the sums that
// normalisation's gradient needs as sums over patterns, then dx in one pass over the pixels. By pixel: one pass for the
// parameters' gradient and the sums, a second for dx where it depends on them.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <numeric>

#include "cpu_modulation.h"

namespace spade_fast::cpu {
namespace {

// What normalisation's gradient needs, [groups, C]: of dz·(1 + gamma) and of dz·(1 + gamma)·xhat, mean per pixel of x.
// 0 when mean and rstd are constants.
template <typename A>
struct Correction {
  std::vector<A> first, second;

  Correction(int64_t groups, int64_t c) : first(groups * c, A(0)), second(groups * c, A(0)) {}
};

// dgamma += Σ dz·xhat, dbeta += Σ dz over up to four pixels of one pattern.
template <typename A>
inline __attribute__((always_inline)) void add_gradients(const A* const* x, const A* const* dout, int64_t count,
    const A* mean, const A* rstd, const A* params, A slope, int64_t c, A* __restrict dgamma, A* __restrict dbeta) {
  for (int64_t j = 0; j < c; ++j) {
    A dg = dgamma[j], db = dbeta[j];
    for (int64_t i = 0; i < count; ++i) {
      const A xhat = (x[i][j] - mean[j]) * rstd[j];
      const A z = xhat * params[j] + (xhat + params[c + j]);
      const A low = dout[i][j] * slope;
      const A dz = z > 0 ? dout[i][j] : low;
      dg += dz * xhat;
      db += dz;
    }
    dgamma[j] = dg;
    dbeta[j] = db;
  }
}

template <typename A>
SPADE_FAST_CLONES void add_pixel(const A* const* x, const A* const* dout, const A* mean, const A* rstd,
                                 const A* params, A slope, int64_t c, A* dgamma, A* dbeta) {
  add_gradients(x, dout, 1, mean, rstd, params, slope, c, dgamma, dbeta);
}

template <typename A>
SPADE_FAST_CLONES void add_four_pixels(const A* const* x, const A* const* dout, const A* mean, const A* rstd,
                                       const A* params, A slope, int64_t c, A* dgamma, A* dbeta) {
  add_gradients(x, dout, 4, mean, rstd, params, slope, c, dgamma, dbeta);
}

// weighted[i / r] (+)= dz·(1 + gamma) of output i: the part of dx / rstd that does not go through the statistics.
template <typename A>
SPADE_FAST_CLONES void add_weighted(Tile<const A> x, const A* mean, const A* rstd, TileParams<A> params,
                                    Tile<const A> dout, int64_t count, int64_t r, int64_t c, A slope, bool assign,
                                    A* weighted) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t pixel = r == 1 ? i : i / r;
    const A *from = x.data + pixel * x.stride, *upstream = dout.data + i * dout.stride;
    const A *gamma = params.row(i), *beta = gamma + c;
    A* __restrict to = weighted + pixel * c;
    if (assign && i % r == 0)
      for (int64_t j = 0; j < c; ++j) to[j] = 0;
    for (int64_t j = 0; j < c; ++j) {
      const A xhat = (from[j] - mean[j]) * rstd[j];
      const A z = xhat * gamma[j] + (xhat + beta[j]);
      const A low = upstream[j] * slope;
      const A dz = z > 0 ? upstream[j] : low;
      to[j] += dz * gamma[j] + dz;
    }
  }
}

// The same, and the parameters' gradient [dz·xhat | dz] of every output.
template <typename A>
SPADE_FAST_CLONES void add_weighted_dense(Tile<const A> x, const A* mean, const A* rstd, TileParams<A> params,
                                          Tile<const A> dout, int64_t count, int64_t r, int64_t c, A slope,
                                          bool assign, A* weighted, Tile<A> dparams) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t pixel = r == 1 ? i : i / r;
    const A *from = x.data + pixel * x.stride, *upstream = dout.data + i * dout.stride;
    const A *gamma = params.row(i), *beta = gamma + c;
    A *__restrict to = weighted + pixel * c, *__restrict dgamma = dparams.data + i * dparams.stride;
    A* __restrict dbeta = dgamma + c;
    if (assign && i % r == 0)
      for (int64_t j = 0; j < c; ++j) to[j] = 0;
    for (int64_t j = 0; j < c; ++j) {
      const A xhat = (from[j] - mean[j]) * rstd[j];
      const A z = xhat * gamma[j] + (xhat + beta[j]);
      const A low = upstream[j] * slope;
      const A dz = z > 0 ? upstream[j] : low;
      dgamma[j] = dz * xhat;
      dbeta[j] = dz;
      to[j] += dz * gamma[j] + dz;
    }
  }
}

// first += Σ weighted, second += Σ weighted·xhat
template <typename A>
SPADE_FAST_CLONES void add_sums(Tile<const A> x, const A* mean, const A* rstd, const A* weighted, int64_t count,
                                int64_t c, A* __restrict first, A* __restrict second) {
  for (int64_t i = 0; i < count; ++i) {
    const A *from = x.data + i * x.stride, *value = weighted + i * c;
    for (int64_t j = 0; j < c; ++j) {
      first[j] += value[j];
      second[j] += value[j] * ((from[j] - mean[j]) * rstd[j]);
    }
  }
}

// dx = rstd·(weighted - first - xhat·second)
template <typename A>
SPADE_FAST_CLONES void correct(Tile<const A> x, const A* mean, const A* rstd, const A* first, const A* second,
                               Tile<const A> weighted, int64_t count, int64_t c, Tile<A> dx) {
  for (int64_t i = 0; i < count; ++i) {
    const A *from = x.data + i * x.stride, *value = weighted.data + i * weighted.stride;
    A* to = dx.data + i * dx.stride;
    for (int64_t j = 0; j < c; ++j) {
      const A xhat = (from[j] - mean[j]) * rstd[j];
      to[j] = (value[j] - first[j] - xhat * second[j]) * rstd[j];
    }
  }
}

// s1 += Σ (1 + gamma)·dbeta, s2 += Σ (1 + gamma)·dgamma over `count` patterns.
template <typename A>
SPADE_FAST_CLONES void add_patterns(
    const A* params, const A* dparams, int64_t count, int64_t c, A* __restrict s1, A* __restrict s2) {
  for (int64_t p = 0; p < count; ++p, params += 2 * c, dparams += 2 * c)
    for (int64_t j = 0; j < c; ++j) {
      s1[j] += params[j] * dparams[c + j] + dparams[c + j];
      s2[j] += params[j] * dparams[j] + dparams[j];
    }
}

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
  const at::Tensor copy = at::empty(
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
      sums.push_back(at::empty({patterns, 2 * c}, params_[m].options().dtype(c10::CppTypeToScalarType<A>::value)));
    sum_patterns(order, offsets, sums);
    if (stats_) sum_channels(offsets, sums);
    input_gradient();
    std::vector<at::Tensor> result{dx_};
    for (int64_t m = 0; m < call_.outputs; ++m) result.push_back(sums[m].to(params_[m].scalar_type()));
    return result;
  }

  std::vector<at::Tensor> by_pixel() {
    std::vector<at::Tensor> result{dx_};
    std::vector<View> dparams;
    for (const auto& p : params_) {
      result.push_back(at::empty(p.sizes(), p.options().memory_format(at::MemoryFormat::ChannelsLast)));
      dparams.emplace_back(result.back());
    }
    const View dx(dx_);
    if (!stats_) {
      pixel_pass(dparams, dx, nullptr, 1);
      return result;
    }
    const bool in_place = dx.template direct<A>();
    const at::Tensor weighted = in_place ? dx_ : at::empty(x_.sizes(), x_.options()
        .dtype(c10::CppTypeToScalarType<A>::value).memory_format(at::MemoryFormat::ChannelsLast));
    const int64_t block = std::max<int64_t>(1, 512 / call_.w);  // rows of x summed in sequence
    const int64_t blocks = (call_.h + block - 1) / block;
    const auto parts = buffer<A>(call_.n * blocks * 2 * call_.c);
    pixel_pass(dparams, View(weighted), parts.get(), block);
    const int64_t each = call_.groups == 1 ? call_.n * blocks : blocks;
    for (int64_t g = 0; g < call_.groups; ++g)
      combine(parts.get() + g * each * 2 * call_.c, each, call_.c, pixels_per_group(), first(g), second(g));
    corrected(View(weighted), dx);
    return result;
  }

 private:
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
    const int64_t c = call_.c, outputs = call_.outputs, width = 2 * c;
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
        sum_piece(order + piece.begin, piece.end - piece.begin, piece.segment, scratch.get(), target);
      }
    });
    for (int64_t m = 0; m < outputs; ++m)
      add_split(pieces, partial.get() + m * pieces.slots * width, sums[m].template data_ptr<A>(), width);
  }

  void sum_piece(const int32_t* positions, int64_t count, int64_t pattern, A* scratch, A* const* target) {
    const int64_t c = call_.c, r = call_.r, width = call_.w * r, height = call_.h * r;
    int64_t i = 0;
    while (i < count) {
      // Up to four pixels at once; statistics of samples: of one sample.
      const A *x[4], *dout[2][4];
      int64_t group = 0;
      const int64_t left = count - i, step = left >= 4 ? 4 : 1;
      int64_t taken = 0;
      for (; taken < step; ++taken) {
        const int64_t position = positions[i + taken], row = position / width, column = position - row * width;
        const int64_t image = row / height, y = row - image * height;
        if (taken == 0) group = call_.group(image);
        if (call_.group(image) != group) break;
        x[taken] = load_tile(call_.x, image, y / r, column / r, 1, scratch + taken * c).data;
        for (int64_t m = 0; m < call_.outputs; ++m)
          dout[m][taken] = load_tile(douts_[m], image, y, column, 1, scratch + (4 * (m + 1) + taken) * c).data;
      }
      const A *mean = call_.mean + group * c, *rstd = call_.rstd + group * c;
      for (int64_t m = 0; m < call_.outputs; ++m) {
        const A* params = call_.tables[m] + pattern * 2 * c;
        if (taken == 4)
          add_four_pixels(x, dout[m], mean, rstd, params, call_.slopes[m], c, target[m], target[m] + c);
        else
          for (int64_t k = 0; k < taken; ++k)
            add_pixel(x + k, dout[m] + k, mean, rstd, params, call_.slopes[m], c, target[m], target[m] + c);
      }
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

  // dx of parameters by pattern.
  void input_gradient() {
    const int64_t c = call_.c, r = call_.r, tile = call_.tile();
    const View dx(dx_);
    for_tiles(1, [&] {
      return [&, x_rows = buffer<A>(tile * c), dout_rows = buffer<A>(tile * r * c), dx_rows = buffer<A>(tile * c),
              weighted = buffer<A>(tile * c)](int64_t, int64_t image, int64_t y, int64_t from, int64_t count, bool) {
        const auto source = load_tile(call_.x, image, y, from, count, x_rows.get());
        const A *mean = call_.mean + call_.group(image) * c, *rstd = call_.rstd + call_.group(image) * c;
        for (int64_t m = 0; m < call_.outputs; ++m)
          for (int64_t dy = 0; dy < r; ++dy) {
            const auto params = tile_params<A>(call_, m, image, y * r + dy, from * r, count * r, nullptr);
            const auto dout = load_tile(douts_[m], image, y * r + dy, from * r, count * r, dout_rows.get());
            add_weighted(source, mean, rstd, params, dout, count * r, r, c, call_.slopes[m], m == 0 && dy == 0,
                         weighted.get());
          }
        const int64_t g = call_.group(image);
        const auto target = start_tile(dx, image, y, from, dx_rows.get());
        correct(source, mean, rstd, first(g), second(g), Tile<const A>{weighted.get(), c}, count, c, target);
        finish_tile(dx, image, y, from, count, dx_rows.get());
      };
    });
  }

  // Parameters by pixel: dparams; and weighted with the sums parts [blocks, 2C] of it, or, without parts, dx itself.
  void pixel_pass(const std::vector<View>& dparams, const View& target, A* parts, int64_t block) {
    const int64_t c = call_.c, r = call_.r, tile = call_.tile();
    for_tiles(block, [&] {
      return [&, x_rows = buffer<A>(tile * c), dout_rows = buffer<A>(tile * r * c), weighted = buffer<A>(tile * c),
              target_rows = buffer<A>(tile * c), p_rows = buffer<A>(tile * r * 2 * c),
              dp_rows = buffer<A>(tile * r * 2 * c)](
                 int64_t b, int64_t image, int64_t y, int64_t from, int64_t count, bool fresh) {
        const auto source = load_tile(call_.x, image, y, from, count, x_rows.get());
        const A *mean = call_.mean + call_.group(image) * c, *rstd = call_.rstd + call_.group(image) * c;
        for (int64_t m = 0; m < call_.outputs; ++m)
          for (int64_t dy = 0; dy < r; ++dy) {
            const int64_t top = y * r + dy, left = from * r;
            const auto params = tile_params(call_, m, image, top, left, count * r, p_rows.get());
            const auto dout = load_tile(douts_[m], image, top, left, count * r, dout_rows.get());
            const auto dp = start_tile(dparams[m], image, top, left, dp_rows.get());
            add_weighted_dense(source, mean, rstd, params, dout, count * r, r, c, call_.slopes[m], m == 0 && dy == 0,
                               weighted.get(), dp);
            finish_tile(dparams[m], image, top, left, count * r, dp_rows.get());
          }
        const auto out = start_tile(target, image, y, from, target_rows.get());
        if (parts) {
          A* part = parts + b * 2 * c;
          if (fresh) std::fill_n(part, 2 * c, A(0));
          add_sums(source, mean, rstd, weighted.get(), count, c, part, part + c);
          for (int64_t i = 0; i < count; ++i) std::copy_n(weighted.get() + i * c, c, out.data + i * out.stride);
        } else {
          correct(source, mean, rstd, first(0), second(0), Tile<const A>{weighted.get(), c}, count, c, out);
        }
        finish_tile(target, image, y, from, count, target_rows.get());
      };
    });
  }

  // dx from weighted, which may be dx itself.
  void corrected(const View& weighted, const View& dx) {
    const int64_t c = call_.c, tile = call_.tile();
    for_tiles(1, [&] {
      return [&, x_rows = buffer<A>(tile * c), value_rows = buffer<A>(tile * c), dx_rows = buffer<A>(tile * c)](
                 int64_t, int64_t image, int64_t y, int64_t from, int64_t count, bool) {
        const auto source = load_tile(call_.x, image, y, from, count, x_rows.get());
        const auto value = load_tile(weighted, image, y, from, count, value_rows.get());
        const auto target = start_tile(dx, image, y, from, dx_rows.get());
        const int64_t g = call_.group(image);
        correct(source, call_.mean + g * c, call_.rstd + g * c, first(g), second(g), value, count, c, target);
        finish_tile(dx, image, y, from, count, dx_rows.get());
      };
    });
  }
};

template <typename A>
std::vector<at::Tensor> backward(
    at::TensorList douts, const at::Tensor& x, const Optional& mean, const Optional& rstd, at::TensorList params,
    const Optional& ids, const Optional& order, const Optional& offsets, at::ArrayRef<double> slopes,
    int64_t upsample, bool stats) {
  const at::Tensor dx = at::empty(x.sizes(), x.options().memory_format(memory_format(x)));
  TORCH_CHECK(douts.size() == params.size(), "modulation_backward: expected ", params.size(), " douts, got ",
              douts.size());
  for (const auto& d : douts)
    TORCH_CHECK(d.dim() == 4 && d.size(0) == x.size(0) && d.size(1) == x.size(1) &&
                    d.size(2) == x.size(2) * upsample && d.size(3) == x.size(3) * upsample,
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
    TORCH_CHECK(order->numel() == positions && offsets->numel() == patterns + 1,
                "modulation_backward: order and offsets must be segments(ids, ", patterns, "), got ", order->sizes(),
                " and ", offsets->sizes());
    positions_of = order->to(at::kInt).contiguous();
    limits = offsets->to(at::kInt).contiguous();
    int32_t least, most;
    range(positions_of.const_data_ptr<int32_t>(), positions, &least, &most);
    const auto* limit = limits.const_data_ptr<int32_t>();
    TORCH_CHECK_INDEX(least >= 0 && most < positions && limit[0] >= 0 && limit[patterns] <= positions &&
                          std::is_sorted(limit, limit + patterns + 1),
                      "modulation_backward: order and offsets are not segments(ids, ", patterns, ")");
  } else {
    positions_of = at::empty({positions}, ids->options().dtype(at::kInt));
    limits = at::empty({patterns + 1}, positions_of.options());
    sort_positions(call.ids, positions, patterns, positions_of.data_ptr<int32_t>(), limits.data_ptr<int32_t>());
  }
  return work.by_pattern(positions_of.const_data_ptr<int32_t>(), limits.const_data_ptr<int32_t>());
}

std::vector<at::Tensor> modulation_backward(
    at::TensorList douts, const at::Tensor& x, const Optional& mean, const Optional& rstd, at::TensorList params,
    const Optional& ids, const Optional& order, const Optional& offsets, at::ArrayRef<double> slopes,
    int64_t upsample, bool stats) {
  const auto run = x.scalar_type() == at::kDouble ? backward<double> : backward<float>;
  return run(douts, x, mean, rstd, params, ids, order, offsets, slopes, upsample, stats);
}

TORCH_LIBRARY_IMPL(spade_fast_native, CPU, m) { m.impl("modulation_backward", modulation_backward); }

}  // namespace
}  // namespace spade_fast::cpu
