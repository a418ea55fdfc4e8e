// SPDX-License-Identifier: Apache-2.0
// The Python module spade_fast._native_info: what the operators' library is made of, and its CUDA kernels as the
// present device runs them. The module finds the library among those that the process has loaded, and links to nothing
// of it.
#include <pybind11/pybind11.h>

#include <dlfcn.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "about.h"

namespace py = pybind11;

namespace {

// A library that is loaded already.
class Library {
 public:
  explicit Library(const std::string& path)
      : path_(path), handle_(path.empty() ? nullptr : dlopen(path.c_str(), RTLD_NOLOAD | RTLD_LAZY), &dlclose) {
    if (handle_ == nullptr) throw std::runtime_error("no library is loaded from '" + path + "'");
    key = required<decltype(spade_fast_key)>("spade_fast_key")();
    // The kernels' struct has one layout in two binaries only if both come from the same sources.
    if (key != SPADE_FAST_KEY) {
      throw std::runtime_error("'" + path + "' is build " + key + ", this module is of build " SPADE_FAST_KEY);
    }
  }

  std::string key;

  template <typename Function>
  Function* find(const char* name) const {
    return reinterpret_cast<Function*>(dlsym(handle_.get(), name));
  }
  template <typename Function>
  Function* required(const char* name) const {
    Function* const function = find<Function>(name);
    if (function == nullptr) throw std::runtime_error("'" + path_ + "' has no " + name);
    return function;
  }

 private:
  std::string path_;
  std::unique_ptr<void, int (*)(void*)> handle_;
};

int count_kernels(const Library& library) {
  auto* const count = library.find<decltype(spade_fast_kernel_count)>("spade_fast_kernel_count");
  return count == nullptr ? 0 : count();
}

py::dict about(const std::string& path) {
  const Library library(path);
  py::dict result;
  result["key"] = library.key;
  result["architectures"] = library.required<decltype(spade_fast_architectures)>("spade_fast_architectures")();
  result["instruction_set"] = library.required<decltype(spade_fast_instruction_set)>("spade_fast_instruction_set")();
  result["cuda_kernels"] = count_kernels(library);
  return result;
}

py::list kernels(const std::string& path) {
  const Library library(path);
  py::list result;
  for (int i = 0; i < count_kernels(library); ++i) {
    spade_fast_kernel kernel{};
    auto* const measure = library.required<decltype(spade_fast_measure_kernel)>("spade_fast_measure_kernel");
    if (const char* const error = measure(i, &kernel)) throw std::runtime_error(error);
    py::dict row;
    row["name"] = kernel.name;
    row["registers"] = kernel.registers;
    row["local_bytes"] = kernel.local_bytes;
    row["shared_bytes"] = kernel.shared_bytes;
    row["occupancy"] = double(kernel.blocks) * kernel.threads / kernel.most_threads;
    result.append(row);
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(_native_info, m) {
  m.doc() = "What the operators' library says about itself.";
  m.def("about", &about, py::arg("path"),
        "The library's build key, the architectures and number of its CUDA kernels, and the instruction set that its "
        "CPU loops use here. RuntimeError where no library of this build is loaded from path.");
  m.def("kernels", &kernels, py::arg("path"),
        "Each CUDA kernel of the library on the present device: name, registers, local_bytes, shared_bytes and "
        "occupancy (0 to 1). RuntimeError with CUDA's words, without a device say.");
}
