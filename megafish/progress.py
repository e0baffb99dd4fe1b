"""How long work shows that it is alive: a bar on a terminal, an occasional plain line everywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_DRAWINGS = 0.1
_BINARY = ("", "Ki", "Mi", "Gi", "Ti")
_DECIMAL = ("", "k", "M", "G", "T")


def table_console(width: int = 240, console: Console | None = None) -> Console:
    """For tables: under a pipe `width` characters wide, so that none of their cells is cut. console: where they go."""
    from rich.console import Console

    console = console or Console()
    return console if console.is_terminal else Console(file=console.file, width=width)


def format_quantity(value: float, unit: str) -> str:
    """`value` with a prefix and its unit: bytes in powers of 1024, everything else in powers of 1000."""
    base, prefixes = (1024.0, _BINARY) if unit == "B" else (1000.0, _DECIMAL)
    step = 0
    while abs(value) >= base and step < len(prefixes) - 1:
        value /= base
        step += 1
    number = f"{value:.0f}" if step == 0 and value == int(value) else f"{value:.1f}"
    return f"{number} {prefixes[step]}{unit}".rstrip()


def format_seconds(seconds: float) -> str:
    """A duration as m:ss or h:mm:ss."""
    minutes, second = divmod(int(seconds + 0.5), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


class Track:
    """Progress of one piece of work. Made by `track`; `advance` and `set` report, the rest is display.

    The rate is that of this process: work found done already (`set(..., already_done=True)`) counts towards the total
    but not towards the rate, so that the time left is honest after a resume.
    """

    def __init__(self, total: float | None, description: str, unit: str, enabled: bool, stream: IO[str] | None) -> None:
        self.total = total
        self.done = 0.0
        self._description = description
        self._unit = unit
        self._stream = stream if stream is not None else sys.stderr
        self._enabled = enabled
        self._already = 0.0
        self._start = time.monotonic()
        self._shown = self._start
        self._bar: _Bar | None = (
            _Bar(self._stream, description, total) if enabled and _is_terminal(self._stream) else None
        )

    def advance(self, amount: float = 1.0) -> None:
        """Count `amount` more units as done."""
        self.set(self.done + amount)

    def set(self, done: float, already_done: bool = False) -> None:
        """Count `done` units in all as done; `already_done`: they were done before this process started."""
        if already_done:
            self._already += done - self.done
        self.done = done
        if not self._enabled:
            return
        # Cheap enough to be called for every document: most calls end here.
        now = time.monotonic()
        if now - self._shown < (_SECONDS_BETWEEN_LINES if self._bar is None else _SECONDS_BETWEEN_DRAWINGS):
            return
        self._shown = now
        if self._bar is not None:
            self._bar.update(done, self._status())
        else:
            self._line(self._status())

    def note(self, text: str) -> None:
        """Print one line beside the bar."""
        if self._bar is not None:
            self._bar.note(text)
        elif self._enabled:
            self._line(text)

    def _line(self, text: str) -> None:
        print(f"{self._description}: {text}", file=self._stream, flush=True)

    def _status(self) -> str:
        elapsed = time.monotonic() - self._start
        rate = (self.done - self._already) / elapsed if elapsed > 0 else 0.0
        parts = [format_quantity(self.done, self._unit)]
        if self.total:
            parts[0] += f" of {format_quantity(self.total, self._unit)} ({100 * min(self.done / self.total, 1):.0f} %)"
        parts.append(f"{format_quantity(rate, self._unit)}/s")
        if self.total and rate > 0:
            parts.append(f"{format_seconds(max(self.total - self.done, 0.0) / rate)} left")
        return ", ".join(parts)

    def _close(self, failed: bool) -> None:
        elapsed = time.monotonic() - self._start
        if self._bar is not None:
            self._bar.close(self.done, self._status())
        elif self._enabled and not failed and elapsed >= _SECONDS_BETWEEN_LINES:
            what = f"{format_quantity(self.done, self._unit)} in " if self.done else ""
            self._line(what + format_seconds(elapsed))


class _Bar:
    """The rich side of `Track`, imported only when there is a terminal to draw on."""

    def __init__(self, stream: IO[str], description: str, total: float | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[status]}"),
            console=Console(file=stream),
            refresh_per_second=5,
        )
        self._task = self._progress.add_task(description, total=total or None, status="")
        self._progress.start()

    def update(self, done: float, status: str) -> None:
        self._progress.update(self._task, completed=done, status=status)

    def note(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def close(self, done: float, status: str) -> None:
        self.update(done, status)
        self._progress.stop()


def _is_terminal(stream: IO[str]) -> bool:
    return bool(getattr(stream, "isatty", lambda: False)())


@contextmanager
def track(
    total: float | None, description: str, unit: str = "", *, enabled: bool = True, stream: IO[str] | None = None
) -> Iterator[Track]:
    """Show the progress of the work inside the `with` block on `stream` (default: standard error).

    `total` is in `unit`s, None where it is not known ("B" is shown in powers of 1024). On a terminal there is a bar
    with rate and time left; elsewhere at most one plain line every 10 s, so that job logs stay readable, and none for
    work that is over sooner. `enabled=False` shows nothing.
    """
    tracker = Track(total, description, unit, enabled, stream)
    try:
        yield tracker
    except BaseException:
        tracker._close(failed=True)
        raise
    tracker._close(failed=False)


__all__ = ["Track", "format_quantity", "format_seconds", "track"]
