"""`megafish doctor`: parts and checks as tables, or as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megafish.doctor.parts import Part, inspect_machine
from megafish.doctor.selftest import Check, run_checks

_COLOURS = {"ok": "green", "missing": "yellow", "broken": "red", "unused": "dim"}


def examine(*, test: bool = True, as_json: bool = False, console: Console | None = None) -> bool:
    """Look at the machine, run the self-test, print both. Whether megafish can work here."""
    console = console or Console()
    parts = inspect_machine(Path())
    faults = [part.name for part in parts if part.fault]
    # With a part missing that everything needs, every check would only say so again.
    checks = run_checks() if test and not faults else []
    healthy = not faults and all(check.passed for check in checks)
    if as_json:
        found = {"healthy": healthy, "parts": [asdict(part) for part in parts], "checks": [asdict(c) for c in checks]}
        print(json.dumps(found, indent=2))
        return healthy
    for table in _tables(parts):
        console.print(table)
    if checks:
        console.print(_checks_table(checks))
    for part in parts:
        if part.remedy is not None:
            console.print(f"{part.name}, for {part.purpose}: {part.remedy}", highlight=False, markup=False)
    if faults:
        console.print(f"not able to work: {', '.join(faults)}; then again: megafish doctor", highlight=False)
    elif not healthy:
        failed = ", ".join(check.name for check in checks if not check.passed)
        console.print(f"the self-test fails: {failed}; mend it before training anything", highlight=False)
    else:
        console.print("next: megafish demo (the whole path on real text, minutes)", highlight=False)
    return healthy


def _tables(parts: list[Part]) -> list[Table]:
    tables = []
    for group, members in groupby(parts, lambda part: part.group):
        table = Table("", "", "", title=group, title_justify="left", show_header=False)
        for part in members:
            state = f"[{_COLOURS[part.state]}]{part.state}[/]"
            table.add_row(part.name, state, part.detail, part.purpose)
        tables.append(table)
    return tables


def _checks_table(checks: list[Check]) -> Table:
    table = Table(title="self-test", title_justify="left", show_header=False)
    for check in checks:
        state = "[green]passed[/]" if check.passed else "[red]failed[/]"
        table.add_row(check.name, state, check.detail, f"{check.seconds:.1f} s")
    return table
