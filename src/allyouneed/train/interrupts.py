"""Being asked to stop: SIGINT (Ctrl-C) and SIGTERM let a step finish."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType


class Stopped(KeyboardInterrupt):
    """A run left off because it was asked to, everything saved. `exit_code` is the shell's: 130 or 143."""

    def __init__(self, signum: int, line: str) -> None:
        super().__init__(f"{signal.Signals(signum).name}: {line}")
        self.exit_code = 128 + signum


class Interrupts:
    """Notes the first signal in `received`; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.received = 0  # the signal's number, 0 for none

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """The handler."""
        if not self.received:
            self.received = signum
            if signum == signal.SIGINT and sys.stderr.isatty():  # what a step waits for may take minutes
                with suppress(OSError):
                    os.write(sys.stderr.fileno(), b"\nstopping after this step; Ctrl-C again stops at once\n")
        elif signum == signal.SIGINT:
            raise KeyboardInterrupt


@contextmanager
def watched() -> Iterator[Interrupts]:
    """Within, signals are noted instead of obeyed. Outside the main thread, which alone hears them, nothing changes.

    Raises:
        Stopped: at the end, for a signal that came too late for anyone within to heed it.
    """
    interrupts, before = Interrupts(), {}
    if threading.current_thread() is threading.main_thread():
        before = {s: signal.signal(s, interrupts) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupts
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if interrupts.received:
        raise Stopped(interrupts.received, "the run had just ended")
