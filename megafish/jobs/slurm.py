"""Slurm's commands: submit, ask, cancel. What Slurm says against it reaches the user in Slurm's own words."""

from __future__ import annotations

import getpass
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megafish.errors import InputError


@dataclass(frozen=True)
class QueueEntry:
    """What Slurm knows of a job."""

    number: str
    """123, or 123_4 in an array."""
    state: str
    """PENDING, RUNNING, COMPLETED, ...: squeue(1), job state codes."""
    reason: str
    """Why it is pending or failed, in Slurm's word: Resources, Priority, BeginTime, NonZeroExitCode."""


def available() -> bool:
    """Whether this machine can talk to a Slurm."""
    return shutil.which("squeue") is not None


def require(program: str) -> None:
    """InputError where one of Slurm's commands is not on this machine."""
    if shutil.which(program) is None:
        raise InputError(
            f"{program} is not on this machine: run this where Slurm's commands are (a login node), or try megafish on "
            "a Slurm of your own: launch/local_slurm.sh start"
        )


def submit(script: Path) -> str:
    """Submit a batch script; the job's number."""
    # --parsable: "123" or "123;cluster".
    return _call("sbatch", "--parsable", str(script)).strip().split(";")[0]


def queue() -> dict[str, QueueEntry]:
    """The caller's jobs that Slurm has or has had in its memory, by number."""
    found = {}
    text = _call("squeue", f"--user={getpass.getuser()}", "--array", "--states=all", "--noheader", "--format=%i|%T|%r")
    for line in text.splitlines():
        number, state, reason = line.strip().split("|")
        found[number] = QueueEntry(number, state, reason)
    return found


def history(numbers: Iterable[str]) -> dict[str, QueueEntry]:
    """Of jobs that squeue has forgotten, where the cluster keeps accounts; else empty."""
    wanted = ",".join(numbers)
    if not wanted or shutil.which("sacct") is None:
        return {}
    command = ["sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={wanted}", "--format=JobID,State"]
    done = subprocess.run(command, capture_output=True, text=True)
    found = {}
    for line in done.stdout.splitlines():  # nothing where no accounts are kept
        number, _, state = line.partition("|")
        words = state.split()  # "CANCELLED by 1000"
        if words:
            found[number] = QueueEntry(number, words[0], "None")
    return found


def cancel(numbers: Iterable[str]) -> None:
    """Cancel jobs: their processes get SIGTERM, and SIGKILL after the cluster's KillWait."""
    _call("scancel", *numbers)


def _call(program: str, *arguments: str) -> str:
    require(program)
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    if done.returncode:
        words = "; ".join(line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip())
        raise InputError(f"{program} {arguments[-1]}: Slurm says: {words or f'exit code {done.returncode}'}")
    return done.stdout
