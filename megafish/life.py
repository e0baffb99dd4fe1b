"""What a run says of itself while it lives: status.json in its directory.

The main process writes it when it has taken the run directory and again when it leaves, so that `megafish status`, a
sweep or a script can tell a run that is done from one that was stopped, failed, or vanished without a word.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, fields
from signal import Signals
from types import TracebackType
from typing import Any

import psutil

from megafish.errors import InputError
from megafish.run import RunDir, read_json, write_atomic


@dataclass(frozen=True)
class Life:
    """status.json. Times are seconds since the epoch."""

    state: str
    """running, completed, stopped (by a signal, with a checkpoint), failed."""
    reason: str | None
    """Why it was stopped or failed, in one line."""
    host: str
    pid: int
    born: float
    """When the process `pid` was started: another one may have got its number since."""
    started: float
    ended: float | None
    processes: int
    job: str | None
    """Slurm's number of the job, where it is one."""

    @property
    def here(self) -> bool:
        """Whether the process is, or was, one of this machine."""
        return self.host == os.uname().nodename

    @property
    def alive(self) -> bool:
        """Whether the process is there. Only the machine that it runs on can tell (`here`)."""
        return is_alive(self.pid, self.born)


def read_life(run: RunDir) -> Life | None:
    """What the run last said, or None. InputError where the file is damaged."""
    if not run.status_file.is_file():
        return None
    found = read_json(run.status_file)
    names = {field.name for field in fields(Life)}
    if found.keys() != names:
        raise InputError(f"{run.status_file}: not written by this version of megafish: remove it")
    return Life(**found)


class Announcement:
    """Context that writes status.json for the process that holds the run; call `end` when training has ended.

    Left by an exception, the run has failed, and the exception's first line is the reason.
    """

    def __init__(self, run: RunDir, processes: int) -> None:
        self._run = run
        own = psutil.Process()
        self._life: dict[str, Any] = {
            "state": "running",
            "reason": None,
            "host": os.uname().nodename,
            "pid": own.pid,
            "born": own.create_time(),
            "started": time.time(),
            "ended": None,
            "processes": processes,
            "job": job_of_environment(),
        }

    def __enter__(self) -> Announcement:
        self._write()
        return self

    def end(self, signal: Signals | None) -> None:
        """The budget is used up, or `signal` stopped the run."""
        stopped = {"state": "stopped", "reason": f"stopped by {signal.name}" if signal else None}
        self._life |= stopped if signal else {"state": "completed"}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._life |= {"state": "failed", "reason": reason_of(error)}
        self._life["ended"] = time.time()
        try:
            self._write()
        except OSError:
            # A full disk is what the run is about to fail with, or has nothing to do with how it ended.
            if error is None:
                raise

    def _write(self) -> None:
        write_atomic(self._run.status_file, json.dumps(asdict(Life(**self._life)), indent=2) + "\n")


def reason_of(error: BaseException) -> str:
    """An exception in one line; a user's mistake by its own words alone."""
    text = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, KeyboardInterrupt):
        return "interrupted by a second Ctrl-C"
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}".removesuffix(": ")


def is_alive(pid: int, born: float) -> bool:
    """Whether this machine's process `pid`, started at `born`, runs still (a zombie does not)."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - born) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def job_of_environment() -> str | None:
    """Slurm's name of the job that this process belongs to: 123, or 123_4 in an array."""
    env = os.environ
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID")
