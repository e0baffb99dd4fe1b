"""How runs are doing: what they say of themselves, what their metrics show, and what Slurm knows of their jobs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megafish.errors import InputError
from megafish.jobs import slurm
from megafish.jobs.prepare import Job, read_job
from megafish.jobs.reason import is_out_of_memory, last_attempt, reason_in_logs, tail
from megafish.life import Life, read_life
from megafish.run import RunDir

PENDING, RUNNING, COMPLETED, FAILED = "pending", "running", "completed", "failed"
OUT_OF_MEMORY, TIMED_OUT, PREEMPTED = "out of memory", "timed out", "preempted"
CANCELLED, STOPPED, LOST, NOT_STARTED = "cancelled", "stopped", "lost", "not started"

ACTIVE = (PENDING, RUNNING)
"""States in which a run needs nothing from anybody."""

# Bytes of metrics.jsonl that are read from its end: some dozens of steps.
_METRICS_TAIL = 1 << 14
# Seconds without a word after which a run on another machine counts as lost.
_SILENCE = 900.0

_SLURM_STATES = {
    "PENDING": PENDING, "REQUEUED": PENDING, "REQUEUE_HOLD": PENDING, "REQUEUE_FED": PENDING, "CONFIGURING": PENDING,
    "RESV_DEL_HOLD": PENDING, "SPECIAL_EXIT": PENDING,
    "RUNNING": RUNNING, "COMPLETING": RUNNING, "SUSPENDED": RUNNING, "STOPPED": RUNNING, "SIGNALING": RUNNING,
    "STAGE_OUT": RUNNING, "RESIZING": RUNNING,
    "TIMEOUT": TIMED_OUT, "DEADLINE": TIMED_OUT, "PREEMPTED": PREEMPTED, "CANCELLED": CANCELLED, "REVOKED": CANCELLED,
    "OUT_OF_MEMORY": OUT_OF_MEMORY, "FAILED": FAILED, "NODE_FAIL": FAILED, "BOOT_FAIL": FAILED,
}  # fmt: skip


@dataclass(frozen=True)
class RunStatus:
    """A run at one moment."""

    path: Path
    state: str
    """One of the words above."""
    step: int
    progress: float | None
    """Share of the budget that is used up."""
    loss: float | None
    """Of the last step that was reported [nats/token]."""
    valid_loss: float | None
    tokens_per_s: float | None
    seconds_left: float | None
    """While it runs: at the pace of the last steps."""
    reason: str | None
    """Why it waits, was stopped or failed."""
    job: str | None
    """Slurm's number."""


class SlurmView:
    """What Slurm knows of the caller's jobs, asked once for all runs."""

    def __init__(self, numbers: Iterable[str]) -> None:
        wanted = list(numbers)
        self.answers = bool(wanted) and slurm.available()
        self._entries: dict[str, slurm.QueueEntry] = {}
        self.complaint: str | None = None
        if self.answers:
            try:
                self._entries = slurm.queue()
            except InputError as error:
                self.answers, self.complaint = False, str(error)
                return
            self._entries |= slurm.history(number for number in wanted if number not in self._entries)

    def of(self, number: str) -> slurm.QueueEntry | None:
        """The entry of a job; None where Slurm has forgotten it or cannot be asked."""
        return self._entries.get(number)


def run_status(path: str | Path) -> RunStatus:
    """How one run is doing. InputError where there is no run."""
    return statuses([Path(path)])[0]


def job_runs(number: str) -> bool:
    """Does Slurm say that a job is running? Its batch script goes on for a moment after a run that is complete."""
    entry = SlurmView([number]).of(number)
    return entry is not None and _SLURM_STATES.get(entry.state) == RUNNING


