# SPDX-License-Identifier: Apache-2.0
"""The native extension: how it is built, how it is loaded, and what it says about itself."""
