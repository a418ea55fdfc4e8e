// SPDX-License-Identifier: Apache-2.0
// Backward of modulation, in two passes over x and dout. Between them are two small sums for each channel.
// Channels-last.
//
//     out = act(z), z = xhat (1 + gamma) + beta, xhat = (x - mean) rstd          (z is recomputed from x)
//     pass 1  dz = dout act'(z);  dbeta_p = Σ dz, dgamma_p = Σ dz xhat            over the pixels of pattern p
//     between s1 = Σ_p (1 + gamma_p) dbeta_p, s2 = Σ_p (1 + gamma_p) dgamma_p     per channel (and sample)
//     pass 2  dx = rstd (Σ dz (1 + gamma) - s1/count - xhat s2/count)             count elements of x a group
//
// s1 and s2 are the sums over pixels of dxhat and of dxhat·xhat. They stand for the dependence of mean and rstd on x.
#include <initializer_list>

#include "modulation_backward_sums.cuh"

namespace spade_fast {
namespace {

constexpr int kTarget = 1024;  // blocks of a kernel whose blocks have ranges: about what a large GPU holds at once
constexpr int kGather = 4;     // channels of a thread in pass 1 by patterns
constexpr int kPixels = 2;     // pixels of x of a thread in pass 2 when nothing is enlarged

// sums [groups, 2, c] = s1/count and s2/count. Null: mean and rstd are constants.
template <typename T, typename P, int VEC, bool DENSE, int UP>
__global__ void __launch_bounds__(kThreads, 2)
    input_gradient_kernel(ModulationInputs<T, P> a, const T* dout0, const T* dout1, const float* sums, T* dx,
                          RowTiling tiling, FastDiv by_tiles) {
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
  float mean[VEC], rstd[VEC], grad[Walk::kInputs][VEC];
  const int64_t group = n * a.group_stride + column;
  load_or(mean, a.mean == nullptr ? nullptr : a.mean + group, 0.0f);
  load_or(rstd, a.mean == nullptr ? nullptr : a.rstd + group, 1.0f);
#pragma unroll
  for (int i = 0; i < Walk::kInputs; ++i) fill(grad[i], 0.0f);
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
      const T* const douts = (output == 0 ? dout0 : dout1) + column;
      const float slope = a.slope(output);
      Vector<T, VEC> dout[Walk::kItems];
#pragma unroll
      for (int i = 0; i < Walk::kItems; ++i) {
        if (at.inside(i)) dout[i].load(douts + (out_image + at.output(round, i)) * a.c);
      }
#pragma unroll
      for (int i = 0; i < Walk::kItems; ++i) {
        if (!at.inside(i)) break;
        const int64_t line = DENSE ? out_image + at.output(round, i) : int64_t(id[i]);
        Vector<P, VEC> gamma, beta;
        gamma.load(params + line * 2 * a.c);
        beta.load(params + (line * 2 + 1) * a.c);
        constexpr int kOne = UP == 1;
#pragma unroll
        for (int v = 0; v < VEC; ++v) {
          const float xhat = (x[kOne * i].get(v) - mean[v]) * rstd[v], scale = 1.0f + gamma.get(v);
          grad[kOne * i][v] += gate(dout[i].get(v), xhat, scale, beta.get(v), slope) * scale;
        }
      }
    }
  }
  float s1[VEC], s2[VEC];
  const int64_t of_group = n * a.group_stride * 2 + column;
  load_or(s1, sums == nullptr ? nullptr : sums + of_group, 0.0f);
  load_or(s2, sums == nullptr ? nullptr : sums + of_group + a.c, 0.0f);
#pragma unroll
  for (int i = 0; i < Walk::kInputs; ++i) {
    if (!at.inside(i)) break;
    float out[VEC];
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      const float xhat = (x[i].get(v) - mean[v]) * rstd[v];
      out[v] = rstd[v] * (grad[i][v] - s1[v] - xhat * s2[v]);
    }
    store_floats<T, VEC>(dx + (image + at.input(i)) * a.c + column, out);
  }
}

