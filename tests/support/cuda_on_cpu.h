// SPDX-License-Identifier: Apache-2.0
// Runs the CUDA kernels of csrc/cuda on a CPU: g++ -x c++ -DSPADE_FAST_ON_CPU -Itests/support -Icsrc -I<cuda>/include.
//
// A CUDA thread is a fiber with a stack of its own. __syncthreads() switches to the next fiber. The blocks of a grid run
// one after another, so __shared__ is static memory. It finds wrong numbers, wrong indices, and a barrier that some
// threads miss. With the address sanitizer it finds accesses out of bounds. Threads and blocks can run in reverse order;
// a changed result shows shared memory that is read before it is written. It does not find races between blocks. x86-64
// only.
#pragma once

#ifndef __x86_64__
#error "cuda_on_cpu.h switches stacks with x86-64 instructions"
#endif

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

namespace cuda_on_cpu {

enum class State { kRunning, kAtBarrier, kFinished };

struct Fiber {
  void* stack_pointer = nullptr;
  std::unique_ptr<char[]> stack;
  uint3 thread{};
  State state = State::kRunning;
};

constexpr size_t kStackBytes = 256 << 10;

inline std::vector<Fiber> fibers;
inline Fiber* current = nullptr;
inline void* scheduler = nullptr;
inline std::function<void()> body;
inline dim3 grid_size, block_size;
inline uint3 block_index{};
inline bool reversed = false;

// Saves the callee-saved registers on this stack and the stack's pointer in *from. Continues on the stack `to`.
extern "C" void spade_fast_switch_stack(void** from, void* to);
__asm__(
    ".text\n"
    ".weak spade_fast_switch_stack\n"
    ".type spade_fast_switch_stack, @function\n"
    "spade_fast_switch_stack:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n"
    ".size spade_fast_switch_stack, . - spade_fast_switch_stack\n");

inline void leave(State state) {
  current->state = state;
  spade_fast_switch_stack(&current->stack_pointer, scheduler);
}

inline void fiber_main() {
  body();
  leave(State::kFinished);
}

inline void prepare(Fiber& fiber, unsigned thread) {
  if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
  auto top = reinterpret_cast<uintptr_t>(fiber.stack.get() + kStackBytes) & ~uintptr_t(15);
  void** at = reinterpret_cast<void**>(top);
  *--at = nullptr;  // where fiber_main would return to; it never does
  *--at = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--at = nullptr;  // the registers popped on entry
  fiber.stack_pointer = at;
  fiber.thread =
      make_uint3(thread % block_size.x, thread / block_size.x % block_size.y, thread / (block_size.x * block_size.y));
  fiber.state = State::kRunning;
}

inline void run_block() {
  const unsigned threads = block_size.x * block_size.y * block_size.z;
  if (fibers.size() < threads) fibers.resize(threads);
  for (unsigned i = 0; i < threads; ++i) prepare(fibers[i], i);
  for (;;) {
    unsigned waiting = 0;
    for (unsigned i = 0; i < threads; ++i) {
      current = &fibers[reversed ? threads - 1 - i : i];
      if (current->state != State::kFinished) spade_fast_switch_stack(&scheduler, current->stack_pointer);
      waiting += current->state == State::kAtBarrier;
    }
    if (waiting == 0) return;
    if (waiting != threads) {
      std::fprintf(stderr, "cuda_on_cpu: %u of %u threads reached a barrier\n", waiting, threads);
      std::abort();
    }
    for (unsigned i = 0; i < threads; ++i) fibers[i].state = State::kRunning;
  }
}

template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, dim3 grid, dim3 block, Arguments... arguments) {
  grid_size = grid;
  block_size = block;
  body = [=] { kernel(arguments...); };
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t b = reversed ? blocks - 1 - i : i;
    block_index = make_uint3(unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y));
    run_block();
  }
}

inline cudaError_t memset_async(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

}  // namespace cuda_on_cpu

// Threads and blocks run in reverse order from now on, or in order again.
extern "C" __attribute__((weak, visibility("default"))) void spade_fast_run_reversed(int reversed) {
  cuda_on_cpu::reversed = reversed != 0;
}

#define SPADE_FAST_LAUNCH(kernel, grid, block, stream, ...) \
  ((void)(stream), cuda_on_cpu::launch((kernel), (grid), (block), __VA_ARGS__))
#define cudaGetLastError() cudaSuccess
#define cudaMemsetAsync cuda_on_cpu::memset_async
#define threadIdx (cuda_on_cpu::current->thread)
#define blockIdx (cuda_on_cpu::block_index)
#define blockDim (cuda_on_cpu::block_size)
#define gridDim (cuda_on_cpu::grid_size)

using std::max;
using std::min;

inline void __syncthreads() { cuda_on_cpu::leave(cuda_on_cpu::State::kAtBarrier); }
template <typename T>
T __ldg(const T* from) {
  if (reinterpret_cast<uintptr_t>(from) % alignof(T) != 0) {  // a misaligned access is an error on a GPU
    std::fprintf(stderr, "cuda_on_cpu: misaligned load of %zu bytes\n", sizeof(T));
    std::abort();
  }
  return *from;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline uint32_t atomicMin(uint32_t* at, uint32_t value) {
  const uint32_t old = *at;
  if (value < old) *at = value;
  return old;
}
inline uint32_t atomicCAS(uint32_t* at, uint32_t compare, uint32_t value) {
  const uint32_t old = *at;
  if (old == compare) *at = value;
  return old;
}
