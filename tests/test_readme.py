# SPDX-License-Identifier: Apache-2.0
"""Every figure of the README is what the committed results files say."""

from benchmarks import readme


def test_figures_are_those_of_the_results_files():
    text = (readme.ROOT / "README.md").read_text()
    shown = text.split(readme.BEGIN)[1].split(readme.END)[0]
    assert shown == readme.figures()


def test_another_result_is_another_figure(monkeypatch):
    read = readme.read

    def slower(name):
        result = read(name)
        if name == "generator_cpu.json":
            result["forward"]["times"]["fused"]["median_ms"] *= 2
        return result

    before = readme.figures()
    monkeypatch.setattr(readme, "read", slower)
    assert readme.figures() != before
