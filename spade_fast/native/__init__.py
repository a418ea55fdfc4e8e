# SPDX-License-Identifier: Apache-2.0
"""The native extension: how it is built, and how it is loaded."""
