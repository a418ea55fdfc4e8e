# SPDX-License-Identifier: Apache-2.0
"""How far a run is: a bar by tqdm where it is installed, else a line every so often."""

from __future__ import annotations

import contextlib
import time
from typing import Any

PAUSE = 30.0  # seconds between lines without tqdm


def clock(seconds: float) -> str:
    """Minutes and seconds, or hours too.

    Examples:
        >>> clock(83.4), clock(7384)
        ('1:23', '2:03:04')
    """
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _import_tqdm() -> Any | None:
    try:
        from tqdm import tqdm
    except ImportError:  # it is optional
        return None
    return tqdm


class Progress:
    """The share of a run that is done, and the time that is left.

    With a time limit, the share is that of the time or of the steps, whichever ends the run first.

    Args:
        step: steps done before.
        total: steps of the whole run.
        limit: seconds that this process trains at most; None has no limit.
    """

    def __init__(self, step: int, total: int, limit: float | None) -> None:
        self.first, self.total, self.limit = step, total, limit
        self.start = self._told = time.monotonic()
        self._text = ""
        tqdm = _import_tqdm()
        self._bar: Any | None = None
        if tqdm is None:
            return
        options: dict[str, Any] = {"dynamic_ncols": True, "mininterval": 0.5}
        if limit is None:
            self._bar = tqdm(total=total, initial=step, unit="step", **options)
        else:
            shown = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
            self._bar = tqdm(total=limit, bar_format=shown, smoothing=0, **options)

    def share(self, step: int, elapsed: float) -> float:
        """The share of what this process has to do that is done, in [0, 1]."""
        steps = (step - self.first) / max(self.total - self.first, 1)
        return min(1.0, steps if self.limit is None else max(steps, elapsed / self.limit))

    def update(self, step: int, text: str | None = None) -> None:
        """Shows that `step` steps are done.

        Args:
            step: as counted from the start of the run.
            text: what to show with it from now on; None keeps the last one.
        """
        self._text = self._text if text is None else text
        now = time.monotonic()
        with contextlib.suppress(OSError):  # the terminal is gone, and training goes on without it
            if self._bar is None:
                if step == self.first + 1 or step == self.total or now - self._told >= PAUSE:
                    self._told = now
                    print(self.line(step, now - self.start), flush=True)
                return
            if text is not None:
                shown = text if self.limit is None else f"step {step} of {self.total}, {text}"
                self._bar.set_postfix_str(shown, refresh=False)
            if self.limit is None:
                self._bar.update(step - self._bar.n)
            else:
                self._bar.update(self.limit * self.share(step, now - self.start) - self._bar.n)

    def line(self, step: int, elapsed: float) -> str:
        """What is shown without a bar."""
        done = self.share(step, elapsed)
        left = f", about {clock(elapsed / done - elapsed)} left" if done else ""
        text = f", {self._text}" if self._text else ""
        return f"step {step} of {self.total}, {clock(elapsed)} elapsed{left}{text}"

    def note(self, text: str) -> None:
        """A line above the bar."""
        with contextlib.suppress(OSError):  # the terminal, or the reader of a pipe, is gone
            if self._bar is None:
                print(text, flush=True)
            else:
                self._bar.write(text)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()
