"""The folder of a sweep, runs/NAME: what it is, which of its runs are there, and how they are doing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megafish.config_yaml import dump_yaml, read_tree
from megafish.errors import InputError
from megafish.jobs.prepare import Prepared, create, refuse_another
from megafish.jobs.reason import tail
from megafish.jobs.status import ACTIVE, COMPLETED, NOT_STARTED, RunStatus, statuses
from megafish.run import RunDir, read_json, write_atomic
from megafish.sweep.expand import RUNS, SweepRun
from megafish.sweep.spec import Metric, Sweep

SHEET = "sweep.yaml"
_TAIL = 1 << 16
"""Bytes at the end of metrics.jsonl that are read first."""


@dataclass(frozen=True)
class Entry:
    """A run of a sweep, and how it is doing."""

    run: SweepRun
    status: RunStatus
    metric: float | None
    """What it is ranked by; None as long as it has not been measured."""


def folder_of(sweep: Sweep) -> Path:
    """Where the runs of a sweep lie."""
    return RUNS / sweep.name


def claim(sweep: Sweep, file: Path, overrides: list[str]) -> None:
    """Make the sweep's folder, or make sure that it is this sweep's. InputError for two sweeps with one name.

    The same file may have changed since: it may have more runs, and a run that would be another one is refused by
    itself.
    """
    sheet = folder_of(sweep) / SHEET
    tree = {"file": str(file), "overrides": overrides, **sweep.model_dump(mode="json")}
    if sheet.is_file():
        before = read_tree(sheet)
        if before != tree and before.get("file") != str(file):
            raise InputError(
                f"{sheet.parent} holds the sweep of {before.get('file')}, which is another one: give this one another "
                "name: in its file"
            )
    sheet.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(sheet, dump_yaml(tree))


def recorded_overrides(sweep: Sweep) -> list[str] | None:
    """Settings of the command line that the sweep was last started with; None before its first start."""
    sheet = folder_of(sweep) / SHEET
    if not sheet.is_file():
        return None
    return [str(word) for word in read_tree(sheet).get("overrides", [])]


def refuse_other_runs(runs: list[SweepRun]) -> None:
    """InputError where the directory of a run holds a run with other settings."""
    for run in runs:
        refuse_another(RunDir(run.path), run.config)


def create_run(run: SweepRun) -> None:
    """Make the directory of a run, with its configuration."""
    create(Prepared(RunDir(run.path), run.config, ()))


def survey(runs: list[SweepRun], metric: Metric) -> list[Entry]:
    """How all runs are doing; those that have no directory yet too."""
    there = [run for run in runs if (run.path / "config.yaml").is_file()]
    known = dict(zip((run.path for run in there), statuses([run.path for run in there]), strict=True))
    entries = []
    for run in runs:
        status = known.get(run.path) or _not_started(run.path)
        entries.append(Entry(run, status, metric_of(RunDir(run.path), metric.name) if run.path in known else None))
    return entries


def _not_started(path: Path) -> RunStatus:
    return RunStatus(path, NOT_STARTED, 0, None, None, None, None, None, None, None)


def to_start(entries: list[Entry]) -> list[SweepRun]:
    """The runs that are neither complete nor waiting nor running."""
    return [entry.run for entry in entries if entry.status.state not in (COMPLETED, *ACTIVE)]


def ranked(entries: list[Entry], metric: Metric) -> list[Entry]:
    """The best first, those without a value last."""
    sign = 1 if metric.goal == "minimize" else -1
    return sorted(entries, key=lambda entry: (entry.metric is None, sign * (entry.metric or 0.0)))


def metric_of(run: RunDir, name: str) -> float | None:
    """The last value of a key of metrics.jsonl, or audit.KEY.KEY of the newest audit; None where there is none."""
    if name.startswith("audit."):
        return _audited(run, name.removeprefix("audit.").split("."))
    if not run.metrics_file.is_file():
        return None
    # The file of a long run is large, and the last value mostly near its end.
    for size in (_TAIL, run.metrics_file.stat().st_size):
        for line in reversed(tail(run.metrics_file, size)):
            if f'"{name}"' not in line:
                continue
            try:
                value = json.loads(line).get(name)
            except ValueError:
                continue  # cut off by a kill, or where the tail begins
            if isinstance(value, (int, float)):
                return float(value)
    return None


def _audited(run: RunDir, keys: list[str]) -> float | None:
    summaries = sorted(run.audit.glob("step_*/summary.json"))
    found: Any = read_json(summaries[-1]) if summaries else None
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return float(found) if isinstance(found, (int, float)) and not isinstance(found, bool) else None
