// SPDX-License-Identifier: Apache-2.0
// What modulation and its backward share: the arguments of kernels, and the geometry of enlarged pixels.
#pragma once

#include "common.cuh"

namespace spade_fast {

// spade_fast_modulation_args with element types, and values derived from them.
template <typename T, typename P>
struct ModulationInputs {
  const T* x;                  // [n, c, h, w]
  const float* mean;           // [groups, c] or null
  const float* rstd;           // [groups, c] or null
  const int32_t* pattern_ids;  // [n, ho, wo] or null
  const P* params0;            // [patterns, 2c]; dense [n, 2c, ho, wo]
  const P* params1;
  float slope0, slope1;
  int outputs, upsample;
  uint32_t c, pixels, w;  // pixels of one image of x
  int64_t group_stride;   // elements from one image's mean to the next's
  FastDiv by_w;

  explicit ModulationInputs(const spade_fast_modulation_args& a)
      : x(static_cast<const T*>(a.x)),
        mean(a.mean),
        rstd(a.rstd),
        pattern_ids(a.pattern_ids),
        params0(static_cast<const P*>(a.params[0])),
        params1(static_cast<const P*>(a.params[a.outputs - 1])),
        slope0(a.slopes[0]),
        slope1(a.slopes[a.outputs - 1]),
        outputs(a.outputs),
        upsample(a.upsample),
        c(uint32_t(a.c)),
        pixels(uint32_t(a.h * a.w)),
        w(uint32_t(a.w)),
        group_stride(a.groups > 1 ? a.c : 0),
        by_w(uint32_t(a.w)) {}

  __device__ __forceinline__ const P* params(int output) const { return output == 0 ? params0 : params1; }
  __device__ __forceinline__ float slope(int output) const { return output == 0 ? slope0 : slope1; }
};

// How a thread goes through the output pixels of its pixels of x. UP: the enlargement, or 0 if it is not a constant.
template <int UP, int PIXELS>
struct Positions {
  static constexpr int kInputs = UP == 1 ? PIXELS : 1;               // pixels of x a thread has
  static constexpr int kItems = UP == 1 ? PIXELS : UP == 2 ? 2 : 1;  // output pixels at a time
  int up, rounds;
  uint32_t first, step, w, pixels, base;  // first, step: of the inputs

  template <typename Inputs>
  __device__ __forceinline__ Positions(const Inputs& a, uint32_t first_, uint32_t step_)
      : up(UP ? UP : a.upsample),
        rounds(UP == 1 ? 1 : up * up / kItems),
        first(first_),
        step(step_),
        w(a.w),
        pixels(a.pixels),
        base(first_) {
    if (up == 2) {
      const uint32_t y = a.by_w.div(first);
      base = 4 * y * w + 2 * (first - y * w);
    }
  }
  __device__ __forceinline__ uint32_t input(int i) const { return first + i * step; }
  __device__ __forceinline__ bool inside(int i) const { return (UP == 1 ? input(i) : first) < pixels; }
  // Item i of a round as a pixel of the enlarged image.
  __device__ __forceinline__ uint32_t output(int round, int i) const {
    if constexpr (UP == 1) return input(i);
    const int k = round * kItems + i;
    return base + uint32_t(k >> 1) * 2 * w + uint32_t(k & 1);
  }
};

inline bool valid(const spade_fast_modulation_args& a) {
  const int64_t up = a.upsample, pixels = a.h * a.w;
  return a.n >= 0 && a.c >= 0 && a.h >= 0 && a.w >= 0 && (up == 1 || up == 2) && a.outputs >= 1 && a.outputs <= 2 &&
         (a.mean == nullptr || a.groups == 1 || a.groups == a.n) && pixels * up * up <= kMaxBlocks &&
         a.c <= kMaxBlocks / 2 && (pixels == 0 || a.c <= kMaxBlocks / pixels);
}

inline bool empty(const spade_fast_modulation_args& a) { return a.n * a.c * a.h * a.w == 0; }

// Whether rows of c channels of x, of params and of `others` can be read VEC elements at a time.
template <typename T, typename P, int VEC>
bool can_read(const spade_fast_modulation_args& a, std::initializer_list<const void*> others) {
  const auto width = [](size_t element) { return std::min<size_t>(16, element * VEC); };
  bool can = a.c % VEC == 0 && aligned(a.x, width(sizeof(T)));
  can = can && aligned(a.mean, width(4)) && aligned(a.rstd, width(4));
  for (int output = 0; output < a.outputs; ++output) can = can && aligned(a.params[output], width(sizeof(P)));
  for (const void* p : others) can = can && aligned(p, width(sizeof(T)));
  return can;
}

}  // namespace spade_fast
