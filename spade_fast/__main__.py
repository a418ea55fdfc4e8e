# SPDX-License-Identifier: Apache-2.0
"""The command `spade-fast`, also `python -m spade_fast`: hands over to the commands of the package."""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence

from spade_fast.files import program, run_command

# The words of a command -> its module, the function that runs it, and what it does.
COMMANDS = {
    "train": ("spade_fast.train.__main__", "start", "train a generator, or resume a run"),
    "synthesize": (
        "spade_fast.synthesize",
        "main",
        "make images from label maps",
    ),
    "data check": ("spade_fast.data.__main__", "main", "read every file of a dataset and list every fault"),
    "info": (__name__, "info", "show versions, devices and the backend of each operation"),
    "quickstart": ("spade_fast.quickstart", "main", "train on procedural landscapes for a few minutes"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the arguments name.

    Args:
        argv: the arguments (default: those of the program).

    Returns:
        The exit status: that of the command, or 2 for an unknown one.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _run(words))


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0
    if words[0] == "--version":
        from spade_fast import __version__

        print(f"spade-fast {__version__}")
        return 0
    for command, (module, function, _) in COMMANDS.items():
        count = len(command.split())
        if words[:count] == command.split():
            # Only the module of this command is imported: training imports much that the others do not need.
            status: int = getattr(importlib.import_module(module), function)(words[count:])
            return status
    print(f"error: {_unknown(words)}", file=sys.stderr)
    return 2


def _unknown(words: list[str]) -> str:
    """The message about words that are no command."""
    longer = [command for command in COMMANDS if command.split()[0] == words[0]]
    given = " ".join(words[:2] if longer else words[:1])
    close = longer or difflib.get_close_matches(given, COMMANDS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(COMMANDS)}"
    return f"unknown command {given!r}; {hint}"


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {command:{width}}  {what}" for command, (_, _, what) in COMMANDS.items()]
    usage = f"usage: {program('COMMAND')} [options]\n\nExact, fast SPADE (GauGAN). Commands:\n"
    return usage + "\n".join([*lines, "", f"{program('COMMAND')} --help shows the options of a command."])


def info(argv: list[str]) -> int:
    """The command `info`, which takes no options. Returns the exit status."""
    argparse.ArgumentParser(prog=program("info"), description=COMMANDS["info"][2].capitalize()).parse_args(argv)
    print(importlib.import_module("spade_fast.info").report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
