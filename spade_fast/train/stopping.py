# SPDX-License-Identifier: Apache-2.0
"""Signals as a wish to stop that the training loop fulfils after the step it is in, by saving.

    SIGTERM            the scheduler, or kill; one more, a second or later after it, ends the program at once
    SIGINT             Ctrl-C; a second one ends the program at once, without saving
    SIGHUP             the terminal is gone; ignored where it is at the start, as under nohup
    SIGUSR1, SIGUSR2   a warning before the end of a job's time, as of Slurm's --signal

Any other second signal changes nothing. Nor does a SIGTERM within a second of the first: launchers and schedulers send
several to each process.
"""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Any

STOPPING = tuple(signal.Signals[name] for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"))

REPEATED = 1.0  # seconds within which a launcher's SIGTERM repeats the one that its process group got
STATUS_TERMINATED = 128 + signal.SIGTERM


class StopSignals:
    """While entered, keeps the first signal of STOPPING in `received`.

    A SIGINT after it raises KeyboardInterrupt. A SIGTERM that comes REPEATED seconds or more after an earlier SIGTERM
    or SIGINT raises SystemExit.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._asked: float | None = None  # when the first SIGTERM or SIGINT came
        self._previous: dict[int, Any] = {}  # the handlers before

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number in (signal.SIGTERM, signal.SIGINT):
            now = time.monotonic()
            if self._asked is None:
                self._asked = now
            elif now - self._asked >= REPEATED:
                raise SystemExit(STATUS_TERMINATED)
        if self.received is None:
            self.received = signal.Signals(number)

    def __enter__(self) -> StopSignals:
        for number in STOPPING:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def worker_signals(worker: int) -> None:
    """Signal handlers of a data-loading process. A signal to the process group must not end it before the last step.

    The process ignores the signals of STOPPING, except for a second SIGTERM, which ends it. The loader sends one to
    processes that do not end by themselves.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL))