// ---- the host's part ----

size_t padded(size_t bytes) { return ceil_div<size_t>(bytes, 256) * 256; }

// The workspace's parts, in order.
struct Workspace {
  int64_t positions, ranges;  // sorted positions; the most rows of parts of a group
  SegmentPlan plan;
  size_t sums_bytes, plan_bytes, parts_bytes, channel_bytes;

  explicit Workspace(const spade_fast_modulation_args& a)
      : positions(a.n * a.h * a.w * a.upsample * a.upsample),
        ranges(!a.dense ? std::max<int64_t>(128, kTarget / std::max<int64_t>(a.groups, 1))
                        : ceil_div<int64_t>(kTarget, std::max<int64_t>(a.n, 1)) * a.n),
        plan(positions, 2 * a.c * a.outputs, ceil_div<int64_t>(a.c, kGather)) {
    const bool by_pattern = !a.dense, in_place = a.params_dtype == SPADE_FAST_FLOAT32;
    sums_bytes = by_pattern && !in_place ? padded(size_t(a.outputs * a.patterns * 2 * a.c) * sizeof(float)) : 0;
    plan_bytes = by_pattern ? plan.bytes() : 0;
    parts_bytes = padded(size_t((by_pattern ? std::max<int64_t>(a.groups, 1) : 1) * ranges * 2 * a.c) * sizeof(float));
    channel_bytes = padded(size_t(std::max<int64_t>(a.groups, 1) * 2 * a.c) * sizeof(float));
  }
  size_t bytes() const { return sums_bytes + plan_bytes + parts_bytes + channel_bytes; }
};

struct Call {
  const spade_fast_modulation_args& a;
  const void* const* douts;
  const int32_t *order, *offsets;
  bool stats_from_x;
  void* dx;
  void* const* dparams;
  char* workspace;
  cudaStream_t stream;
};

template <typename T>
const T* dout(const Call& call, int output) {
  return static_cast<const T*>(call.douts[output]);
}

template <typename T, typename P, int VEC, int OUTPUTS>
cudaError_t run_pattern_sums(const Call& call, const SegmentSums& to) {
  const spade_fast_modulation_args& a = call.a;
  const RowTiling tiling(a.c / VEC);
  if (tiling.blocks > 65535) return cudaErrorInvalidValue;
  const int64_t wo = a.w * a.upsample, image = a.h * a.upsample * wo;
  SPADE_FAST_RUN((pattern_sums_kernel<T, P, VEC, OUTPUTS>), dim3(ceil_div(to.pieces, tiling.rows), tiling.blocks),
                 call.stream, ModulationInputs<T, P>(a), dout<T>(call, 0), dout<T>(call, OUTPUTS - 1), call.order,
                 FastDiv(uint32_t(image)), FastDiv(uint32_t(wo)), to, tiling);
  return cudaSuccess;
}

template <typename P, int VEC>
cudaError_t run_pattern_finish(const Call& call, const SegmentSums& sums, float* parts, int64_t groups, int64_t most,
                               int64_t* ranges) {
  const spade_fast_modulation_args& a = call.a;
  const RowTiling tiling(a.c / VEC);
  const int64_t span = ceil_div<int64_t>(ceil_div(a.patterns, most), tiling.rows) * tiling.rows;
  *ranges = ceil_div(a.patterns, span);
  if (tiling.blocks > 65535 || groups > 65535) return cudaErrorInvalidValue;
  const int last = a.outputs - 1;
  SPADE_FAST_RUN((pattern_finish_kernel<P, VEC>),
                 dim3(uint32_t(*ranges), tiling.blocks, uint32_t(parts == nullptr ? 1 : groups)), call.stream,
                 static_cast<const P*>(a.params[0]), static_cast<const P*>(a.params[last]), sums.out0, sums.out1,
                 static_cast<P*>(call.dparams[0]), static_cast<P*>(call.dparams[last]), a.outputs, uint32_t(a.patterns),
                 uint32_t(a.c), call.order, call.offsets, FastDiv(uint32_t(a.h * a.w * a.upsample * a.upsample)),
                 uint32_t(span), tiling, parts);
  return cudaSuccess;
}