def statuses(paths: Sequence[Path]) -> list[RunStatus]:
    """How runs are doing, in the order given; Slurm is asked once."""
    runs = [RunDir.existing(path) for path in paths]
    jobs = [read_job(run) for run in runs]
    view = SlurmView(job.number for job in jobs if job is not None and job.number is not None)
    return [_status(run, job, view) for run, job in zip(runs, jobs, strict=True)]


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The run directories at or below the paths. InputError for a path that has none."""
    found: list[Path] = []
    for path in paths:
        below = list(_runs_below(path))
        if not below:
            raise InputError(f"{path}: no run directory is there: name one, or a folder of several (default: runs)")
        found += below
    return found


def _runs_below(folder: Path, depth: int = 3) -> Iterable[Path]:
    if (folder / "config.yaml").is_file():
        yield folder
    elif folder.is_dir() and depth:
        for entry in sorted(folder.iterdir()):
            if entry.is_dir() and not entry.name.startswith("."):
                yield from _runs_below(entry, depth - 1)


def _status(run: RunDir, job: Job | None, view: SlurmView) -> RunStatus:
    life = read_life(run)
    train, valid = _last_records(run)
    state, reason = _state(run, life, job, view)
    if state in (FAILED, LOST, OUT_OF_MEMORY):
        starts = [*([life.started] if life else []), *([job.submitted] if job else [])]
        # The first process may only have seen that another one had gone.
        reason = reason_in_logs(run, max(starts, default=0.0)) or reason
        if state == FAILED and reason is not None and is_out_of_memory(reason):
            state = OUT_OF_MEMORY
    last = train[-1] if train else {}
    return RunStatus(
        path=run.path,
        state=state,
        step=last.get("step", 0),
        progress=1.0 if state == COMPLETED else last.get("progress"),
        loss=last.get("loss"),
        valid_loss=valid.get("valid_loss"),
        tokens_per_s=last.get("tokens_per_s") if state == RUNNING else None,
        seconds_left=_seconds_left(train, life) if state == RUNNING else None,
        reason=reason,
        job=job.number if job is not None else None,
    )


def _state(run: RunDir, life: Life | None, job: Job | None, view: SlurmView) -> tuple[str, str | None]:
    """The state, and why it is so."""
    if job is not None and job.number is not None:
        # A start by hand after the job counts more than the job.
        if life is None or life.job == job.number or life.started < job.submitted:
            return _state_in_slurm(run, life, job, view)
    elif job is not None and job.pid is not None and (life is None or life.started < job.submitted):
        if job.runs_here:
            return RUNNING, "starting"
        if job.host == os.uname().nodename:
            return FAILED, "ended before it took the run directory"
    return _state_of_life(run, life)


def _state_in_slurm(run: RunDir, life: Life | None, job: Job, view: SlurmView) -> tuple[str, str | None]:
    assert job.number is not None
    entry = view.of(job.number)
    own = life if life is not None and life.job == job.number else None
    if own is not None and own.state == COMPLETED:
        return COMPLETED, None
    if entry is None:
        # Not asked, or forgotten: what the batch script and the run have written is left.
        return _state_from_records(run, own, view)
    state = _SLURM_STATES.get(entry.state)
    if state == PENDING:
        return PENDING, entry.reason
    if state == RUNNING:
        return RUNNING, None if own is not None and own.state == RUNNING else "starting"
    if state is None:  # Slurm's COMPLETED: the script left with 0
        return _state_from_records(run, own, view)
    if own is not None and own.state == FAILED:
        return state, own.reason
    return state, f"Slurm: {entry.state}" + (f" ({entry.reason})" if entry.reason != "None" else "")


def _state_from_records(run: RunDir, life: Life | None, view: SlurmView) -> tuple[str, str | None]:
    attempt = last_attempt(run)
    if life is not None and life.state != RUNNING:
        return _state_of_life(run, life)
    if attempt is not None and (life is None or float(str(attempt["time"])) >= life.started):
        return FAILED, f"exit code {attempt['code']}"
    if not view.answers:
        said = view.complaint or "squeue is not on this machine"
        return LOST, f"Slurm cannot be asked: {said}"
    return LOST, "Slurm does not know the job any more"


def _state_of_life(run: RunDir, life: Life | None) -> tuple[str, str | None]:
    """What the run itself says, checked against the process that said it."""
    if life is None:
        return NOT_STARTED, None
    if life.state != RUNNING:
        return life.state, life.reason
    if life.here:
        return (RUNNING, None) if life.alive else (FAILED, f"process {life.pid} ended without a word")
    silent = time.time() - (run.metrics_file.stat().st_mtime if run.metrics_file.is_file() else life.started)
    if silent < _SILENCE:
        return RUNNING, None
    return LOST, f"no word from {life.host} for {silent / 3600:.1f} h"


def _last_records(run: RunDir) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The last records of training steps, and the last one of a validation (empty if none is near the end)."""
    train, valid = [], {}
    if run.metrics_file.is_file():
        for line in tail(run.metrics_file, _METRICS_TAIL):
            try:
                record = json.loads(line)
            except ValueError:
                continue  # cut off at the start of the tail, or being written
            if record["kind"] == "train":
                train.append(record)
            elif record["kind"] == "valid":
                valid = record
    return train, valid


def _seconds_left(train: list[dict[str, Any]], life: Life | None) -> float | None:
    """Seconds to the end of the budget, at the pace of the steps of this start that the records show."""
    own = [record for record in train if life is None or record["time"] >= life.started]
    if len(own) < 2 or "progress" not in own[0]:
        return None
    done = own[-1]["progress"] - own[0]["progress"]
    if done <= 0:
        return None
    left = (1 - own[-1]["progress"]) * (own[-1]["time"] - own[0]["time"]) / done
    return max(left - (time.time() - own[-1]["time"]), 0.0)
