# SPDX-License-Identifier: Apache-2.0
"""The command `spade-fast`: what it hands over to, and what it says about words that it does not know."""

import signal
import subprocess
import sys

import pytest

from spade_fast import __version__
from spade_fast.__main__ import COMMANDS, main
from spade_fast.files import program, run_command


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_help_names_every_command(argv, capsys):
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "usage:" in out
    for command, (_, _, what) in COMMANDS.items():
        assert any(line.split("  ")[1:2] == [command] and line.endswith(what) for line in out.splitlines()), command


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"spade-fast {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["tarin", "--out", "x"], "unknown command 'tarin'; did you mean train?"),
        (["sythesize"], "unknown command 'sythesize'; did you mean synthesize?"),
        (["data"], "unknown command 'data'; did you mean data check?"),
        (["data", "chekc"], "unknown command 'data chekc'; did you mean data check?"),
        (["xyz"], "unknown command 'xyz'; expected one of train, synthesize, data check, info, quickstart"),
        (["--verbose"], "unknown command '--verbose'; expected one of"),
    ],
)
def test_unknown_words(argv, message, capsys):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"error: {message}") and captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("started", "prefix"),
    [
        ("/usr/bin/spade-fast", "spade-fast "),
        ("/site-packages/spade_fast/__main__.py", "python -m spade_fast "),
        ("/site-packages/spade_fast/train/__main__.py", "python -m spade_fast."),
        ("/site-packages/spade_fast/synthesize.py", "python -m spade_fast."),
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_usage_names_the_command_as_it_was_started(monkeypatch, capsys, started, prefix, command):
    monkeypatch.setattr(sys, "argv", [started])
    with pytest.raises(SystemExit) as exit:
        main([*command.split(), "--help"])
    assert exit.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {prefix}{command} ")
    assert program(command) == prefix + command


def test_a_command_gets_its_arguments_and_returns_its_status(tmp_path, capsys):
    missing = str(tmp_path / "missing")
    assert main(["synthesize", "--checkpoint", missing, "--label-dir", missing, "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == f"error: no checkpoint at {missing}\n"
    assert main(["data", "check", "--dataset", "coco", "--dataroot", missing]) == 1
    assert main(["data", "check", "--dataset", "synthetic", "--synthetic-size", "1", "--crop-size", "16"]) == 0
    assert main(["train", "--config", missing, "--out", str(tmp_path / "out")]) == 1
    assert f"error: {missing}" in capsys.readouterr().err


def test_as_a_module_with_a_closed_output():
    command = [sys.executable, "-m", "spade_fast", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        error = process.stderr.read()
    assert (process.wait(), error) == (141, b"")


def test_ctrl_c_is_a_status_not_a_traceback(capsys):
    def interrupted() -> int:
        signal.raise_signal(signal.SIGINT)
        return 0

    assert run_command(interrupted) == 130
    assert capsys.readouterr().err == "\nstopped by Ctrl-C\n"
