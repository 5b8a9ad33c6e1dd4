"""The one progress line: what runs, how far, how fast, how long still. A terminal sees it redrawn, a log seldom."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO


class Progress:
    """A progress line over `total` units of work; a context manager. Work that is done within so many seconds of
    `patience` is not spoken of.

    >>> import io
    >>> with Progress("train", total=2, stream=io.StringIO()) as progress:
    ...     progress.update(1, loss=2.5)
    ...     progress.update(1)
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        unit: str = "step",
        done: int = 0,
        stream: TextIO | None = None,
        quiet: bool = False,
        patience: float = 0.0,
    ) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self.quiet, self.patience = quiet, patience
        self.stream = stream or sys.stderr
        self.redraws = self.stream.isatty()
        self.first, self.started, self.drawn, self.shown = done, time.monotonic(), 0.0, ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.draw(final=True)

    def update(self, amount: int = 1, **facts: float | int | str) -> None:
        """Count `amount` more units as done and show `facts` (`loss=…`) beside them."""
        self.done += amount
        self.shown = (
            "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items()) or self.shown
        )
        if time.monotonic() - self.drawn > (0.1 if self.redraws else 15.0):
            self.draw()

    def line(self) -> str:
        """The text of the line now."""
        seconds = time.monotonic() - self.started
        rate = (self.done - self.first) / seconds if seconds > 0 else 0.0
        left = f"{clock(self.left(seconds))} left" if rate > 0 and self.done < self.total else clock(seconds)
        speed = f"{rate:.3g} {self.unit}/s" if rate >= 1 or rate == 0 else f"{1 / rate:.3g} s/{self.unit}"
        parts = [f"{self.title}  {self.done}/{self.total}", self.shown, speed, left]
        return "  ".join(p for p in parts if p)

    def left(self, seconds: float) -> float:
        """Seconds still to go, where so many are over: as fast as it went so far, on an average."""
        return seconds * (self.total - self.done) / (self.done - self.first)

    def draw(self, final: bool = False) -> None:
        """Write the line to the stream."""
        if self.quiet or (not self.drawn and time.monotonic() - self.started < self.patience):
            return
        self.drawn = time.monotonic()
        if self.redraws:
            self.stream.write("\r\x1b[2K" + self.line() + ("\n" if final else ""))
        else:
            self.stream.write(self.line() + "\n")
        self.stream.flush()


class StepProgress(Progress):
    """Of steps that are done one by one, all alike but for some: the first warms up, or answers are written that many
    learn from. The one that took longest is no measure for the rest.
    """

    def __init__(self, title: str, total: int, **options: Any) -> None:
        super().__init__(title, total, **options)
        self.ended, self.longest = self.started, 0.0

    def update(self, amount: int = 1, **facts: float | int | str) -> None:
        """One more step is done."""
        now = time.monotonic()
        self.longest, self.ended = max(self.longest, now - self.ended), now
        super().update(amount, **facts)

    def left(self, seconds: float) -> float:
        """By the other steps, and the longest in proportion to what is still to do."""
        done, rest = self.done - self.first, self.total - self.done
        if done == 1:
            return super().left(seconds)
        return rest * (seconds - self.longest) / (done - 1) + self.longest * rest / self.total


def clock(seconds: float) -> str:
    """Seconds as people read them.

    >>> clock(42), clock(185), clock(7300)
    ('42s', '3m05s', '2h01m')
    """
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
