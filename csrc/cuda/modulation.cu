// SPDX-License-Identifier: Apache-2.0
// modulation: normalize, scale and shift by pattern or per pixel, LeakyReLU, nearest ×2 of the input, in one pass.
//
// A thread has a vector of channels of one pixel of the *small* x, or of a few pixels where nothing is enlarged. So
// each element of x is read once, even if it is upsampled and there are two outputs. All loads of x and of pattern
// ids are issued first: a thread has 32 bytes of x in flight before it waits for rows of the table, which come from the
// caches.
#include <initializer_list>

#include "modulation.cuh"

namespace spade_fast {
namespace {

constexpr int kPixels = 2;         // pixels of x of a thread when nothing is enlarged
constexpr int kPlaneChannels = 8;  // channels of a thread in NCHW

template <int VEC, typename T, typename P>
__device__ __forceinline__ void modulate(const Vector<T, VEC>& x, const float (&mean)[VEC], const float (&rstd)[VEC],
                                         const Vector<P, VEC>& gamma, const Vector<P, VEC>& beta, bool known,
                                         float slope, T* out) {
  float z[VEC];
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    const float xhat = (x.get(i) - mean[i]) * rstd[i];
    z[i] = known ? xhat * (1.0f + gamma.get(i)) + beta.get(i) : xhat;
    z[i] = z[i] > 0.0f ? z[i] : z[i] * slope;
  }
  store_floats<T, VEC>(out, z);
}

// Channels-last. UP: see Positions.
template <typename T, typename P, int VEC, bool DENSE, int UP>
__global__ void __launch_bounds__(kThreads, 3)
    modulation_rows_kernel(ModulationInputs<T, P> a, T* out0, T* out1, RowTiling tiling, FastDiv by_tiles) {
  using Walk = Positions<UP, kPixels>;
  const uint32_t row = tiling.row(), column = tiling.vector(row) * VEC;
  if (row >= tiling.rows || column >= a.c) return;
  const uint32_t n = by_tiles.div(blockIdx.x), tile = blockIdx.x - n * by_tiles.divisor;
  const Walk at(a, tile * tiling.rows * Walk::kInputs + row, tiling.rows);
  const int64_t image = int64_t(n) * a.pixels, out_image = image * (at.up * at.up);  // first pixels of the image

  Vector<T, VEC> x[Walk::kInputs];
#pragma unroll
  for (int i = 0; i < Walk::kInputs; ++i) {
    if (at.inside(i)) x[i].load(a.x + (image + at.input(i)) * a.c + column);
  }
  float mean[VEC], rstd[VEC];
  const int64_t group = n * a.group_stride + column;
  load_or(mean, a.mean == nullptr ? nullptr : a.mean + group, 0.0f);
  load_or(rstd, a.mean == nullptr ? nullptr : a.rstd + group, 1.0f);
#pragma unroll 1
  for (int round = 0; round < at.rounds; ++round) {
    int id[Walk::kItems];
#pragma unroll
    for (int i = 0; i < Walk::kItems; ++i) {
      id[i] = !DENSE && at.inside(i) ? __ldg(a.pattern_ids + out_image + at.output(round, i)) : 0;
    }
#pragma unroll 1
    for (int output = 0; output < a.outputs; ++output) {
      const P* const params = a.params(output) + column;
      T* const out = (output == 0 ? out0 : out1) + column;
      const float slope = a.slope(output);
#pragma unroll
      for (int i = 0; i < Walk::kItems; ++i) {
        if (!at.inside(i)) break;
        const int64_t pixel = out_image + at.output(round, i);
        const P* const from = params + (DENSE ? pixel : int64_t(max(id[i], 0))) * 2 * a.c;
        Vector<P, VEC> gamma, beta;
        gamma.load(from);
        beta.load(from + a.c);
        modulate(x[UP == 1 ? i : 0], mean, rstd, gamma, beta, id[i] >= 0, slope, out + pixel * a.c);
      }
    }
  }
}

// NCHW. Adjacent threads have adjacent pixels, and kPlaneChannels channels of them. Block: (tile of pixels, channels).
template <typename T, typename P, bool DENSE>
__global__ void __launch_bounds__(kThreads, 2)
    modulation_planes_kernel(ModulationInputs<T, P> a, T* out0, T* out1, bool wide_params, FastDiv by_tiles) {
  constexpr int kC = kPlaneChannels;
  const uint32_t n = by_tiles.div(blockIdx.x), tile = blockIdx.x - n * by_tiles.divisor;
  const uint32_t pixel = tile * kThreads + threadIdx.x, channel = blockIdx.y * kC;
  if (pixel >= a.pixels) return;
  const int channels = int(min(uint32_t(kC), a.c - channel));
  float xhat[kC];
  const T* const source = a.x + (int64_t(n) * a.c + channel) * a.pixels + pixel;
#pragma unroll
  for (int j = 0; j < kC; ++j) {
    Vector<T, 1> v;
    if (j < channels) v.load(source + int64_t(j) * a.pixels);
    xhat[j] = j < channels ? v.get(0) : 0.0f;
  }
  if (a.mean != nullptr) {
    const int64_t group = n * a.group_stride + channel;
#pragma unroll
    for (int j = 0; j < kC; ++j) {
      if (j < channels) xhat[j] = (xhat[j] - a.mean[group + j]) * a.rstd[group + j];
    }
  }
  const Positions<0, 1> at(a, pixel, 1);
  const int64_t plane = int64_t(a.pixels) * at.up * at.up;
#pragma unroll 1
  for (int round = 0; round < at.rounds; ++round) {
    const uint32_t to = at.output(round, 0);
    const int id = DENSE ? 0 : __ldg(a.pattern_ids + n * plane + to);
#pragma unroll 1
    for (int output = 0; output < a.outputs; ++output) {
      float gamma[kC], beta[kC];
      if (DENSE) {
        const P* const from = a.params(output) + (int64_t(n) * 2 * a.c + channel) * plane + to;
#pragma unroll
        for (int j = 0; j < kC; ++j) {
          Vector<P, 1> g, b;
          if (j < channels) g.load(from + j * plane), b.load(from + (a.c + j) * plane);
          gamma[j] = j < channels ? g.get(0) : 0.0f;
          beta[j] = j < channels ? b.get(0) : 0.0f;
        }
      } else if (id < 0) {
        fill(gamma, 0.0f);
        fill(beta, 0.0f);
      } else {
        const P* const from = a.params(output) + int64_t(id) * 2 * a.c + channel;
        if (wide_params) {  // the same branch for all threads
          Vector<P, kC> g, b;
          g.load(from);
          b.load(from + a.c);
#pragma unroll
          for (int j = 0; j < kC; ++j) gamma[j] = g.get(j), beta[j] = b.get(j);
        } else {
#pragma unroll
          for (int j = 0; j < kC; ++j) {
            Vector<P, 1> g, b;
            if (j < channels) g.load(from + j), b.load(from + a.c + j);
            gamma[j] = j < channels ? g.get(0) : 0.0f;
            beta[j] = j < channels ? b.get(0) : 0.0f;
          }
        }
      }
      T* const out = (output == 0 ? out0 : out1) + (int64_t(n) * a.c + channel) * plane + to;
      const float slope = a.slope(output);
#pragma unroll
      for (int j = 0; j < kC; ++j) {
        const float z = xhat[j] * (1.0f + gamma[j]) + beta[j];
        const float value[1] = {z > 0.0f ? z : z * slope};
        if (j < channels) store_floats<T, 1>(out + j * plane, value);
      }
    }
  }
}

template <typename T, typename P, int VEC, bool DENSE, int UP>
cudaError_t run_rows(const spade_fast_modulation_args& a, void* const* outs, cudaStream_t stream) {
  const RowTiling tiling(a.c / VEC);
  const int64_t tiles = ceil_div<int64_t>(a.h * a.w, tiling.rows * Positions<UP, kPixels>::kInputs);
  if (a.n * tiles > kMaxBlocks || tiling.blocks > 65535) return cudaErrorInvalidValue;
  SPADE_FAST_RUN((modulation_rows_kernel<T, P, VEC, DENSE, UP>), dim3(uint32_t(a.n * tiles), tiling.blocks), stream,
                 ModulationInputs<T, P>(a), static_cast<T*>(outs[0]), static_cast<T*>(outs[a.outputs - 1]), tiling,
                 FastDiv(uint32_t(tiles)));
  return cudaSuccess;
}

template <typename T, typename P, bool DENSE>
cudaError_t run(const spade_fast_modulation_args& a, void* const* outs, cudaStream_t stream) {
  constexpr int kWide = 16 / int(sizeof(T));
  if (a.channels_last) {
    if (!can_read<T, P, kWide>(a, {outs[0], outs[a.outputs - 1]})) return run_rows<T, P, 1, DENSE, 0>(a, outs, stream);
    return a.upsample == 1 ? run_rows<T, P, kWide, DENSE, 1>(a, outs, stream)
                           : run_rows<T, P, kWide, DENSE, 2>(a, outs, stream);
  }
  const int64_t tiles = ceil_div<int64_t>(a.h * a.w, kThreads), blocks = ceil_div<int64_t>(a.c, kPlaneChannels);
  if (a.n * tiles > kMaxBlocks || blocks > 65535) return cudaErrorInvalidValue;
  bool wide_params = a.c % kPlaneChannels == 0;
  for (int output = 0; output < a.outputs; ++output) wide_params = wide_params && aligned(a.params[output], 16);
  SPADE_FAST_RUN((modulation_planes_kernel<T, P, DENSE>), dim3(uint32_t(a.n * tiles), uint32_t(blocks)), stream,
                 ModulationInputs<T, P>(a), static_cast<T*>(outs[0]), static_cast<T*>(outs[a.outputs - 1]), wide_params,
                 FastDiv(uint32_t(tiles)));
  return cudaSuccess;
}

}  // namespace
}  // namespace spade_fast

using namespace spade_fast;

extern "C" cudaError_t spade_fast_modulation(const spade_fast_modulation_args* args, void* const* outs,
                                             cudaStream_t stream) {
  const spade_fast_modulation_args& a = *args;
  if (!valid(a)) return cudaErrorInvalidValue;
  if (empty(a)) return cudaSuccess;
  return with_types(a.dtype, a.params_dtype, [&](auto t, auto p) {
    using T = decltype(t);
    using P = decltype(p);
    return a.dense ? run<T, P, true>(a, outs, stream) : run<T, P, false>(a, outs, stream);
  });
}
