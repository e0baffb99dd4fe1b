"""A sweep on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megafish.jobs.table import STYLES
from megafish.sweep.folder import Entry, ranked
from megafish.sweep.spec import Sweep


def print_entries(sweep: Sweep, entries: list[Entry]) -> None:
    """One line a run, the best first."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(100, *(len(e.run.name) + len(e.status.reason or "") + 80 for e in entries)))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (("run", "left"), ("state", "left"), ("step", "right"), ("loss", "right")):
        table.add_column(name, justify="right" if justify == "right" else "left", overflow="fold")
    table.add_column(sweep.metric.name, justify="right")
    table.add_column("why", overflow="fold")
    for entry in ranked(entries, sweep.metric):
        status = entry.status
        table.add_row(
            entry.run.name,
            f"[{STYLES[status.state]}]{status.state}[/]",
            f"{status.step:,}",
            "" if status.loss is None else f"{status.loss:.4f}",
            "" if entry.metric is None else f"{entry.metric:.4f}",
            escape(status.reason or ""),
        )
    console.print(table)
