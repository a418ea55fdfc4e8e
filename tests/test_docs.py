# SPDX-License-Identifier: Apache-2.0
"""The documentation: it builds strictly, needs no foreign server, and says what the code says today."""

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import spade_fast
from benchmarks.readme import read
from docs import make_backends, make_pictures
from spade_fast import FusedSPADE, LabelMap, use_backend
from spade_fast.ops import _backend
from spade_fast.reference import SPADE
from spade_fast.train.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


# The site


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs")
    place = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(place)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return place


def test_a_browser_loads_nothing_from_other_servers(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 10
    for page in pages:
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*?src=\"([^\"]+)\"", page.read_text())
        loaded += re.findall(
            r"<link[^>]*?rel=\"(?:stylesheet|preconnect|icon)\"[^>]*?href=\"([^\"]+)\"", page.read_text()
        )
        loaded += re.findall(
            r"<link[^>]*?href=\"([^\"]+)\"[^>]*?rel=\"(?:stylesheet|preconnect|icon)\"", page.read_text()
        )
        assert loaded
        foreign = [url for url in loaded if re.match(r"(?:https?:)?//", url)]
        assert not foreign, f"{page.relative_to(site)}: {foreign}"


def test_the_site_holds_the_results_that_its_figures_name(site):
    page = (site / "benchmarks" / "index.html").read_text()
    linked = set(re.findall(r"href=\"(?:\.\./)*repository/(benchmarks/results/\w+\.json)\"", page))
    assert {"benchmarks/results/macs.json", "benchmarks/results/layer_cpu.json"} <= linked
    for name in linked:
        assert (site / "repository" / name).read_bytes() == (ROOT / name).read_bytes()


def test_public_names_are_in_the_api_reference(site):

    anchors = {
        a for page in (site / "api").rglob("*.html") for a in re.findall(r"id=\"(spade_fast[\w.]+)\"", page.read_text())
    }
    assert {f"spade_fast.{name}" for name in spade_fast.__all__ if name != "__version__"} <= anchors


def test_every_training_option_is_listed(site):
    page = (site / "api" / "training" / "index.html").read_text()
    listed = re.findall(r"<td><code>(--[\w-]+)</code></td>", page)
    assert sorted(listed) == sorted(f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(TrainConfig))


