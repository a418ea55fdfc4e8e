# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, one file an op, installed as ``spade_fast.kernels``.

Every launcher has the signature of its op's ``<op>_torch`` and is imported only when the backend is chosen, so a
machine without Triton still imports the package. Nothing here synchronizes with the host, except ``patterns``, whose
output size depends on the data: one read.
"""

import os

# Triton 3.10 changes what multiply-add fusion defaults to, and 3.9 warns when it is not set: these kernels want it.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
