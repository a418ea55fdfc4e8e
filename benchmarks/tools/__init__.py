# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks need and is no benchmark itself."""
