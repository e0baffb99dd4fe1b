"""What the processes of a run printed."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from megafish.errors import InputError
from megafish.jobs.deepspeed import RANK_LOGS
from megafish.jobs.status import ACTIVE, job_runs, run_status
from megafish.run import RunDir

_BEAT = 0.5
# Bytes at the end of a log in which the last lines are looked for.
_END = 1 << 22
# Seconds between questions whether the run goes on: Slurm does not like to be asked often.
_ASK = 10.0


def awaited(run: RunDir, rank: int | None) -> Path:
    """`log_file`, once the run that waits or starts has one."""
    while True:
        try:
            return log_file(run, rank)
        except InputError:
            if run_status(run.path).state not in ACTIVE:
                raise
        time.sleep(_ASK / 5)


def log_file(run: RunDir, rank: int | None) -> Path:
    """The log of a process, or (None) the newest of the batch script's. InputError where it is not there."""
    if rank is None:
        scripts = sorted(run.logs.glob("slurm_*.log"), key=lambda log: log.stat().st_mtime)
        if not scripts:
            raise InputError(f"{run.logs}: no log of a batch script: `megafish launch slurm` jobs have one")
        return scripts[-1]
    log = run.log_of(rank)
    by_deepspeed = sorted((run.logs / RANK_LOGS).glob(f"*_rank{rank}.log"))  # TIME_rank0.log: the newest is last
    if by_deepspeed and not log.is_file():
        return by_deepspeed[-1]
    if not log.is_file():
        there = sorted(int(entry.stem.rpartition("_")[2]) for entry in run.logs.glob("rank_*.log"))
        known = f"there are ranks {there[0]} to {there[-1]}" if there else "`megafish launch` writes logs"
        raise InputError(f"{run.path}: no log of rank {rank}: {known}")
    return log


def show(run: RunDir, log: Path, *, lines: int, follow: bool) -> None:
    """Print the last lines of a log; with `follow` go on until the run neither waits nor runs, and its batch script,
    whose last line says what became of it, has ended too."""
    with open(log, "rb") as file:
        file.seek(max(log.stat().st_size - _END, 0))
        for line in file.read().splitlines(keepends=True)[-lines:] if lines else []:
            _print(line)
        asked = time.monotonic()
        while follow:
            if block := file.read():
                _print(block)
                continue
            if time.monotonic() - asked > _ASK:
                asked = time.monotonic()
                status = run_status(run.path)
                if status.state not in ACTIVE and not (status.job and job_runs(status.job)):
                    _print(file.read())
                    return
            time.sleep(_BEAT)


def _print(block: bytes) -> None:
    sys.stdout.buffer.write(block)
    sys.stdout.buffer.flush()
