# SPDX-License-Identifier: Apache-2.0
"""kernels/ is installed as spade_fast.kernels: a top-level `kernels` would clash with another package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["spade_fast", "spade_fast.*"]), "spade_fast.kernels"],
    package_dir={"spade_fast": "spade_fast", "spade_fast.kernels": "kernels"},
    package_data={"spade_fast": ["py.typed"]},
)
