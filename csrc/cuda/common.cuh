// SPDX-License-Identifier: Apache-2.0
// What the CUDA kernels share: launching, element types, vectors of memory, division by run-time constants, and how a
// block's threads are laid over rows of channels. Tests run the same source on a CPU (tests/support/cuda_on_cpu.h).
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef SPADE_FAST_ON_CPU
#include "cuda_on_cpu.h"
#else
#include <cuda_runtime.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define SPADE_FAST_LAUNCH(kernel, grid, block, stream, ...) \
  ((void)spade_fast::listed<kernel>, kernel<<<(grid), (block), 0, (stream)>>>(__VA_ARGS__))
#endif

#include "kernel_list.h"
#include "launchers.h"

namespace spade_fast {

// Returns the failed status of a CUDA call from the launcher it is in.
#define SPADE_FAST_CHECK(call)                \
  do {                                        \
    const cudaError_t status = (call);        \
    if (status != cudaSuccess) return status; \
  } while (0)

// Launches a kernel, and returns the status from the launcher if that failed. A name with commas goes in parentheses.
#define SPADE_FAST_RUN(kernel, grid, stream, ...)                               \
  do {                                                                          \
    SPADE_FAST_LAUNCH(kernel, grid, spade_fast::kThreads, stream, __VA_ARGS__); \
    SPADE_FAST_CHECK(cudaGetLastError());                                       \
  } while (0)

template <typename I>
inline I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}

inline bool aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// n / divisor for n < 2^31, by a multiplication (Granlund and Montgomery 1994).
struct FastDiv {
  uint32_t divisor, multiplier, shift;

  FastDiv() : FastDiv(1) {}
  explicit FastDiv(uint32_t d) : divisor(d), shift(0) {
    while ((uint64_t(1) << shift) < d) ++shift;
    multiplier = uint32_t((((uint64_t(1) << shift) - d) << 32) / d + 1);
  }
  __device__ __forceinline__ uint32_t div(uint32_t n) const { return (__umulhi(n, multiplier) + n) >> shift; }
};

// ---- elements and vectors ----

using half_t = __half;
using bfloat_t = __nv_bfloat16;

template <typename T>
__device__ __forceinline__ T bits_as(uint16_t bits);
template <>
__device__ __forceinline__ half_t bits_as<half_t>(uint16_t bits) {
  return half_t(__half_raw{bits});
}
template <>
__device__ __forceinline__ bfloat_t bits_as<bfloat_t>(uint16_t bits) {
  return bfloat_t(__nv_bfloat16_raw{bits});
}

template <typename T>
__device__ __forceinline__ uint16_t bits_of(float value);
template <>
__device__ __forceinline__ uint16_t bits_of<half_t>(float value) {
  return __half_raw(__float2half_rn(value)).x;
}
template <>
__device__ __forceinline__ uint16_t bits_of<bfloat_t>(float value) {
  return __nv_bfloat16_raw(__float2bfloat16_rn(value)).x;
}

// BYTES of memory in registers. Loads and stores are as wide as BYTES allows, and addresses are aligned to that width.
template <int BYTES>
struct Words {
  static constexpr int kCount = BYTES / 4;
  uint32_t word[kCount];

  __device__ __forceinline__ void load(const void* from) {
    if constexpr (BYTES % 16 == 0) {
#pragma unroll
      for (int i = 0; i < BYTES / 16; ++i) {
        const uint4 q = __ldg(static_cast<const uint4*>(from) + i);
        word[4 * i] = q.x, word[4 * i + 1] = q.y, word[4 * i + 2] = q.z, word[4 * i + 3] = q.w;
      }
    } else if constexpr (BYTES == 8) {
      const uint2 q = __ldg(static_cast<const uint2*>(from));
      word[0] = q.x, word[1] = q.y;
    } else {
      static_assert(BYTES == 4);
      word[0] = __ldg(static_cast<const uint32_t*>(from));
    }
  }
  __device__ __forceinline__ void store(void* to) const {
    if constexpr (BYTES % 16 == 0) {
#pragma unroll
      for (int i = 0; i < BYTES / 16; ++i) {
        static_cast<uint4*>(to)[i] = make_uint4(word[4 * i], word[4 * i + 1], word[4 * i + 2], word[4 * i + 3]);
      }
    } else if constexpr (BYTES == 8) {
      *static_cast<uint2*>(to) = make_uint2(word[0], word[1]);
    } else {
      static_assert(BYTES == 4);
      *static_cast<uint32_t*>(to) = word[0];
    }
  }
};
template <>
struct Words<2> {
  uint16_t word[1];

