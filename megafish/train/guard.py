"""Stopping on request: a signal asks, the loop answers at the next boundary. The exit codes of a run.

Imports nothing heavy: the handlers are there before torch and DeepSpeed, whose import takes seconds.
"""

from __future__ import annotations

import signal
import time
from types import FrameType

EXIT_DIVERGED = 65
"""Going back to a checkpoint did not help against bad steps (EX_DATAERR of sysexits.h)."""
EXIT_RECITES = 69
"""More canaries are recited than eval.recited_limit allows (EX_UNAVAILABLE of sysexits.h)."""
EXIT_CORRUPT = 74
"""Replicas of the weights differ: a device or its memory is at fault (EX_IOERR of sysexits.h)."""
EXIT_STALLED = 75
"""The watchdog ended a run that made no progress (EX_TEMPFAIL of sysexits.h: try again)."""

# A terminal sends Ctrl-C to every process of its group, and torchrun sends it to its workers once more.
_SAME_CTRL_C = 1.0


class StopRequest:
    """Remembers the first signal that asks to stop, so that a run ends with a complete checkpoint.

    SIGTERM is what launchers and preemption send, SIGINT is Ctrl-C, SIGUSR1 and SIGUSR2 are what `sbatch --signal`
    sends ahead of the time limit. A second Ctrl-C raises KeyboardInterrupt at once, for a user who does not want to
    wait. The handlers that were there before come back on exit.
    """

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._at = 0.0

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._remember) for number in self.signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._at = signal.Signals(number), now
        elif number == signal.SIGINT and now - self._at > _SAME_CTRL_C:
            raise KeyboardInterrupt
