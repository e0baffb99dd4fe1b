"""Stopping runs, wherever they run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from megafish.errors import InputError
from megafish.jobs import slurm
from megafish.jobs.prepare import read_job
from megafish.jobs.status import ACTIVE, statuses
from megafish.life import read_life
from megafish.run import RunDir


def cancel_runs(paths: list[Path]) -> list[str]:
    """Ask runs to stop; one line each on what was done. InputError where one cannot be reached from this machine."""
    said = []
    for status in statuses(paths):
        if status.state not in ACTIVE:
            said.append(f"{status.path}: neither waits nor runs ({status.state})")
        else:
            said.append(f"{status.path}: {_cancel(RunDir(status.path))}")
    return said


def _cancel(run: RunDir) -> str:
    job, life = read_job(run), read_life(run)
    if job is not None and job.number is not None and (life is None or life.started < job.submitted or life.job):
        slurm.cancel([job.number])
        return f"job {job.number} cancelled"
    if job is not None and job.runs_here:
        assert job.pid is not None
        os.kill(job.pid, signal.SIGTERM)
        return f"SIGTERM sent to its launcher (process {job.pid}): it writes a checkpoint and ends"
    if life is not None and life.here and life.alive:
        os.kill(life.pid, signal.SIGTERM)
        return f"SIGTERM sent to process {life.pid}: it writes a checkpoint and ends"
    where = life.host if life is not None else job.host if job is not None else "another machine"
    raise InputError(f"{run.path}: runs on {where}: run this command there")
