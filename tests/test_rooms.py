# SPDX-License-Identifier: Apache-2.0
"""The rooms of the package: which may import which. Names that moved are found under their old ones too."""

import ast
import importlib
import subprocess
import sys
import types
from pathlib import Path

import pytest

import spade_fast
from spade_fast._moved import MOVED

ROOT = Path(__file__).resolve().parents[1]
FLOORS = [  # a module imports from its own room and from lower floors
    {"cli", "files", "native", "kernels", "_moved"},
    {"ops", "data", "pictures", "reference"},
    {"labels"},
    {"layers"},
    {"functional", "models"},
    {"fusion", "image_sizes", "train"},
    {"spade_fast"},
    {"info", "quickstart", "synthesize", "__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    found = {}
    for folder, package in ((ROOT / "spade_fast", "spade_fast"), (ROOT / "kernels", "spade_fast.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


MODULES = modules()


def room(module: str) -> str:
    if module.endswith(".__main__"):  # a command: nothing imports it but another command
        return "__main__"
    return module.split(".")[1] if "." in module else module


def imports(module: str) -> set[str]:
    """The modules of the package that `module` imports, anywhere in it but for type checkers alone."""
    found = set()
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names}
    return {name for name in found if name in MODULES and name != module}


def test_every_room_has_a_floor():
    assert {room(module) for module in MODULES} <= set(FLOOR)


@pytest.mark.parametrize("module", MODULES)
def test_nothing_imports_from_above(module):
    own = FLOOR[room(module)]
    above = {name for name in imports(module) if room(name) != room(module) and FLOOR[room(name)] >= own}
    assert not above, f"{module} imports {above}"


def test_kernels_import_only_kernels():
    """The Triton kernels serve the operations, so not even a call may import one by its name."""
    for module in (module for module in MODULES if room(module) == "kernels"):
        assert all(room(name) == "kernels" for name in imports(module)), module
        source = MODULES[module].read_text()
        assert "import_module" not in source and "torch.ops.spade_fast" not in source, module


def test_no_circle():
    remaining = {module: imports(module) for module in MODULES}
    while free := [module for module, needs in remaining.items() if not needs & remaining.keys()]:
        for module in free:
            del remaining[module]
    assert not remaining, f"these import each other: {sorted(remaining)}"


@pytest.mark.parametrize("module", [name for name in MODULES if MODULES[name].name == "__init__.py"])
def test_no_attribute_shadows_a_module(module):
    if module == "spade_fast.kernels":
        pytest.importorskip("triton")
    package = importlib.import_module(module)
    for name in MODULES:
        parent, _, leaf = name.rpartition(".")
        if parent == module and hasattr(package, leaf):
            assert isinstance(getattr(package, leaf), types.ModuleType), name


@pytest.mark.parametrize("old", MOVED)
def test_old_names_give_the_new_modules(old):
    new = importlib.import_module(f"spade_fast.{MOVED[old]}")
    sys.modules.pop(f"spade_fast.{old}", None)
    with pytest.warns(FutureWarning, match=rf"spade_fast\.{old} is now {new.__name__}"):
        found = importlib.import_module(f"spade_fast.{old}")
    assert found is new
    assert found.__spec__.name == new.__name__


def test_an_old_name_in_a_new_process():
    code = "from spade_fast.checkpoint import load_generator; import spade_fast; print(load_generator.__module__)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == spade_fast.load_generator.__module__ == "spade_fast.models.checkpoint"


@pytest.mark.parametrize(
    ("home", "old", "new"),
    [
        ("labels.pattern_tables", "Patterns", "labels.pattern_tables.PatternTables"),
        ("layers.spade", "SPADEResnetBlock", "layers.block.SPADEResnetBlock"),
        ("layers.spade", "SLOPE", "layers.plain.SLOPE"),
        ("layers.spade", "DENSE_ABOVE", "layers.patches.DENSE_ABOVE"),
        ("layers.spade", "recognize", "labels.map_scope.as_label_map"),
        ("layers.spade", "recomputing", "layers.normalization.recomputing"),
    ],
)
def test_old_attributes_give_the_new_ones(home, old, new):
    module, _, name = f"spade_fast.{new}".rpartition(".")
    with pytest.warns(FutureWarning, match=rf"spade_fast\.{home}\.{old} is now spade_fast\.{new}"):
        found = getattr(importlib.import_module(f"spade_fast.{home}"), old)
    assert found is getattr(importlib.import_module(module), name)


def test_an_unknown_attribute_is_named():
    with pytest.raises(AttributeError, match=r"'spade_fast\.layers\.spade' has no attribute 'Spade'"):
        importlib.import_module("spade_fast.layers.spade").Spade  # noqa: B018