// Pass 1 by patterns. *ranges: rows of parts of each group.
template <typename T, typename P>
cudaError_t pass_1(const Call& call, const Workspace& w, float* parts, int64_t groups, int64_t* ranges) {
  const spade_fast_modulation_args& a = call.a;
  const int last = a.outputs - 1;
  float* const own = reinterpret_cast<float*>(call.workspace);
  const bool in_place = sizeof(P) == sizeof(float);
  float* const sums0 = in_place ? static_cast<float*>(call.dparams[0]) : own;
  float* const sums1 = in_place ? static_cast<float*>(call.dparams[last]) : own + last * a.patterns * 2 * a.c;
  char* const scratch = call.workspace + w.sums_bytes;
  const SegmentSums to = w.plan.first_level(call.offsets, sums0, sums1, 2 * a.c, scratch);
  const bool wide = can_read<T, P, kGather>(a, {call.douts[0], call.douts[last]}) && aligned(call.dparams[0], 16) &&
                    aligned(call.dparams[last], 16);
  if (a.outputs == 1) {
    SPADE_FAST_CHECK((wide ? run_pattern_sums<T, P, kGather, 1>(call, to) : run_pattern_sums<T, P, 1, 1>(call, to)));
  } else {
    SPADE_FAST_CHECK((wide ? run_pattern_sums<T, P, kGather, 2>(call, to) : run_pattern_sums<T, P, 1, 2>(call, to)));
  }
  SPADE_FAST_CHECK(w.plan.combine(to, scratch, call.stream));
  return wide ? run_pattern_finish<P, kGather>(call, to, parts, groups, w.ranges, ranges)
              : run_pattern_finish<P, 1>(call, to, parts, groups, w.ranges, ranges);
}

// Pass 1 dense. *ranges: rows of parts of each image.
template <typename T, typename P, int VEC>
cudaError_t dense_pass_1(const Call& call, const Workspace& w, float* parts, int64_t* ranges) {
  const spade_fast_modulation_args& a = call.a;
  const int last = a.outputs - 1;
  const RowTiling tiling(a.c / VEC);
  const int64_t pixels = a.h * a.w;
  const int64_t span = ceil_div<int64_t>(ceil_div(pixels, w.ranges / a.n), tiling.rows) * tiling.rows;
  *ranges = ceil_div(pixels, span);
  if (a.n * *ranges > kMaxBlocks || tiling.blocks > 65535) return cudaErrorInvalidValue;
  SPADE_FAST_RUN((dense_sums_kernel<T, P, VEC>), dim3(uint32_t(a.n * *ranges), tiling.blocks), call.stream,
                 ModulationInputs<T, P>(a), dout<T>(call, 0), dout<T>(call, last), static_cast<P*>(call.dparams[0]),
                 static_cast<P*>(call.dparams[last]), uint32_t(span), FastDiv(uint32_t(*ranges)), tiling, parts);
  return cudaSuccess;
}

template <typename T, typename P, int VEC, bool DENSE, int UP>
cudaError_t pass_2(const Call& call, const float* sums) {
  const spade_fast_modulation_args& a = call.a;
  const RowTiling tiling(a.c / VEC);
  const int64_t tiles = ceil_div<int64_t>(a.h * a.w, tiling.rows * Positions<UP, kPixels>::kInputs);
  if (a.n * tiles > kMaxBlocks || tiling.blocks > 65535) return cudaErrorInvalidValue;
  SPADE_FAST_RUN((input_gradient_kernel<T, P, VEC, DENSE, UP>), dim3(uint32_t(a.n * tiles), tiling.blocks), call.stream,
                 ModulationInputs<T, P>(a), dout<T>(call, 0), dout<T>(call, a.outputs - 1), sums,
                 static_cast<T*>(call.dx), tiling, FastDiv(uint32_t(tiles)));
  return cudaSuccess;
}

