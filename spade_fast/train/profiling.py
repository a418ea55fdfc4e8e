# SPDX-License-Identifier: Apache-2.0
"""Where a training step goes: named spans, a trace for chrome://tracing or Perfetto, and a table of times."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

PARTS = ("data", "generator", "discriminator", "VGG", "losses", "backward", "optimizer")
STEPS = 3  # traced, and as many timed

_times: dict[str, float] | None = None


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@contextlib.contextmanager
def span(name: str) -> Iterator[None]:
    """Names a part of the step in traces. Inside `timed` it also measures the part and waits for the device."""
    if _times is None:
        with record_function(name):
            yield
        return
    _synchronize()
    start = time.perf_counter()
    yield
    _synchronize()
    _times[name] = _times.get(name, 0.0) + time.perf_counter() - start


@contextlib.contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Seconds of every span inside, by name, and of everything as "step".

    The spans wait for the device at both ends, so that the parts add up. The step is a little slower for that.
    """
    global _times
    _synchronize()
    start = time.perf_counter()
    times: dict[str, float] = {}
    _times = times
    try:
        yield times
    finally:
        _times = None
        _synchronize()
        times["step"] = time.perf_counter() - start


def table(seconds: dict[str, float], steps: int = 1, communication: float | None = None) -> str:
    """Milliseconds a step and shares of it, as text.

    Args:
        seconds: what `timed` measured.
        steps: how many steps that was.
        communication: seconds of the collectives, or None for one process.
    """
    whole = seconds["step"]
    rows = [(name, seconds.get(name, 0.0)) for name in PARTS]
    rows.append(("other", whole - sum(value for _, value in rows)))
    lines = [f"{name:16} {1e3 * value / steps:10.2f} ms {value / whole:7.1%}" for name, value in rows]
    lines.append(f"{'step':16} {1e3 * whole / steps:10.2f} ms {1:7.1%}")
    if communication is not None:
        lines.append(f"{'communication':16} {1e3 * communication / steps:10.2f} ms, most of it while backward runs")
    return "\n".join(lines)


class StepProfile:
    """Traces STEPS steps, then measures as many.

    Args:
        after: the number of steps before.
        folder: where trace.json and table.txt go.
        write: whether this process writes them. Every process of the run calls `before_step` at the same steps.
    """

    def __init__(self, after: int, folder: Path, write: bool) -> None:
        self.after, self.folder, self.write = after, folder, write
        self.seconds: dict[str, float] = {}
        self._communication = 0.0
        self._profile: profile | None = None
        self._timed: contextlib.ExitStack | None = None

    def before_step(self, done: int) -> str | None:
        """What to do when `done` steps of this process are done. Returns the table once there is one."""
        if done == self.after:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._profile = profile(activities=activities)
            self._profile.start()
        elif done == self.after + STEPS:
            self._end_trace()
            self._timed = contextlib.ExitStack()
            self.seconds = self._timed.enter_context(timed())
        elif done == self.after + 2 * STEPS:
            return self._end_table()
        return None

    def _end_trace(self) -> None:
        trace = self._profile
        assert trace is not None  # before_step started it
        _synchronize()
        trace.stop()
        for event in trace.key_averages():
            if event.key.startswith("ncclDevKernel"):  # a collective on a GPU is a kernel
                self._communication += 1e-6 * event.device_time_total
            elif event.key.startswith("gloo:"):
                self._communication += 1e-6 * event.cpu_time_total
        if self.write:
            self.folder.mkdir(parents=True, exist_ok=True)
            trace.export_chrome_trace(str(self.folder / "trace.json"))
        self._profile = None

    def _end_table(self) -> str:
        assert self._timed is not None  # before_step started it
        self._timed.close()
        communication = self._communication if torch.distributed.is_initialized() else None
        text = table(self.seconds, STEPS, communication)
        if self.write:
            (self.folder / "table.txt").write_text(text + "\n")
        return f"{text}\ntrace: {self.folder / 'trace.json'}"

    def close(self) -> None:
        """Ends what is still open. Training may end before the profile does."""
        if self._profile is not None:
            self._end_trace()
        if self._timed is not None:
            self._timed.close()


@contextlib.contextmanager
def profiled(after: int | None, folder: Path, write: bool, note: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Profiles some of the steps inside, as `StepProfile` does.

    Args:
        after: the number of steps before; None profiles nothing.
        folder: where the files go.
        write: whether this process writes them.
        note: takes the table.

    Yields:
        What to call before each step.
    """
    if after is None:
        yield lambda: None
        return
    profiler, steps = StepProfile(after, folder, write), itertools.count()

    def before_step() -> None:
        if text := profiler.before_step(next(steps)):
            note(text)

    with contextlib.closing(profiler):
        yield before_step
