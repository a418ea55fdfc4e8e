// SPDX-License-Identifier: Apache-2.0
// The arithmetic of modulation_backward: loops over the channels of pixels and of patterns.
#pragma once

#include "modulation.h"

namespace spade_fast::cpu {
namespace {

template <typename A>
inline __attribute__((always_inline)) void add_gradient(A xhat, A dout, A gamma, A beta, A slope, A& dgamma, A& dbeta) {
  const A z = xhat * gamma + (xhat + beta), low = dout * slope, dz = z > 0 ? dout : low;
  dgamma += dz * xhat;
  dbeta += dz;
}

// dgamma += Σ dz·xhat, dbeta += Σ dz over `count` pixels of one pattern.
template <int count, typename A>
inline __attribute__((always_inline)) void add_gradients(const A* const* x, const A* const* dout, const A* mean,
                                                         const A* rstd, const A* params, A slope, int64_t c, A* dgamma,
                                                         A* dbeta) {
  const A *x0 = x[0], *x1 = x[count > 1 ? 1 : 0], *x2 = x[count > 2 ? 2 : 0], *x3 = x[count > 3 ? 3 : 0];
  const A *d0 = dout[0], *d1 = dout[count > 1 ? 1 : 0], *d2 = dout[count > 2 ? 2 : 0], *d3 = dout[count > 3 ? 3 : 0];
  SPADE_FAST_INDEPENDENT
  for (int64_t j = 0; j < c; ++j) {
    A dg = dgamma[j], db = dbeta[j];
    const A mu = mean[j], scale = rstd[j], gamma = params[j], beta = params[c + j];
    add_gradient((x0[j] - mu) * scale, d0[j], gamma, beta, slope, dg, db);
    if (count > 1) add_gradient((x1[j] - mu) * scale, d1[j], gamma, beta, slope, dg, db);
    if (count > 2) add_gradient((x2[j] - mu) * scale, d2[j], gamma, beta, slope, dg, db);
    if (count > 3) add_gradient((x3[j] - mu) * scale, d3[j], gamma, beta, slope, dg, db);
    dgamma[j] = dg;
    dbeta[j] = db;
  }
}

template <typename A>
SPADE_FAST_CLONES void add_pixels(const A* const* x, const A* const* dout, int64_t count, const A* mean, const A* rstd,
                                  const A* params, A slope, int64_t c, A* dgamma, A* dbeta) {
  switch (count) {
    case 4: return add_gradients<4>(x, dout, mean, rstd, params, slope, c, dgamma, dbeta);
    case 3: return add_gradients<3>(x, dout, mean, rstd, params, slope, c, dgamma, dbeta);
    case 2: return add_gradients<2>(x, dout, mean, rstd, params, slope, c, dgamma, dbeta);
    case 1: return add_gradients<1>(x, dout, mean, rstd, params, slope, c, dgamma, dbeta);
  }
}

// What one element of dx depends on, beside the gradients of the outputs.
template <typename A>
struct Pixels {
  Tile<const A> x;
  const A *mean, *rstd;     // [C]
  const A *first, *second;  // [C], [groups, C] of Correction
};

// The gradient through `up` adjacent outputs of each pixel of x. Sums over all outputs of a pixel are in `weighted`.
//     weighted (+)= dz·(1 + gamma)                  the part of dx / rstd that does not go through the statistics
//     dparams = [dz·xhat | dz]                      if `dense`
//     dx = rstd·(weighted - first - xhat·second)    if `last`: these are the last outputs of the pixels
template <int up, bool fresh, bool last, bool dense, typename A>
inline __attribute__((always_inline)) void add_outputs(const Pixels<A>& in, TileParams<A> params, Tile<const A> dout,
                                                       int64_t count, int64_t c, A slope, Tile<A> weighted,
                                                       Tile<A> dparams, Tile<A> dx) {
  for (int64_t i = 0; i < count; ++i) {
    const A *x = in.x.data + i * in.x.stride, *mean = in.mean, *rstd = in.rstd, *first = in.first, *second = in.second;
    const A *p0 = params.row(i * up), *p1 = params.row(i * up + up - 1);
    const A *d0 = dout.data + i * up * dout.stride, *d1 = d0 + (up - 1) * dout.stride;
    A *sum = weighted.data + i * weighted.stride, *out = dx.data + i * dx.stride;
    A *g0 = dparams.data + i * up * dparams.stride, *g1 = g0 + (up - 1) * dparams.stride;
    SPADE_FAST_INDEPENDENT
    for (int64_t j = 0; j < c; ++j) {
      const A xhat = (x[j] - mean[j]) * rstd[j];
      A total = fresh ? A(0) : sum[j];
      {
        const A z = xhat * p0[j] + (xhat + p0[c + j]), low = d0[j] * slope, dz = z > 0 ? d0[j] : low;
        if (dense) g0[j] = dz * xhat, g0[c + j] = dz;
        total += dz * p0[j] + dz;
      }
      if (up == 2) {
        const A z = xhat * p1[j] + (xhat + p1[c + j]), low = d1[j] * slope, dz = z > 0 ? d1[j] : low;
        if (dense) g1[j] = dz * xhat, g1[c + j] = dz;
        total += dz * p1[j] + dz;
      }
      if (last)
        out[j] = (total - first[j] - xhat * second[j]) * rstd[j];
      else
        sum[j] = total;
    }
  }
}

template <int up, bool fresh, bool last, bool dense, typename A>
SPADE_FAST_CLONES void add_outputs_of(const Pixels<A>& in, TileParams<A> params, Tile<const A> dout, int64_t count,
                                      int64_t c, A slope, Tile<A> weighted, Tile<A> dparams, Tile<A> dx) {
  add_outputs<up, fresh, last, dense>(in, params, dout, count, c, slope, weighted, dparams, dx);
}

template <bool dense, typename A>
auto choose_add_outputs(int64_t up, bool fresh, bool last) {
  if (up == 1) {
    if (fresh) return last ? add_outputs_of<1, true, true, dense, A> : add_outputs_of<1, true, false, dense, A>;
    return last ? add_outputs_of<1, false, true, dense, A> : add_outputs_of<1, false, false, dense, A>;
  }
  if (fresh) return last ? add_outputs_of<2, true, true, dense, A> : add_outputs_of<2, true, false, dense, A>;
  return last ? add_outputs_of<2, false, true, dense, A> : add_outputs_of<2, false, false, dense, A>;
}

// first += Σ weighted, second += Σ weighted·xhat
template <typename A>
SPADE_FAST_CLONES void add_sums(const Pixels<A>& in, Tile<const A> weighted, int64_t count, int64_t c,
                                A* __restrict first, A* __restrict second) {
  const A *mean = in.mean, *rstd = in.rstd;
  for (int64_t i = 0; i < count; ++i) {
    const A *x = in.x.data + i * in.x.stride, *value = weighted.data + i * weighted.stride;
    for (int64_t j = 0; j < c; ++j) {
      first[j] += value[j];
      second[j] += value[j] * ((x[j] - mean[j]) * rstd[j]);
    }
  }
}

// dx = rstd·(weighted - first - xhat·second). dx may be `weighted` itself.
template <typename A>
SPADE_FAST_CLONES void correct(const Pixels<A>& in, Tile<const A> weighted, int64_t count, int64_t c, Tile<A> dx) {
  const A *mean = in.mean, *rstd = in.rstd, *first = in.first, *second = in.second;
  for (int64_t i = 0; i < count; ++i) {
    const A *x = in.x.data + i * in.x.stride, *value = weighted.data + i * weighted.stride;
    A* out = dx.data + i * dx.stride;
    SPADE_FAST_INDEPENDENT
    for (int64_t j = 0; j < c; ++j) out[j] = (value[j] - first[j] - ((x[j] - mean[j]) * rstd[j]) * second[j]) * rstd[j];
  }
}

// s1 += Σ (1 + gamma)·dbeta, s2 += Σ (1 + gamma)·dgamma over `count` patterns.
template <typename A>
SPADE_FAST_CLONES void add_patterns(const A* params, const A* dparams, int64_t count, int64_t c, A* __restrict s1,
                                    A* __restrict s2) {
  for (int64_t p = 0; p < count; ++p, params += 2 * c, dparams += 2 * c)
    for (int64_t j = 0; j < c; ++j) {
      s1[j] += params[j] * dparams[c + j] + dparams[c + j];
      s2[j] += params[j] * dparams[j] + dparams[j];
    }
}

}  // namespace
}  // namespace spade_fast::cpu
