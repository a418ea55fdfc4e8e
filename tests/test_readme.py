# SPDX-License-Identifier: Apache-2.0
"""The README: its snippet runs as it is. Every figure of it and of docs/ is what the committed results files say."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import readme
from spade_fast.reference import SPADE

README = (readme.ROOT / "README.md").read_text()
PAGES = list(readme.pages())


def test_it_is_short():
    assert len(README.splitlines()) < 120


def test_the_snippet_runs_as_it_is(tmp_path, monkeypatch):
    snippets = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    assert len(snippets) == 1
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"__name__": "snippet"}
    exec(compile(snippets[0], "README.md", "exec"), names)

    # The layer computes what the plain layer does.
    norm, labels = names["norm"], names["labels"]
    plain = SPADE(64, 184)
    plain.load_state_dict({**norm.state_dict(), **{k: v for k, v in plain.state_dict().items() if "running" in k}})
    torch.manual_seed(1)
    x = torch.randn(1, 64, 256, 256)
    with torch.no_grad():
        torch.testing.assert_close(norm(x, labels), plain(x, labels.one_hot()), rtol=1e-4, atol=1e-4)

    image = names["image"].detach()[0]
    saved = np.asarray(Image.open(tmp_path / "image.png"))
    assert saved.shape == (256, 256, 3)
    assert np.abs(saved - (image.permute(1, 2, 0).numpy() + 1) * 127.5).max() <= 0.5001
    assert len(np.unique(saved)) > 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_figures_are_those_of_the_results_files(page):
    assert page.read_text() == readme.updated(page), "run python -m benchmarks.readme"


def test_every_block_of_figures_is_shown():
    shown = [name for page in PAGES for _, name, _, _ in readme.BLOCK.findall(page.read_text())]
    assert set(shown) == set(readme.BLOCKS)
    assert [name for _, name, _, _ in readme.BLOCK.findall(README)] == ["generator"]  # one table


def test_another_result_is_another_figure(monkeypatch):
    read = readme.read

    def slower(name):
        result = read(name)
        if name == "generator_cpu.json":
            result["forward"]["times"]["fused"]["median_ms"] *= 2
        return result

    before = readme.updated(readme.ROOT / "README.md")
    monkeypatch.setattr(readme, "read", slower)
    assert readme.updated(readme.ROOT / "README.md") != before
