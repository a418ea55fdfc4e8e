# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of docs/backends.md from spade_fast.ops._backend: ``python -m docs.make_backends``."""

from __future__ import annotations

from pathlib import Path

from spade_fast.ops import _backend

PAGE = Path(__file__).resolve().parent / "backends.md"
BEGIN, END = "<!-- operations -->\n", "<!-- end of operations -->"


def default(op: str, device: str) -> str:
    """The backend that an operation takes where all of them are available."""
    wanted = [_backend.FASTEST.get(device, {}).get(op), _backend.DEFAULT[device]]
    return next((name for name in wanted if name and _backend.has(name, op)), "torch")


def operations() -> str:
    """A row for each operation: which backends have it, and which one it takes by default."""
    names = _backend.NAMES
    rows = [
        f"| operation | {' | '.join(f'`{name}`' for name in names)} | CPU takes | GPU takes |",
        "| --- |" + " :-: |" * len(names) + " --- | --- |",
    ]
    for op in _backend.OPS:
        cells = ["✓" if _backend.has(name, op) else "–" for name in names]
        rows.append(f"| `{op}` | {' | '.join(cells)} | {default(op, 'cpu')} | {default(op, 'cuda')} |")
    counts = [str(sum(_backend.has(name, op) for op in _backend.OPS)) for name in names]
    rows.append(f"| **of {len(_backend.OPS)}** | {' | '.join(counts)} | | |")
    return "\n".join(rows) + "\n"


def updated() -> str:
    """The page with the tables of today's code."""
    head, rest = PAGE.read_text().split(BEGIN)
    return head + BEGIN + operations() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(updated())
