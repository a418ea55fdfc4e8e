# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: ratios within one run, and only after the results agree."""
