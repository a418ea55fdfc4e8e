# SPDX-License-Identifier: Apache-2.0
"""Every kernel and config compiles for every architecture, without spills, within its shared memory."""

import pytest

pytest.importorskip("triton")
import triton

from benchmarks.tools import resources

SPILLS = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6)

# One of each kernel there is. A kernel without a case in benchmarks/tools/resources.py is found by its absence here.
KERNELS = {
    "embedding_sum": {"_gather_sum_kernel"},
    "label_conv": {"_forward_kernel", "_backward_kernel"},
    "modulation": {"_forward_kernel"},
    "modulation_backward": {"_input_gradient_kernel"},
    "modulation_sums": {"_pattern_sums_kernel", "_channel_sums_kernel", "_dense_sums_kernel"},
    "normalization_gradient": {"_add_kernel"},
    "pattern_params": {"_gather_gemm_kernel"},
    "patterns": {"_hash_kernel", "_verify_kernel", "_taps_kernel"},
    "segments": {"_segment_sum_kernel", "_combine_kernel"},
    "statistics": {"_partial_kernel", "_merge_kernel"},
}


@pytest.fixture(scope="module")
def rows():
    return resources.measure(list(resources.SHARED_LIMIT), thorough=False)


@pytest.mark.timeout(900)
@pytest.mark.skipif(SPILLS, reason="Triton before 3.6 spills 8 and 16 bytes of two kernels")
@pytest.mark.parametrize("arch", list(resources.SHARED_LIMIT))
def test_fits(rows, arch):
    here = [row for row in rows if row["arch"] == arch]
    assert {row["kernel"] for row in here} == set().union(*KERNELS.values())
    assert not resources.faults(here)


def test_every_kernel_has_a_case():
    import importlib

    for module, kernels in KERNELS.items():
        names = vars(importlib.import_module(f"spade_fast.kernels.{module}"))
        owned = f"spade_fast.kernels.{module}"
        assert {n for n, v in names.items() if n.endswith("_kernel") and v.fn.__module__ == owned} == kernels


def test_faults_are_told():
    good = {"arch": 120, "kernel": "k", "tile": {}, "case": "c", "spills": 0, "shared": 101376}
    assert resources.faults([good, good | {"spills": 4}, good | {"shared": 101377}]) == [
        "sm_120 k {} (c): 4 bytes spilled, 101376 shared",
        "sm_120 k {} (c): 0 bytes spilled, 101377 shared",
    ]
    assert not resources.faults([good | {"arch": 90, "shared": 232448}])


def test_matrix_kernels_use_hoppers_tensor_cores(rows):
    """On sm_90, half precision goes to wgmma: a kernel on mma.sync would run at half the rate."""
    half = [r for r in rows if r["arch"] == 90 and r["kernel"] == "_gather_gemm_kernel" and "bfloat16" in r["case"]]
    assert half
    assert all(r["wgmma"] for r in half)
