// SPDX-License-Identifier: Apache-2.0
// C launchers of the CUDA kernels. They use no torch, allocate nothing and synchronize nothing.
//
// Pointers are to device memory. Work is queued on `stream` of the current device. Every launcher returns the first
// CUDA error (0 = success), and cudaErrorInvalidValue for arguments outside what is documented here. For empty inputs,
// only what the outputs need is queued. Tensors are contiguous in the layout named. Pointers need only their element's
// alignment: kernels use 16-byte accesses where pointers and channels allow it, else scalar accesses. `workspace` is
// uninitialized memory of *_workspace() bytes, aligned to 256. The caller may free it when the work is done.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <cuda_runtime_api.h>

enum { SPADE_FAST_FLOAT32 = 0, SPADE_FAST_FLOAT16 = 1, SPADE_FAST_BFLOAT16 = 2 };

#ifdef __cplusplus
extern "C" {
#endif

// ---- patterns.cu ----

// Distinct k×k patches of codes [n, h, w] int32 >= 0. Outside the image a code is -1. Fewer than 2^30 pixels, k odd.
//
// `find` numbers the patches by first appearance, image after image. It writes their number to *total (device memory),
// and leaves in the workspace what `write` needs. `write` writes pattern_ids [n, h, w] int32, taps [capacity, k·k]
// int32 and counts [n] int64. The host may read *total between the two and give it as the capacity. Or both are queued
// at once with a fixed capacity, and a CUDA graph can hold them. Rows from *total on are then -1. When *total >
// capacity, *overflow is 1 instead of 0, and pixels of patterns without a row have id -1. overflow may be NULL.
size_t spade_fast_patterns_workspace(int64_t n, int64_t h, int64_t w);
cudaError_t spade_fast_patterns_find(const int32_t* codes, int64_t n, int64_t h, int64_t w, int kernel_size,
                                     int32_t* total, void* workspace, cudaStream_t stream);
cudaError_t spade_fast_patterns_write(const int32_t* codes, int64_t n, int64_t h, int64_t w, int kernel_size,
                                      int64_t capacity, const int32_t* total, int32_t* pattern_ids, int32_t* taps,
                                      int64_t* counts, int32_t* overflow, void* workspace, cudaStream_t stream);

// ---- segments.cu ----

// order [count] int32: the positions of segment_ids [count] int32, sorted by id, stably, negative ids first. offsets
// [num + 1] int32: segment s is at order[offsets[s]] .. order[offsets[s + 1] - 1]. Ids are below num. count < 2^31,
// num < 2^31 - 2.
size_t spade_fast_segments_workspace(int64_t count, int64_t num);
cudaError_t spade_fast_segments(const int32_t* segment_ids, int64_t count, int64_t num, int32_t* order,
                                int32_t* offsets, void* workspace, cudaStream_t stream);

// ---- statistics.cu ----

// Mean and sum of squared deviations of x [n, c, h, w] (dtype; channels-last or NCHW), over the batch [1, c] or per
// sample [n, c]: fp32. h·w < 2^31. Zeros without elements.
size_t spade_fast_statistics_workspace(int64_t n, int64_t c, int64_t h, int64_t w);
cudaError_t spade_fast_statistics(const void* x, int dtype, int channels_last, int64_t n, int64_t c, int64_t h,
                                  int64_t w, int per_sample, float* mean, float* m2, void* workspace,
                                  cudaStream_t stream);

// ---- modulation.cu, modulation_backward.cu ----

// Inputs of modulation and of its backward. Ho = h·upsample, Wo = w·upsample; h·w·c < 2^31 and Ho·Wo < 2^31.
typedef struct {
  int64_t n, c, h, w;          // of x
  int32_t dtype;               // of x, outs, douts and dx
  int32_t params_dtype;        // of params and dparams: dtype, or float32
  int32_t channels_last;       // layout of x, outs and dense params (backward: must be 1); 0 = NCHW
  int32_t upsample;            // 1 or 2
  int32_t outputs;             // 1 or 2
  int32_t dense;               // 1: params of every pixel; 0: by pattern
  int64_t groups;              // rows of mean and rstd: 1 or n
  int64_t patterns;            // rows of params unless dense
  const void* x;               // [n, c, h, w]
  const float* mean;           // [groups, c], or NULL: no normalization
  const float* rstd;           // [groups, c], or NULL
  const int32_t* pattern_ids;  // [n, Ho, Wo] unless dense. An id < 0: gamma = beta = 0
  const void* params[2];       // [patterns, 2c] = [gamma | beta]; dense [n, 2c, Ho, Wo]
  float slopes[2];             // of LeakyReLU, 1: none
} spade_fast_modulation_args;

// outs[i] [n, c, Ho, Wo] = leaky_relu((x - mean)·rstd·(1 + gamma_i) + beta_i, slopes[i]).
cudaError_t spade_fast_modulation(const spade_fast_modulation_args* args, void* const* outs, cudaStream_t stream);

// dx has the shape of x, dparams[i] of params[i], douts[i] is [n, c, Ho, Wo]. Everything is channels-last. Ids are >=
// 0. order [n·Ho·Wo] and offsets [patterns + 1] are the segments of pattern_ids, or NULL if dense. n·Ho·Wo < 2^31
// unless dense. stats_from_x: mean and rstd were computed from x, so dx has their share.
size_t spade_fast_modulation_backward_workspace(const spade_fast_modulation_args* args);
cudaError_t spade_fast_modulation_backward(const spade_fast_modulation_args* args, const void* const* douts,
                                           const int32_t* order, const int32_t* offsets, int stats_from_x, void* dx,
                                           void* const* dparams, void* workspace, cudaStream_t stream);

// ---- embedding_sum.cu ----

// out [q, width] = bias + the sum of the rows of table [taps, rows, width] (dtype) that codes [q, taps] int32 stand
// for, then ReLU if `relu`. Code c stands for row c. With edges it stands for row c >> 1, and if c is odd for row rows
// - 1 too. bias: fp32 or NULL.
cudaError_t spade_fast_embedding_sum(const void* table, int dtype, const float* bias, const int32_t* codes, int64_t q,
                                     int64_t taps, int64_t rows, int64_t width, int edges, int relu, void* out,
                                     cudaStream_t stream);

// numbers [q, taps·(1 + edges)] int32: the rows of the flattened table [taps·rows] that codes stand for, -1: none.
cudaError_t spade_fast_embedding_rows(const int32_t* codes, int64_t q, int64_t taps, int64_t rows, int edges,
                                      int32_t* numbers, cudaStream_t stream);

// dtable [taps·rows, width], dbias [width] in dtype, from dout [q, width] (and out, where relu), and numbers, order
// [q·per_row] and offsets [taps·rows + 1] of spade_fast_embedding_rows and spade_fast_segments. q·per_row < 2^31.
size_t spade_fast_embedding_sum_backward_workspace(int64_t q, int64_t per_row, int64_t table_rows, int64_t width);
cudaError_t spade_fast_embedding_sum_backward(const void* dout, const void* out, int dtype, const int32_t* numbers,
                                              const int32_t* order, const int32_t* offsets, int64_t q, int64_t per_row,
                                              int64_t table_rows, int64_t width, int relu, void* dtable, void* dbias,
                                              void* workspace, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
