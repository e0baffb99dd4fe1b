"""`megafish doctor`: parts and checks as tables, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megafish.doctor.part import Part
from megafish.doctor.parts import inspect_machine
from megafish.doctor.selftest import run_checks
from megafish.progress import table_console

_COLOURS = {"ok": "green", "missing": "yellow", "broken": "red", "unused": "dim"}


def examine(*, test: bool = True, as_json: bool = False, console: Console | None = None) -> bool:
    """Look at the machine, run the self-test, print both. Whether megafish can work here."""
    parts, torch = inspect_machine(Path())
    faults = [part for part in parts if part.fault]
    # With a part missing that everything needs, every check would only say so again.
    checks = run_checks(len(torch.gpus)) if test and not faults else []
    healthy = not faults and all(check.passed for check in checks)
    what_next = _next(faults, healthy)
    if as_json:
        found = {
            "healthy": healthy,
            "parts": [asdict(part) for part in parts],
            "checks": [asdict(check) for check in checks],
            "next": what_next,
        }
        print(json.dumps(found, indent=2))
        return healthy
    longest = [len(part.name) + len(part.detail) + len(part.purpose) for part in parts]
    longest += [len(check.name) + len(check.detail) for check in checks]
    console = table_console(max([120, *(length + 60 for length in longest)]), console)
    for group, members in groupby(parts, lambda part: part.group):
        rows = [(p.name, f"[{_COLOURS[p.state]}]{p.state}[/]", escape(p.detail), p.purpose) for p in members]
        _print_table(console, group, rows)
    if checks:
        states = ("[red]failed[/]", "[green]passed[/]")
        rows = [(c.name, states[c.passed], escape(c.detail), f"{c.seconds:.1f} s") for c in checks]
        _print_table(console, "self-test", rows)
    for part in parts:
        if part.remedy is not None:
            _line(console, f"{part.name}, for {part.purpose}: {part.remedy}")
    if faults:
        _line(console, f"not able to work: {', '.join(part.name for part in faults)}")
    elif not healthy:
        failed = ", ".join(check.name for check in checks if not check.passed)
        _line(console, f"the self-test fails: {failed}; mend it before training anything")
    _line(console, f"next: {what_next}")
    return healthy


def _next(faults: Sequence[Part], healthy: bool) -> str:
    if healthy:
        return "megafish demo (the whole path on real text, minutes)"
    remedies = dict.fromkeys(part.remedy for part in faults if part.remedy is not None)
    return " && ".join([*remedies, "megafish doctor"])


def _print_table(console: Console, title: str, rows: Sequence[tuple[str, str, str, str]]) -> None:
    # In a log, a frame is noise.
    table = Table(title=title, title_justify="left", show_header=False)
    if not console.is_terminal:
        table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    for _ in range(4):
        table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _line(console: Console, text: str) -> None:
    # Not wrapped: commands are copied from here.
    console.print(text, highlight=False, markup=False, soft_wrap=True)