template <typename T, typename P, bool DENSE>
cudaError_t run(const Call& call) {
  constexpr int kWide = 16 / int(sizeof(T));
  const spade_fast_modulation_args& a = call.a;
  const Workspace w(a);
  const int64_t groups = a.mean == nullptr ? 1 : a.groups;
  const bool stats_from_x = call.stats_from_x && a.mean != nullptr;
  char* const at = call.workspace + w.sums_bytes + w.plan_bytes;
  float* const parts = stats_from_x ? reinterpret_cast<float*>(at) : nullptr;
  float* const sums = stats_from_x ? reinterpret_cast<float*>(at + w.parts_bytes) : nullptr;
  const bool dparams_aligned = aligned(call.dparams[0], 16) && aligned(call.dparams[a.outputs - 1], 16);
  const bool wide = can_read<T, P, kWide>(a, {call.douts[0], call.douts[a.outputs - 1], call.dx}) && dparams_aligned;
  int64_t ranges = 0;
  if constexpr (DENSE) {
    SPADE_FAST_CHECK(
        (wide ? dense_pass_1<T, P, kWide>(call, w, parts, &ranges) : dense_pass_1<T, P, 1>(call, w, parts, &ranges)));
    if (groups == 1) ranges *= a.n;
  } else {
    SPADE_FAST_CHECK((pass_1<T, P>(call, w, parts, groups, &ranges)));
  }
  if (stats_from_x) {
    const float scale = float(double(groups) / (double(a.n) * double(a.h * a.w)));
    SPADE_FAST_CHECK(reduce_parts(parts, groups, ranges, 2 * a.c, scale, sums, call.stream));
  }
  if (!wide) return pass_2<T, P, 1, DENSE, 0>(call, sums);
  return a.upsample == 1 ? pass_2<T, P, kWide, DENSE, 1>(call, sums) : pass_2<T, P, kWide, DENSE, 2>(call, sums);
}

}  // namespace
}  // namespace spade_fast

using namespace spade_fast;

extern "C" size_t spade_fast_modulation_backward_workspace(const spade_fast_modulation_args* args) {
  return Workspace(*args).bytes();
}

extern "C" cudaError_t spade_fast_modulation_backward(const spade_fast_modulation_args* args, const void* const* douts,
                                                      const int32_t* order, const int32_t* offsets, int stats_from_x,
                                                      void* dx, void* const* dparams, void* workspace,
                                                      cudaStream_t stream) {
  const spade_fast_modulation_args& a = *args;
  if (!valid(a) || !a.channels_last) return cudaErrorInvalidValue;
  if (!a.dense && a.n * a.h * a.w * a.upsample * a.upsample > kMaxBlocks) return cudaErrorInvalidValue;
  if (!a.dense && (a.patterns < 0 || a.patterns >= kMaxBlocks)) return cudaErrorInvalidValue;
  if (empty(a)) {
    const size_t bytes = a.dense ? 0 : size_t(a.patterns * 2 * a.c) * (a.params_dtype == 0 ? 4 : 2);
    for (int output = 0; output < a.outputs && bytes > 0; ++output) {
      SPADE_FAST_CHECK(cudaMemsetAsync(dparams[output], 0, bytes, stream));
    }
    return cudaSuccess;
  }
  const Call call{a, douts, order, offsets, stats_from_x != 0, dx, dparams, static_cast<char*>(workspace), stream};
  return with_types(a.dtype, a.params_dtype, [&](auto t, auto p) {
    using T = decltype(t);
    using P = decltype(p);
    return a.dense ? run<T, P, true>(call) : run<T, P, false>(call);
  });
}
