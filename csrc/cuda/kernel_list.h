// SPDX-License-Identifier: Apache-2.0
// A list of the kernels in the library. A kernel is in it because some launcher names it in SPADE_FAST_LAUNCH.
#pragma once

namespace spade_fast {

constexpr int kThreads = 256;  // of every block

// Appends to the list. Called while the library is loaded, before any other function.
bool list_kernel(const void* kernel, const char* name);

// The compiler's text of this function has the kernel's name and its template arguments.
template <auto kernel>
const char* kernel_text() {
  return __PRETTY_FUNCTION__;
}

template <auto kernel>
inline const bool listed = list_kernel(reinterpret_cast<const void*>(kernel), kernel_text<kernel>());

}  // namespace spade_fast
