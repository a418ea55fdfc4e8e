# SPDX-License-Identifier: Apache-2.0
"""Procedural landscapes with their label maps."""
