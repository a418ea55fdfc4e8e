// SPDX-License-Identifier: Apache-2.0
// modulation: normalize, scale and shift by pattern or by pixel, LeakyReLU and nearest ×r. x is read once.
#include <torch/library.h>

#include "modulation.h"

namespace spade_fast::cpu {
namespace {

// out[i] = leaky_relu(xhat * (1 + gamma) + beta), with xhat of pixel i / r of x.
template <typename A>
SPADE_FAST_CLONES void modulate(Tile<const A> x, const A* mean, const A* rstd, TileParams<A> params, Tile<A> out,
                                int64_t count, int64_t r, int64_t c, A slope) {
  for (int64_t i = 0; i < count; ++i) {
    const A *from = x.data + (r == 1 ? i : i / r) * x.stride, *gamma = params.row(i), *beta = gamma + c;
    A* __restrict to = out.data + i * out.stride;
    SPADE_FAST_INDEPENDENT
    for (int64_t j = 0; j < c; ++j) {
      const A xhat = (from[j] - mean[j]) * rstd[j];
      const A z = xhat * gamma[j] + (xhat + beta[j]);
      const A low = z * slope;
      to[j] = z > 0 ? z : low;
    }
  }
}

template <typename A>
std::vector<at::Tensor> forward(const ModulationCall<A>& call, const at::Tensor& x) {
  const int64_t c = call.c, r = call.r, w = call.w, tile = call.tile(), per_row = call.tiles_per_row();
  std::vector<at::Tensor> outs;
  std::vector<View> views;
  for (int64_t output = 0; output < call.outputs; ++output) {
    outs.push_back(empty({call.n, c, call.h * r, w * r}, x.options().memory_format(memory_format(x))));
    views.emplace_back(outs.back());
  }
  if (x.numel() == 0) return outs;
  const int64_t grain = std::max<int64_t>(1, 32768 / (tile * r * r * c));
  at::parallel_for(0, call.n * call.h * per_row, grain, [&](int64_t first, int64_t last) {
    const auto x_rows = buffer<A>(tile * c), out_rows = buffer<A>(tile * r * c), p_rows = buffer<A>(tile * r * 2 * c);
    for (int64_t t = first; t < last; ++t) {
      const int64_t row = t / per_row, image = row / call.h, y = row % call.h;
      const int64_t from = t % per_row * tile, count = std::min(tile, w - from);
      const auto source = load_tile(call.x, image, y, from, count, x_rows.get());
      const A *mean = call.mean + call.group(image) * c, *rstd = call.rstd + call.group(image) * c;
      for (int64_t output = 0; output < call.outputs; ++output)
        for (int64_t dy = 0; dy < r; ++dy) {
          const int64_t top = y * r + dy, left = from * r;
          const auto params = tile_params(call, output, image, top, left, count * r, p_rows.get());
          const auto out = start_tile(views[output], image, top, left, out_rows.get());
          modulate(source, mean, rstd, params, out, count * r, r, c, call.slopes[output]);
          finish_tile(views[output], image, top, left, count * r, out_rows.get());
        }
    }
  });
  return outs;
}

std::vector<at::Tensor> modulation(const at::Tensor& x, const Optional& mean, const Optional& rstd,
                                   at::TensorList params, const Optional& pattern_ids, const Optional& /*order*/,
                                   const Optional& /*offsets*/, at::ArrayRef<double> slopes, int64_t upsample,
                                   bool /*stats_from_x*/) {
  if (x.scalar_type() == at::kDouble)
    return forward(ModulationCall<double>(x, mean, rstd, params, pattern_ids, slopes, upsample), x);
  return forward(ModulationCall<float>(x, mean, rstd, params, pattern_ids, slopes, upsample), x);
}

TORCH_LIBRARY_IMPL(spade_fast_native, CPU, m) { m.impl("modulation", modulation); }

}  // namespace
}  // namespace spade_fast::cpu
