# SPDX-License-Identifier: Apache-2.0
"""Every CUDA kernel compiles for every architecture without spills, with two blocks or more on a multiprocessor."""

import re

import pytest

from benchmarks.tools import cuda_resources
from spade_fast.native.toolchain import csrc, find_nvcc

ARCHS = list(cuda_resources.TARGETS)


@pytest.fixture(scope="module")
def rows():
    if find_nvcc() is None:
        pytest.skip("nvcc was not found")
    return cuda_resources.measure(ARCHS)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", ARCHS)
def test_no_spills(rows, arch):
    here = [row for row in rows if row["arch"] == arch]
    sources = "".join(path.read_text() for path in (csrc() / "cuda").glob("*.cu*"))
    assert {row["kernel"] for row in here} == set(re.findall(r"\b(\w+_kernel)\([^;{}]*\) \{", sources))
    assert not cuda_resources.faults(here)


@pytest.mark.timeout(900)
def test_enough_warps_to_hide_latency(rows):
    """16 warps with two 16-byte loads in flight are 16 KiB of a multiprocessor, half of what the bandwidth needs."""
    assert all(row["occupancy"] * cuda_resources.LIMITS[row["arch"]][0] >= 16 for row in rows)


def test_occupancy():
    assert cuda_resources.occupancy(90, 32, 0) == 1.0
    assert cuda_resources.occupancy(90, 33, 0) == 6 / 8  # 40 registers a thread: 6 blocks of 256
    assert cuda_resources.occupancy(90, 128, 0) == 2 / 8
    assert cuda_resources.occupancy(120, 32, 0) == 1.0  # 48 warps
    assert cuda_resources.occupancy(120, 32, 32768) == 3 * 8 / 48


def test_kernels_are_found_in_mangled_names():
    """The compiler's own part of a name may hold digits and letters that look like a length and a name."""
    file = "46_GLOBAL__N__56b2e74b_13_modulation_cu_8ba0f6e1"
    assert cuda_resources.kernel_of(f"_ZN10spade_fast{file}22modulation_rows_kernelI6__halfLi8EEEvPT_") == (
        "modulation_rows_kernel"
    )
    assert cuda_resources.kernel_of("_ZN3cub11EmptyKernelIvEEvv") is None
    assert cuda_resources.kernel_of("_ZN3cub17DeviceScan_kernelIvEEvv") is None
    assert cuda_resources.kernel_of("_ZN10spade_fast4dropEv") is None


def test_faults_are_told():
    log = """ptxas info    : Compiling entry function '_ZN10spade_fast12_GLOBAL__N_118embedding_x_kernelILi4EEEvv' for 'sm_90a'
ptxas info    : Function properties for _ZN10spade_fast12_GLOBAL__N_118embedding_x_kernelILi4EEEvv
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 2048 bytes smem
ptxas info    : Compiling entry function '_ZN3cub11EmptyKernelIvEEvv' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 4 registers
"""  # noqa: E501
    (row,) = cuda_resources.parse(log, "x.cu")
    assert (row["kernel"], row["arch"], row["registers"], row["shared"]) == ("embedding_x_kernel", 90, 40, 2048)
    assert len(cuda_resources.faults([row])) == 1 and "20 bytes spilled" in cuda_resources.faults([row])[0]
    assert not cuda_resources.faults([row | {"spills": 0}])
