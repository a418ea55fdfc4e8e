# SPDX-License-Identifier: Apache-2.0
"""What is measured: operators, layer, generator. The scripts and the pytest-benchmark suite time the same cases."""
