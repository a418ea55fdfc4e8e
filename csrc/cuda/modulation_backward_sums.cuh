// SPDX-License-Identifier: Apache-2.0
// Pass 1 of modulation's backward: the gradients of the parameters, and s1 and s2 of each channel.
// modulation_backward.cu defines the two sums.
#pragma once

#include "modulation.cuh"
#include "reduce.cuh"
#include "segment_sums.cuh"

namespace spade_fast {
namespace {

// dz: the gradient before LeakyReLU, at z = xhat·scale + beta.
__device__ __forceinline__ float gate(float dout, float xhat, float scale, float beta, float slope) {
  return xhat * scale + beta > 0.0f ? dout : dout * slope;
}

// ---- pass 1, by patterns ----

// scale = 1 + gamma and beta of pattern `key` for VEC channels.
template <typename P, int VEC>
__device__ __forceinline__ void load_pattern(const P* params, int32_t key, uint32_t c, uint32_t column,
                                             float (&scale)[VEC], float (&beta)[VEC]) {
  Vector<P, VEC> gammas, betas;
  const P* const from = params + int64_t(key) * 2 * c + column;
  gammas.load(from);
  betas.load(from + c);
#pragma unroll
  for (int i = 0; i < VEC; ++i) scale[i] = 1.0f + gammas.get(i), beta[i] = betas.get(i);
}

// [dgamma | dbeta] of each output by pattern, over a piece of the sorted positions. A thread has VEC channels.
template <typename T, typename P, int VEC, int OUTPUTS>
__global__ void __launch_bounds__(kThreads, 2)
    pattern_sums_kernel(ModulationInputs<T, P> a, const T* dout0, const T* dout1, const int32_t* order,
                        FastDiv by_image, FastDiv by_wo, SegmentSums to, RowTiling tiling) {
  constexpr int kAhead = OUTPUTS == 1 ? 4 : 2;
  const uint32_t row = tiling.row(), column = tiling.vector(row) * VEC;
  const uint32_t index = blockIdx.x * tiling.rows + row;
  if (row >= tiling.rows || column >= a.c || index >= to.pieces) return;
  Piece piece(to, index, column == 0);

  float dgamma[OUTPUTS][VEC], dbeta[OUTPUTS][VEC], scale[OUTPUTS][VEC], beta[OUTPUTS][VEC], mean[VEC], rstd[VEC];
  load_or(mean, a.mean == nullptr ? nullptr : a.mean + column, 0.0f);
  load_or(rstd, a.mean == nullptr ? nullptr : a.rstd + column, 1.0f);
  int32_t current = -1;
  uint32_t group = 0;
  const auto flush = [&] {
    piece.open(current);
#pragma unroll
    for (int output = 0; output < OUTPUTS; ++output) {
      piece.store(output * to.width + column, dgamma[output]);
      piece.store(output * to.width + a.c + column, dbeta[output]);
    }
  };

  const int64_t last = piece.last - 1;
  int32_t next[kAhead];
#pragma unroll
  for (int j = 0; j < kAhead; ++j) next[j] = __ldg(order + min(piece.first + j, last));
  for (int64_t i = piece.first; i <= last; i += kAhead) {
    int32_t key[kAhead];
    uint32_t image[kAhead];
    Vector<T, VEC> x[kAhead], dout[OUTPUTS][kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const uint32_t entry = uint32_t(next[j]);
      key[j] = i + j <= last ? __ldg(a.pattern_ids + entry) : -1;
      int64_t pixel = entry;
      image[j] = 0;
      if (a.upsample != 1 || a.group_stride != 0) {
        const uint32_t n = by_image.div(entry), rest = entry - n * by_image.divisor;
        image[j] = n;
        const uint32_t y = by_wo.div(rest), xx = rest - y * by_wo.divisor;
        if (a.upsample != 1) pixel = int64_t(n) * a.pixels + (y >> 1) * a.w + (xx >> 1);
      }
      x[j].load(a.x + pixel * a.c + column);
      dout[0][j].load(dout0 + int64_t(entry) * a.c + column);
      if (OUTPUTS == 2) dout[OUTPUTS - 1][j].load(dout1 + int64_t(entry) * a.c + column);
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) next[j] = __ldg(order + min(i + kAhead + j, last));
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (key[j] < 0) continue;
      if (key[j] != current) {
        if (current >= 0) flush();
        current = key[j];
#pragma unroll
        for (int output = 0; output < OUTPUTS; ++output) {
          fill(dgamma[output], 0.0f);
          fill(dbeta[output], 0.0f);
          load_pattern(a.params(output), current, a.c, column, scale[output], beta[output]);
        }
      }
      if (a.group_stride != 0 && image[j] != group) {
        group = image[j];
        load_or(mean, a.mean + group * a.group_stride + column, 0.0f);
        load_or(rstd, a.rstd + group * a.group_stride + column, 1.0f);
      }
#pragma unroll
      for (int v = 0; v < VEC; ++v) {
        const float xhat = (x[j].get(v) - mean[v]) * rstd[v];
#pragma unroll
        for (int output = 0; output < OUTPUTS; ++output) {
          const float dz = gate(dout[output][j].get(v), xhat, scale[output][v], beta[output][v], a.slope(output));
          dgamma[output][v] += dz * xhat;
          dbeta[output][v] += dz;
        }
      }
    }
  }
  if (current >= 0) flush();
  piece.finish();
}

// A block (x: range of patterns, y: columns, z: group) writes dparams where the sums are elsewhere, and zeros for patterns
// without pixels. If parts [groups, ranges, 2, c] is given, the block writes its s1 and s2 to row (group, range).
template <typename P, int VEC>
__global__ void __launch_bounds__(kThreads)
    pattern_finish_kernel(const P* params0, const P* params1, const float* sums0, const float* sums1, P* dparams0,
                          P* dparams1, int outputs, uint32_t patterns, uint32_t c, const int32_t* order,
                          const int32_t* offsets, FastDiv by_image, uint32_t span, RowTiling tiling, float* parts) {
  const uint32_t row = tiling.row(), column = tiling.vector(row) * VEC;
  const uint32_t lo = blockIdx.x * span, hi = min(lo + span, patterns);
  float s1[VEC], s2[VEC];
  fill(s1, 0.0f);
  fill(s2, 0.0f);
  if (row < tiling.rows && column < c) {
    for (uint32_t p = lo + row; p < hi; p += tiling.rows) {
      const int32_t first = offsets[p];
      const bool none = first == offsets[p + 1];
      if (gridDim.z > 1) {  // all pixels of a pattern are in one image
        const uint32_t image = none ? 0 : by_image.div(uint32_t(__ldg(order + first)));
        if (image != blockIdx.z) continue;
      }
      const int64_t at = int64_t(p) * 2 * c + column;
#pragma unroll 1
      for (int output = 0; output < outputs; ++output) {
        P* const to = (output == 0 ? dparams0 : dparams1) + at;
        const float* const from = (output == 0 ? sums0 : sums1) + at;
        float dgamma[VEC], dbeta[VEC];
        if (none) {
          fill(dgamma, 0.0f);
          fill(dbeta, 0.0f);
        } else {
          load_or(dgamma, from, 0.0f);
          load_or(dbeta, from + c, 0.0f);
        }
        if (none || sizeof(P) != sizeof(float)) {
          store_floats<P, VEC>(to, dgamma);
          store_floats<P, VEC>(to + c, dbeta);
        }
        if (parts == nullptr) continue;
        Vector<P, VEC> gamma;
        gamma.load((output == 0 ? params0 : params1) + at);
#pragma unroll
        for (int v = 0; v < VEC; ++v) {
          s1[v] += (1.0f + gamma.get(v)) * dbeta[v];
          s2[v] += (1.0f + gamma.get(v)) * dgamma[v];
        }
      }
    }
  }
  if (parts == nullptr) return;
  float* const to = parts + (int64_t(blockIdx.z) * gridDim.x + blockIdx.x) * 2 * c;
  sum_block_rows(s1, tiling, c, to);
  sum_block_rows(s2, tiling, c, to + c);
}

// ---- pass 1, dense ----

// A block (x: range of an image's pixels of x, y: columns) writes dparams of its pixels and row (n, range) of parts
// [n, ranges, 2, c].
template <typename T, typename P, int VEC>
__global__ void __launch_bounds__(kThreads, 2)
    dense_sums_kernel(ModulationInputs<T, P> a, const T* dout0, const T* dout1, P* dparams0, P* dparams1, uint32_t span,
                      FastDiv by_ranges, RowTiling tiling, float* parts) {
  const uint32_t row = tiling.row(), column = tiling.vector(row) * VEC;
  const uint32_t n = by_ranges.div(blockIdx.x), lo = (blockIdx.x - n * by_ranges.divisor) * span;
  const uint32_t hi = min(lo + span, a.pixels);
  float s1[VEC], s2[VEC];
  fill(s1, 0.0f);
  fill(s2, 0.0f);
  if (row < tiling.rows && column < a.c) {
    float mean[VEC], rstd[VEC];
    const int64_t group = n * a.group_stride + column, image = int64_t(n) * a.pixels;
    load_or(mean, a.mean == nullptr ? nullptr : a.mean + group, 0.0f);
    load_or(rstd, a.mean == nullptr ? nullptr : a.rstd + group, 1.0f);
    for (uint32_t pixel = lo + row; pixel < hi; pixel += tiling.rows) {
      Vector<T, VEC> x;
      x.load(a.x + (image + pixel) * a.c + column);
      const Positions<0, 1> at(a, pixel, 1);
#pragma unroll 1
      for (int k = 0; k < at.rounds * a.outputs; ++k) {
        const int output = k >= at.rounds;
        const int64_t to = image * at.rounds + at.output(output == 0 ? k : k - at.rounds, 0);
        Vector<T, VEC> dout;
        Vector<P, VEC> gamma, beta;
        dout.load((output == 0 ? dout0 : dout1) + to * a.c + column);
        gamma.load(a.params(output) + to * 2 * a.c + column);
        beta.load(a.params(output) + (to * 2 + 1) * a.c + column);
        float dgamma[VEC], dz[VEC];
#pragma unroll
        for (int v = 0; v < VEC; ++v) {
          const float xhat = (x.get(v) - mean[v]) * rstd[v], scale = 1.0f + gamma.get(v);
          dz[v] = gate(dout.get(v), xhat, scale, beta.get(v), a.slope(output));
          dgamma[v] = dz[v] * xhat;
          s1[v] += dz[v] * scale;
          s2[v] += dz[v] * scale * xhat;
        }
        P* const dparams = (output == 0 ? dparams0 : dparams1) + to * 2 * a.c + column;
        store_floats<P, VEC>(dparams, dgamma);
        store_floats<P, VEC>(dparams + a.c, dz);
      }
    }
  }
  if (parts == nullptr) return;
  float* const to = parts + int64_t(blockIdx.x) * 2 * a.c;
  sum_block_rows(s1, tiling, a.c, to);
  sum_block_rows(s2, tiling, a.c, to + a.c);
}

}  // namespace
}  // namespace spade_fast
