// SPDX-License-Identifier: Apache-2.0
#include "kernel_list.h"

#include <cuda_runtime_api.h>

#include <vector>

#include "about.h"

namespace spade_fast {
namespace {

struct Kernel {
  const void* function;
  const char* name;
};

std::vector<Kernel>& kernels() {
  static std::vector<Kernel> list;  // made at its first use: other files' lists may be filled before this file's
  return list;
}

cudaError_t measure(const Kernel& kernel, spade_fast_kernel* result) {
  cudaFuncAttributes attributes;
  int device = 0;
  cudaError_t status = cudaFuncGetAttributes(&attributes, kernel.function);
  if (status == cudaSuccess) status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&result->most_threads, cudaDevAttrMaxThreadsPerMultiProcessor, device);
  }
  if (status == cudaSuccess) {
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&result->blocks, kernel.function, kThreads, 0);
  }
  if (status != cudaSuccess) return status;
  result->name = kernel.name;
  result->registers = attributes.numRegs;
  result->local_bytes = int(attributes.localSizeBytes);
  result->shared_bytes = int(attributes.sharedSizeBytes);
  result->threads = kThreads;
  return cudaSuccess;
}

}  // namespace

bool list_kernel(const void* kernel, const char* name) {
  kernels().push_back({kernel, name});
  return true;
}

}  // namespace spade_fast

int spade_fast_kernel_count() { return int(spade_fast::kernels().size()); }

const char* spade_fast_measure_kernel(int index, spade_fast_kernel* kernel) {
  if (index < 0 || index >= spade_fast_kernel_count()) return "no kernel has this number";
  const cudaError_t status = spade_fast::measure(spade_fast::kernels()[index], kernel);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}