def links(page: Path) -> list[str]:
    text = re.sub(r"^(```|~~~).*?^\1", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [url for url in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:", url)]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_texts_outside_of_the_site(name):
    for url in links(ROOT / name):
        assert (ROOT / url.partition("#")[0]).exists(), url


# What it says of the code


def test_the_code_of_the_start_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / "index.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    names: dict = {"__name__": "start"}
    for block in blocks:
        exec(compile(block, "index.md", "exec"), names)
    assert names["out"].shape == (1, 64, 128, 128)
    plain = SPADE(64, 184)
    plain.load_state_dict(names["norm"].state_dict())
    x, labels = torch.randn(1, 64, 64, 64), names["labels"]
    with torch.no_grad():
        expected = torch.nn.functional.leaky_relu(plain(x, labels.one_hot()), 0.2)
        torch.testing.assert_close(names["norm"](x, labels, activation="leaky_relu"), expected, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "image.png").is_file()


def templates(node: ast.AST) -> list[str]:
    """The strings that an expression may give, with … for what is filled in."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else ["…"]
    if isinstance(node, ast.JoinedStr):
        return ["".join("…" if isinstance(part, ast.FormattedValue) else part.value for part in node.values)]
    if isinstance(node, ast.IfExp):
        return templates(node.body) + templates(node.orelse)
    return []


def data_messages() -> tuple[list[str], list[str]]:
    """Every string of spade_fast/data, and those that are raised or listed as a fault or warning."""
    every, told = [], []
    for path in sorted((ROOT / "spade_fast" / "data").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            every += templates(node)
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                if getattr(node.exc.func, "id", "") in ("DataError", "ValueError"):
                    told += templates(node.exc.args[0])
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "append":
                if getattr(node.func.value, "id", "") in ("faults", "warnings"):
                    told += templates(node.args[0])
            elif isinstance(node, ast.AugAssign) and getattr(node.target, "id", "") == "message":
                told += templates(node.value)
            elif isinstance(node, (ast.Return, ast.Yield)) and node.value is not None:  # hints begin as they go on
                told += [text for text in templates(node.value) if text.startswith((";", ".", " (", "…: "))]
    return every, told


def explained_messages() -> list[str]:
    """The first cells of the page's tables of messages."""
    text = (DOCS / "data.md").read_text()
    return re.findall(r"^\| `([^`]+)` \|", text[text.index("## Messages: folders") :], re.MULTILINE)


def test_every_message_that_the_page_explains_is_one_of_the_code():
    every = data_messages()[0]
    for message in explained_messages():
        assert any(message in text for text in every), message


def test_every_message_of_the_data_is_explained():
    explained, told = explained_messages(), data_messages()[1]
    assert len(told) > 40
    told = [text for text in told if re.search("[a-z]{3}", text)]  # not what is filled in altogether
    missing = [text for text in told if not any(message in text for message in explained)]
    assert not missing


def test_the_signature_of_the_original_that_the_pages_name():
    names = {"FusedSPADE": FusedSPADE, "norm_nc": 64, "label_nc": 184}
    for page in ("faq.md", "drop_in.md"):
        (call,) = re.findall(r"`(FusedSPADE\(\"spade[^`]*\))`", (DOCS / page).read_text())  # one on each page
        layer = eval(call, names)
        assert {n: t.shape for n, t in layer.state_dict().items()} == {
            n: t.shape for n, t in FusedSPADE(64, 184, norm="syncbatch", kernel_size=3).state_dict().items()
        }
        assert (layer.norm, layer.kernel_size) == ("syncbatch", 3)


# Options

PROGRAMS = ("spade_fast.train", "spade_fast.synthesize", "spade_fast.quickstart", "spade_fast.data check")
OTHERS = {  # of pip, torchrun and pytest
    *("--no-build-isolation", "--no-deps", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"),
    *("--benchmark-only", "--benchmark-json", "--benchmark-compare"),
}


def test_options_that_the_pages_name_exist():
    known = set(OTHERS)
    for program in PROGRAMS:
        command = [sys.executable, "-m", *program.split(), "--help"]
        known |= set(re.findall(r"--[a-z][a-z0-9-]+", subprocess.run(command, capture_output=True, text=True).stdout))
    for path in (*(ROOT / "benchmarks").rglob("*.py"), *DOCS.glob("*.py"), *(ROOT / "tests" / "support").rglob("*.py")):
        known |= set(re.findall(r"\"(--[a-z][a-z0-9-]+)\"", path.read_text()))
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")):
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", re.sub(r"<!--|-->", "", page.read_text())))
        assert not named - known, f"{page.name} names {named - known}"


# Backends


def test_the_table_of_operations_is_that_of_the_code():
    assert make_backends.PAGE.read_text() == make_backends.updated(), "run python -m docs.make_backends"


def test_another_operation_is_another_table(monkeypatch):
    before = make_backends.operations()
    monkeypatch.setitem(_backend.FASTEST["cuda"], "patterns", "cuda")
    assert make_backends.operations() != before


def test_the_defaults_of_the_table_are_what_a_cpu_takes():
    if _backend.available("cpu")[:2] != ["torch", "cpp"]:
        pytest.skip("the C++ backend is not available here")
    for op in _backend.OPS:
        assert make_backends.default(op, "cpu") == _backend.choose(op, torch.device("cpu")), op


UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("name", ["torch", "cpp"])
def test_the_types_of_the_page(name, dtype):
    """Forward and gradient of x in each type, against the plain layer in float64 with the same weights and x."""
    if _backend.why_not(name):
        pytest.skip(_backend.why_not(name))
    torch.manual_seed(0)
    labels = LabelMap(torch.randint(5, (2, 8, 8)).repeat_interleave(4, 1).repeat_interleave(4, 2), 5)
    layer, plain = FusedSPADE(8, 5).to(dtype), SPADE(8, 5).double()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 8, 32, 32, dtype=torch.float64).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    upstream = torch.randn(2, 8, 32, 32, dtype=torch.float64).to(dtype)
    with use_backend(name):
        out = layer(x, labels)
        out.backward(upstream)
    expected = plain(exact, labels.one_hot(torch.float64))
    expected.backward(upstream.double())
    assert out.dtype == x.grad.dtype == dtype
    for found, wanted in ((out, expected), (x.grad, exact.grad)):
        error = (found.detach().double() - wanted.detach()).abs().max() / wanted.detach().abs().max()
        assert error < 16 * UNIT[dtype]  # hidden rows, parameters and x are each rounded to the type, sums are not


def test_the_devices_of_the_page():
    assert "for CPU tensors" in _backend.why_not("cpp", "cuda")
    assert "for CUDA tensors" in _backend.why_not("cuda", "cpu")
    assert _backend.why_not("torch", "cuda") is _backend.why_not("torch", "cpu") is None
    for name in ("cpp", "triton", "cuda"):
        assert "no kernels for xpu tensors" in _backend.why_not(name, "xpu")


@pytest.mark.parametrize("name", ["torch", "cpp"])
def test_a_layer_compiles_into_one_graph_on_the_backends_of_the_page(name):
    if _backend.why_not(name):
        pytest.skip(_backend.why_not(name))
    torch.manual_seed(0)
    layer = FusedSPADE(8, 5).eval()
    codes = torch.randint(5, (1, 8, 8)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    x = torch.randn(1, 8, 32, 32)

    def run(x, codes):
        return layer(x, LabelMap(codes, 5, validate=False))

    with use_backend(name), torch.no_grad():
        compiled = torch.compile(run, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x, codes), run(x, codes), rtol=1e-5, atol=1e-5)


# How it works


def test_distinct_patches_are_those_of_the_library():
    """The page's counts, by enumeration of all patches, are what the operation finds."""
    labels, rows = make_pictures.read_map(), read("patches.json")["picture"]
    assert [row["size"] for row in rows] == list(make_pictures.SIZES)
    for row in rows:
        hidden, patterns = make_pictures.distinct(labels, row["size"])
        assert (hidden.max() + 1, patterns.max() + 1) == (row["hidden"], row["patterns"])
        (count,) = torch.ops.spade_fast.patterns(labels.resized(row["size"], row["size"]), 3)[2].tolist()
        assert count == row["hidden"]
        # A 5×5 patch is a 3×3 patch of 3×3 patches.
        (count,) = torch.ops.spade_fast.patterns(torch.from_numpy(hidden.astype(np.int32))[None], 3)[2].tolist()
        assert count == row["patterns"]
