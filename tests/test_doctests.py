# SPDX-License-Identifier: Apache-2.0
"""The examples in docstrings give what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

import spade_fast

PACKAGE = Path(spade_fast.__file__).parent
MODULES = sorted(
    ".".join(("spade_fast", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if any(">>>" in line and "+SKIP" not in line for line in path.read_text().splitlines())
)


def test_there_are_examples():
    assert {"spade_fast.layers.spade", "spade_fast.labels.label_map", "spade_fast.fusion"} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_examples(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted and not result.failed