  __device__ __forceinline__ void load(const void* from) { word[0] = __ldg(static_cast<const uint16_t*>(from)); }
  __device__ __forceinline__ void store(void* to) const { *static_cast<uint16_t*>(to) = word[0]; }
};

// VEC elements of type T as they are in memory. They are loaded ahead of their use and converted when they are used.
template <typename T, int VEC>
struct Vector {
  Words<int(sizeof(T)) * VEC> raw;

  __device__ __forceinline__ void load(const T* from) { raw.load(from); }
  __device__ __forceinline__ void store(T* to) const { raw.store(to); }
  __device__ __forceinline__ float get(int i) const {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(raw.word[i]);
    } else if constexpr (VEC == 1) {
      return float(bits_as<T>(raw.word[0]));
    } else {
      return float(bits_as<T>(uint16_t(raw.word[i / 2] >> (i % 2 * 16))));
    }
  }
  __device__ __forceinline__ void set(const float (&values)[VEC]) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < VEC; ++i) raw.word[i] = __float_as_uint(values[i]);
    } else if constexpr (VEC == 1) {
      raw.word[0] = bits_of<T>(values[0]);
    } else {
#pragma unroll
      for (int i = 0; i < VEC; i += 2) {
        raw.word[i / 2] = uint32_t(bits_of<T>(values[i])) | uint32_t(bits_of<T>(values[i + 1])) << 16;
      }
    }
  }
};

template <typename T, int VEC>
__device__ __forceinline__ void store_floats(T* to, const float (&values)[VEC]) {
  Vector<T, VEC> v;
  v.set(values);
  v.store(to);
}

template <int VEC>
__device__ __forceinline__ void fill(float (&values)[VEC], float value) {
#pragma unroll
  for (int i = 0; i < VEC; ++i) values[i] = value;
}

// values[i] = from[i], or `otherwise` when there is no `from`.
template <int VEC>
__device__ __forceinline__ void load_or(float (&values)[VEC], const float* from, float otherwise) {
  if (from == nullptr) return fill(values, otherwise);
  Vector<float, VEC> v;
  v.load(from);
#pragma unroll
  for (int i = 0; i < VEC; ++i) values[i] = v.get(i);
}

// ---- rows of channels ----

// How a block's threads lie over rows of `vectors` vectors. Threads of a row are adjacent, and each keeps its column.
struct RowTiling {
  uint32_t columns, rows;  // of a block: vectors of a row, and rows
  uint32_t blocks;         // side by side along a row
  FastDiv by_columns;

  explicit RowTiling(int64_t vectors)
      : columns(uint32_t(ceil_div(vectors, ceil_div<int64_t>(vectors, kThreads)))),
        rows(kThreads / columns),
        blocks(uint32_t(ceil_div<int64_t>(vectors, columns))),
        by_columns(columns) {}
  __device__ __forceinline__ uint32_t row() const { return by_columns.div(threadIdx.x); }
  __device__ __forceinline__ uint32_t vector(uint32_t row) const {
    return threadIdx.x - row * columns + blockIdx.y * columns;
  }
};

// ---- choosing among instantiations ----

// Calls f(T()) for an element type. Returns cudaErrorInvalidValue if there is no such type.
template <typename F>
cudaError_t with_type(int dtype, F&& f) {
  switch (dtype) {
    case SPADE_FAST_FLOAT32: return f(float());
    case SPADE_FAST_FLOAT16: return f(half_t());
    case SPADE_FAST_BFLOAT16: return f(bfloat_t());
    default: return cudaErrorInvalidValue;
  }
}

// Calls f(T(), P()) for the types of activation and parameters. They are equal, or parameters are float32.
template <typename F>
cudaError_t with_types(int dtype, int params_dtype, F&& f) {
  if (params_dtype != SPADE_FAST_FLOAT32 && params_dtype != dtype) return cudaErrorInvalidValue;
  return with_type(dtype, [&](auto t) {
    using T = decltype(t);
    return params_dtype == SPADE_FAST_FLOAT32 ? f(T(), float()) : f(T(), T());
  });
}

constexpr int64_t kMaxBlocks = 2147483647;

}  // namespace spade_fast
