# SPDX-License-Identifier: Apache-2.0
"""C++ and CUDA C++ sources, installed as spade_fast.csrc so that the extension can be built at first use."""
