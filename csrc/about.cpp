// SPDX-License-Identifier: Apache-2.0
#include "about.h"

#include "cpu/common.h"

// The build gives both to this file alone.
#if !defined(SPADE_FAST_KEY) || !defined(SPADE_FAST_ARCHITECTURES)
#error "build with spade_fast/native/build.py"
#endif

namespace {

// The loader chooses among these exactly as among the clones of SPADE_FAST_CLONES.
#ifdef SPADE_FAST_HAS_CLONES
__attribute__((target("default"))) const char* instruction_set() { return "default"; }
__attribute__((target("arch=x86-64-v3"))) const char* instruction_set() { return "x86-64-v3"; }
__attribute__((target("arch=x86-64-v4"))) const char* instruction_set() { return "x86-64-v4"; }
#else
const char* instruction_set() { return "default"; }
#endif

}  // namespace

const char* spade_fast_key() { return SPADE_FAST_KEY; }
const char* spade_fast_architectures() { return SPADE_FAST_ARCHITECTURES; }
const char* spade_fast_instruction_set() { return instruction_set(); }
