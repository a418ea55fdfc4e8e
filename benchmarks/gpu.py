# SPDX-License-Identifier: Apache-2.0
"""Everything that a GPU can show, in one command: ``python -m benchmarks.gpu --out DIR`` (or ``make gpu``).

It runs the tests on the GPU and under compute-sanitizer. It measures ceilings, each operator against its floor, and
layer, generator and training step against their baselines and the goals they are held to. The results file is
rewritten after every part: an interruption loses nothing measured.

Without a GPU it stops at once. With ``--device cpu`` it runs small, and names the parts it skips with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common import ROOT, stamp, write_json
from benchmarks.train_step import COMPILED, PLAIN

TOTAL_SECONDS = 520  # the whole run stays below nine minutes


@dataclass(frozen=True)
class Part:
    """One subprocess.

    Attributes:
        name: of its log and of its entry in the results.
        command: its words; {device} and {json} are filled in.
        seconds: the most it may take.
        needs_gpu: whether it is skipped on a CPU.
        program: an executable that must be on the PATH.
        backend: every operator runs on this one, where it has the operator.
    """

    name: str
    command: tuple[str, ...]
    seconds: int
    needs_gpu: bool = False
    program: str | None = None
    backend: str | None = None


PYTHON = (sys.executable, "-m")
SMOKE = (*PYTHON, "benchmarks.tools.smoke", "--device", "{device}")
SANITIZER = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9")
PARTS = (
    Part("ceilings", (*PYTHON, "benchmarks.ceilings", "--device", "{device}", "--json", "{json}"), 60),
    Part("build", (*PYTHON, "spade_fast.native.build"), 150, needs_gpu=True, program="nvcc"),
    Part("tests", (*PYTHON, "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"), 150, needs_gpu=True),
    Part("sanitizer", (*SANITIZER, *SMOKE), 60, needs_gpu=True, program="compute-sanitizer"),
    Part("sanitizer_cuda", (*SANITIZER, *SMOKE), 60, needs_gpu=True, program="compute-sanitizer", backend="cuda"),
    Part("smoke", SMOKE, 60),
    Part("smoke_cuda", SMOKE, 60, needs_gpu=True, program="nvcc", backend="cuda"),
    Part("ops", (*PYTHON, "benchmarks.ops", "--device", "{device}", "--quick", "--json", "{json}"), 90),
    Part("layer", (*PYTHON, "benchmarks.layer", "--device", "{device}", "--quick", "--json", "{json}"), 120),
    Part("generator", (*PYTHON, "benchmarks.generator", "--device", "{device}", "--quick", "--json", "{json}"), 120),
    Part("train_step", (*PYTHON, "benchmarks.train_step", "--device", "{device}", "--quick", "--json", "{json}"), 120),
)


@dataclass(frozen=True)
class Goal:
    """What an H200 is expected to reach.

    Attributes:
        name: in words.
        part: whose result is judged.
        value: takes the figure from that result.
        bound: the least that meets the goal, or with at_most the most.
    """

    name: str
    part: str
    value: Callable[[dict], float]
    bound: float
    at_most: bool = False


def _memory(result: dict) -> float:
    return result["peak_memory_bytes"][result["fastest"]] / result["peak_memory_bytes"][COMPILED]


GOALS = (
    Goal("training step, times the compiled plain one", "train_step", lambda r: r["ratios"][COMPILED], 2.5),
    Goal("training step, times the plain eager one", "train_step", lambda r: r["ratios"][PLAIN], 5.0),
    Goal("training step, memory against the compiled plain one", "train_step", _memory, 0.4, at_most=True),
    Goal("training, images a second", "train_step", lambda r: r["images_per_second"][r["fastest"]], 200.0),
    Goal("training step, host waits", "train_step", lambda r: r["host_synchronizations"], 0, at_most=True),
)


def judge(parts: dict[str, dict]) -> list[dict]:
    """Each goal with what was measured and whether that meets it; None for both where its part gave no result."""
    rows = []
    for goal in GOALS:
        result = parts.get(goal.part, {}).get("result")
        value = None if result is None else round(goal.value(result), 3)
        met = None if value is None else (value <= goal.bound if goal.at_most else value >= goal.bound)
        limit = f"at {'most' if goal.at_most else 'least'} {goal.bound:g}"
        rows.append({"goal": goal.name, "limit": limit, "measured": value, "met": met})
    return rows


def run(part: Part, device: str, out: Path, seconds: float) -> dict:
    """Runs one part in at most `seconds`. Its output goes to OUT/NAME.log, and its results file into the result."""
    if part.needs_gpu and device != "cuda":
        return {"status": "skipped", "reason": "needs a GPU"}
    if part.program and not shutil.which(part.program):
        return {"status": "skipped", "reason": f"{part.program} is not installed"}
    if seconds < 5:
        return {"status": "skipped", "reason": f"the {TOTAL_SECONDS} s for the whole run are used up"}
    file = out / f"{part.name}.json"
    file.unlink(missing_ok=True)
    command = [word.format(device=device, json=file) for word in part.command]
    environment = os.environ | ({"SPADE_FAST_BACKEND": part.backend} if part.backend else {})
    start = time.perf_counter()
    with open(out / f"{part.name}.log", "w") as log:
        try:
            code: int | str = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=min(part.seconds, seconds),
                check=False,
            ).returncode
        except subprocess.TimeoutExpired as error:
            code = f"stopped after {error.timeout:.0f} s"
    result: dict = {"status": "ok" if code == 0 else "failed", "seconds": round(time.perf_counter() - start, 1)}
    if code != 0:
        result |= {"exit": code, "log_end": (out / f"{part.name}.log").read_text()[-2000:]}
    if file.exists():
        result["result"] = json.loads(file.read_text())
        file.unlink()
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where gpu.json and the logs go")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: the parts that need no GPU")
    parser.add_argument("--only", nargs="+", choices=[p.name for p in PARTS], help="these parts alone")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            f"benchmarks.gpu: torch {torch.__version__} sees no GPU; --device cpu runs the parts that need none",
            file=sys.stderr,
        )
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    report: dict = {"stamp": stamp(options.device), "parts": {}}
    end = time.perf_counter() + TOTAL_SECONDS
    for part in PARTS:
        if options.only and part.name not in options.only:
            continue
        report["parts"][part.name] = result = run(part, options.device, options.out, end - time.perf_counter())
        print(f"{part.name}: {result['status']} {result.get('reason', '')}{result.get('seconds', '')}", flush=True)
        (options.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    if options.device == "cuda":
        report["goals"] = judge(report["parts"])
        for row in report["goals"]:
            verdict = {None: "not measured", True: "met", False: "missed"}[row["met"]]
            print(f"goal: {row['goal']}: {row['measured']} ({row['limit']}): {verdict}")
    write_json(options.out / "gpu.json", report)
    return int(any(r["status"] == "failed" for r in report["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
