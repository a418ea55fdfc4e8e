// SPDX-License-Identifier: Apache-2.0
// The passes of modulation_backward over the pixels of x, in tiles of a row.
#pragma once

#include "modulation_backward_rows.h"

namespace spade_fast::cpu {
namespace {

// What normalization's gradient needs, [groups, C]: the means over a group's pixels of dz·(1 + gamma) and of
// dz·(1 + gamma)·xhat. Both are 0 when mean and rstd are constants.
template <typename A>
struct Correction {
  int64_t channels;
  std::vector<A> means, means_with_xhat;

  Correction(int64_t groups, int64_t c) : channels(c), means(groups * c, A(0)), means_with_xhat(groups * c, A(0)) {}

  const A* first(int64_t group) const { return means.data() + group * channels; }
  const A* second(int64_t group) const { return means_with_xhat.data() + group * channels; }

  // Sets a group's means from partial sums parts [count, 2C], added in order, over `pixels` pixels.
  void set(int64_t group, const A* parts, int64_t count, double pixels) {
    std::vector<double> total(2 * channels, 0.0);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < 2 * channels; ++j) total[j] += parts[i * 2 * channels + j];
    for (int64_t j = 0; j < channels; ++j) {
      means[group * channels + j] = static_cast<A>(total[j] / pixels);
      means_with_xhat[group * channels + j] = static_cast<A>(total[channels + j] / pixels);
    }
  }
};

// `count` pixels of x in one row.
struct PixelTile {
  int64_t image, y, from, count;
};

// What a pass writes.
template <typename A>
struct PassOutputs {
  View target;                // dx; with block_sums, `weighted` instead
  std::vector<View> dparams;  // by pixel only
  A* block_sums = nullptr;    // [blocks, 2C]: Σ weighted and Σ weighted·xhat over blocks of rows
  int64_t block_rows = 1;     // rows of x in a block
};

template <typename A>
class PixelPasses {
 public:
  PixelPasses(const ModulationCall<A>& call, const std::vector<View>& douts, const Correction<A>& correction)
      : call_(call), douts_(douts), correction_(correction) {}

  // dx through the outputs, and, for parameters by pixel (`dense`), dparams.
  template <bool dense>
  void through_outputs(const PassOutputs<A>& to) const {
    for_tiles(to.block_rows, [&](Buffers& buffers, const PixelTile& at, int64_t block, bool first_of_block) {
      const Pixels<A> pixels = load_pixels(at, buffers);
      const Tile<A> target = start_tile(to.target, at.image, at.y, at.from, buffers.target.get());
      const Tile<A> weighted = to.block_sums ? target : Tile<A>{buffers.weighted.get(), call_.c};
      add_tile<dense>(to, at, buffers, pixels, weighted, target);
      if (to.block_sums) {
        A* sums = to.block_sums + block * 2 * call_.c;
        if (first_of_block) std::fill_n(sums, 2 * call_.c, A(0));
        add_sums(pixels, Tile<const A>{target.data, target.stride}, at.count, call_.c, sums, sums + call_.c);
      }
      finish_tile(to.target, at.image, at.y, at.from, at.count, buffers.target.get());
    });
  }

  // dx = rstd·(weighted - first - xhat·second). `weighted` may be dx itself.
  void through_statistics(const View& weighted, const View& dx) const {
    for_tiles(1, [&](Buffers& buffers, const PixelTile& at, int64_t, bool) {
      const Pixels<A> pixels = load_pixels(at, buffers);
      const auto value = load_tile(weighted, at.image, at.y, at.from, at.count, buffers.weighted.get());
      correct(pixels, value, at.count, call_.c, start_tile(dx, at.image, at.y, at.from, buffers.target.get()));
      finish_tile(dx, at.image, at.y, at.from, at.count, buffers.target.get());
    });
  }

 private:
  // A thread's rows for pixels that can not be used where they lie.
  struct Buffers {
    std::unique_ptr<A[]> x, dout, weighted, target, params, dparams;

    explicit Buffers(const ModulationCall<A>& call) {
      const int64_t size = call.tile() * call.c;
      x = buffer<A>(size), weighted = buffer<A>(size), target = buffer<A>(size);
      dout = buffer<A>(size * call.r), params = buffer<A>(size * call.r * 2), dparams = buffer<A>(size * call.r * 2);
    }
  };

  // Calls use(buffers, tile, block, whether the tile is the first of its block) for all tiles of x. A block is
  // `block_rows` rows of an image; one thread goes through it in order.
  template <typename Use>
  void for_tiles(int64_t block_rows, const Use& use) const {
    const int64_t blocks = (call_.h + block_rows - 1) / block_rows, tile = call_.tile();
    const int64_t grain = std::max<int64_t>(1, 32768 / (block_rows * call_.w * call_.r * call_.r * call_.c));
    at::parallel_for(0, call_.n * blocks, grain, [&](int64_t begin, int64_t end) {
      Buffers buffers(call_);
      for (int64_t block = begin; block < end; ++block) {
        const int64_t image = block / blocks, top = block % blocks * block_rows;
        for (int64_t y = top; y < std::min(top + block_rows, call_.h); ++y)
          for (int64_t from = 0; from < call_.w; from += tile) {
            const PixelTile at{image, y, from, std::min(tile, call_.w - from)};
            use(buffers, at, block, y == top && from == 0);
          }
      }
    });
  }

  Pixels<A> load_pixels(const PixelTile& at, Buffers& buffers) const {
    const int64_t group = call_.group(at.image);
    return {load_tile(call_.x, at.image, at.y, at.from, at.count, buffers.x.get()), call_.mean + group * call_.c,
            call_.rstd + group * call_.c, correction_.first(group), correction_.second(group)};
  }

  // Adds what goes through the outputs of one tile, a row of one output tensor at a time. The last row completes dx.
  template <bool dense>
  void add_tile(const PassOutputs<A>& to, const PixelTile& at, Buffers& buffers, const Pixels<A>& pixels,
                Tile<A> weighted, Tile<A> dx) const {
    const int64_t r = call_.r, rows = call_.outputs * r, left = at.from * r, count = at.count * r;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t output = row / r, y = at.y * r + row % r;
      const auto params = tile_params(call_, output, at.image, y, left, count, buffers.params.get());
      const auto dout = load_tile(douts_[output], at.image, y, left, count, buffers.dout.get());
      Tile<A> dparams{nullptr, 0};
      if constexpr (dense) dparams = start_tile(to.dparams[output], at.image, y, left, buffers.dparams.get());
      const auto add = choose_add_outputs<dense, A>(r, row == 0, row == rows - 1 && !to.block_sums);
      add(pixels, params, dout, at.count, call_.c, call_.slopes[output], weighted, dparams, dx);
      if constexpr (dense) finish_tile(to.dparams[output], at.image, y, left, count, buffers.dparams.get());
    }
  }

  const ModulationCall<A>& call_;
  const std::vector<View>& douts_;
  const Correction<A>& correction_;
};

}  // namespace
}  // namespace spade_fast::cpu
