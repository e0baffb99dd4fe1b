"""`megafish status` on the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.markup import escape
from rich.table import Table

from megafish.jobs.status import (
    CANCELLED,
    COMPLETED,
    FAILED,
    LOST,
    NOT_STARTED,
    OUT_OF_MEMORY,
    PENDING,
    PREEMPTED,
    RUNNING,
    STOPPED,
    TIMED_OUT,
    RunStatus,
)
from megafish.progress import table_console

STYLES = {
    PENDING: "yellow", RUNNING: "cyan", COMPLETED: "green", FAILED: "red", OUT_OF_MEMORY: "red", TIMED_OUT: "magenta",
    PREEMPTED: "magenta", STOPPED: "magenta", CANCELLED: "magenta", LOST: "red", NOT_STARTED: "dim",
}  # fmt: skip


def print_table(found: Sequence[RunStatus]) -> None:
    """One line a run; under a pipe as wide as it has to be."""
    console = table_console(max(120, *(len(str(s.path)) + len(s.reason or "") + 90 for s in found)))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, side in (
        ("run", "left"), ("state", "left"), ("step", "right"), ("done", "right"), ("tokens/s", "right"),
        ("loss", "right"), ("left", "right"), ("job", "left"), ("why", "left"),
    ):  # fmt: skip
        table.add_column(name, justify="right" if side == "right" else "left", overflow="fold")
    for status in found:
        table.add_row(
            escape(str(status.path)),
            f"[{STYLES[status.state]}]{status.state}[/]",
            f"{status.step:,}",
            "" if status.progress is None else f"{status.progress:.0%}",
            "" if status.tokens_per_s is None else f"{status.tokens_per_s:,.0f}",
            "" if status.loss is None else f"{status.loss:.3f}",
            "" if status.seconds_left is None else format_duration(status.seconds_left),
            status.job or "",
            escape(status.reason or ""),
        )
    console.print(table)


def print_json(found: Sequence[RunStatus]) -> None:
    """One object a line, for scripts."""
    for status in found:
        print(json.dumps({**asdict(status), "path": str(status.path)}))


def advice(found: Sequence[RunStatus]) -> str:
    """What to do next, for the first run that needs something."""
    for status in found:
        if status.state in (FAILED, OUT_OF_MEMORY, LOST):
            return f"megafish logs {status.path}"
        if status.state in (TIMED_OUT, PREEMPTED, STOPPED, CANCELLED, NOT_STARTED):
            return f"megafish train {status.path}, or its launcher again, to continue it"
    for status in found:
        if status.state == RUNNING:
            return f"megafish logs {status.path} --follow"
    for status in found:
        if status.state == PENDING:
            return f"megafish status {status.path}, later"
    return f"megafish audit {found[0].path}"


def format_duration(seconds: float) -> str:
    """40 s, 12 min, 3.5 h or 2.1 d."""
    for size, unit in ((86400, "d"), (3600, "h")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"
