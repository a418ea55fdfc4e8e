# SPDX-License-Identifier: Apache-2.0
"""Training: `python -m spade_fast.train`."""
