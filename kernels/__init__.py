# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels, one file for each operation, installed as ``spade_fast.kernels``.

A launcher has the arguments of its operation. It computes in float32: the choice of the backend sends float64 tensors
to torch. The files are imported when the backend is chosen, so a machine without Triton can import the package. The
host waits for the device only in ``patterns``, whose output size depends on the data.
"""

import os

# The kernels want fused multiply-adds. Triton 3.10 changes the default, and 3.9 warns if the variable is not set.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
