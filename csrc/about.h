// SPDX-License-Identifier: Apache-2.0
// What the operators' library says about itself. csrc/python/native_info.cpp looks these functions up by name.
#pragma once

#define SPADE_FAST_EXPORT extern "C" __attribute__((visibility("default")))

// Hash of the sources and of all parameters of the build.
SPADE_FAST_EXPORT const char* spade_fast_key();

// What the CUDA kernels were compiled for, "sm_80, sm_90a, compute_90a"; empty without CUDA kernels.
SPADE_FAST_EXPORT const char* spade_fast_architectures();

// The instruction set whose clones of the CPU loops run on this processor.
SPADE_FAST_EXPORT const char* spade_fast_instruction_set();

// One CUDA kernel as the present device runs it.
struct spade_fast_kernel {
  const char* name;  // the compiler's text of the instantiation
  int registers;     // of a thread
  int local_bytes;   // of a thread: spilled registers and arrays
  int shared_bytes;  // of a block
  int threads;       // of a block
  int blocks;        // resident on a multiprocessor at most, by cudaOccupancyMaxActiveBlocksPerMultiprocessor
  int most_threads;  // resident on a multiprocessor at most, whatever the kernel
};

// These two are in a library with CUDA kernels only (csrc/cuda/kernel_list.cpp).
SPADE_FAST_EXPORT int spade_fast_kernel_count();

// Measures kernel `index` on the present device. Returns null, or what went wrong.
SPADE_FAST_EXPORT const char* spade_fast_measure_kernel(int index, spade_fast_kernel* kernel);
