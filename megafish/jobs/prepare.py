"""The run directory of a job, before the job starts."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megafish.config import Config, changed_settings, dump_config, load_config, preset_names
from megafish.errors import InputError
from megafish.life import is_alive
from megafish.run import RunDir, read_json, write_atomic


@dataclass(frozen=True)
class Job:
    """job.json: what was started for a run, last of all. Times are seconds since the epoch."""

    launcher: str
    """local, deepspeed or slurm."""
    command: str
    """The command line that the user gave."""
    submitted: float
    host: str
    pid: int | None
    """Of the launcher, where it is a process that stays until the run has ended."""
    born: float | None
    """When that process was started."""
    number: str | None
    """Slurm's number of the job, 123 or 123_4."""

    @property
    def runs_here(self) -> bool:
        """Whether its launcher is a process of this machine that is still there."""
        if self.pid is None or self.born is None or self.host != os.uname().nodename:
            return False
        return is_alive(self.pid, self.born)


def read_job(run: RunDir) -> Job | None:
    """The job of a run, or None. InputError where the file is damaged."""
    if not run.job_file.is_file():
        return None
    found = read_json(run.job_file)
    if found.keys() != {field.name for field in fields(Job)}:
        raise InputError(f"{run.job_file}: not written by this version of megafish: remove it")
    return Job(**found)


def write_job(
    run: RunDir,
    launcher: str,
    *,
    submitted: float,
    pid: int | None = None,
    born: float | None = None,
    number: str | None = None,
) -> None:
    """Say in the run directory what was started for it; `submitted` lies before its start."""
    command = shlex.join(["megafish", *sys.argv[1:]])
    job = Job(launcher, command, submitted, os.uname().nodename, pid, born, number)
    write_atomic(run.job_file, json.dumps(asdict(job), indent=2) + "\n")


@dataclass(frozen=True)
class Prepared:
    """A run that is about to start."""

    run: RunDir
    config: Config
    overrides: tuple[str, ...]
    """Settings that change a run which is there already; those of a new one stand in its config.yaml."""


def resolve(source: str, overrides: list[str]) -> Prepared:
    """The run that `source` (preset, YAML file, run directory) and the settings on top of it mean. Writes nothing.

    InputError where the run's directory holds a run with other settings: it is continued by naming the directory.
    """
    if Path(source).is_dir() and (source not in preset_names() or (Path(source) / "config.yaml").is_file()):
        run = RunDir.existing(source)
        return Prepared(run, run.load_config([*overrides, f"run_dir={source}"]), tuple(overrides))
    config = load_config(source, overrides)
    run = RunDir(config.run_path)
    refuse_another(run, config)
    return Prepared(run, config, ())


def refuse_another(run: RunDir, config: Config) -> None:
    """InputError where the directory holds a run that has begun, with another configuration."""
    if not (run.config_file.is_file() and run.used):
        return
    if run.config_file.read_text(encoding="utf-8") == dump_config(config):
        return  # quicker than to read a thousand files of a sweep
    changed = changed_settings(run.load_config(), config)
    if changed:
        more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise InputError(
            f"{run.path} holds a run with other settings ({'; '.join(changed[:3])}{more}): name the directory in place "
            "of the preset to continue it, or choose another name=..."
        )


def create(prepared: Prepared) -> None:
    """Make the run directory with the folder of its logs, and its configuration unless the run has begun with one."""
    prepared.run.logs.mkdir(parents=True, exist_ok=True)
    if not prepared.run.used:
        prepared.run.save_config(prepared.config)


def train_command(run: RunDir, overrides: tuple[str, ...] = ()) -> list[str]:
    """The command of one process on this machine: continues the run, or starts it."""
    return [sys.executable, "-m", "megafish", "train", str(run.path.absolute()), *overrides]


def check(prepared: Prepared, processes: int) -> None:
    """InputError for what the run would refuse at its start, before it waits in a queue."""
    from megafish.data.corpus import open_train
    from megafish.train.dry_run import dry_run

    open_train(prepared.config.data)  # a dry run does without a corpus
    dry_run(prepared.config, processes, resume=True)


def refuse_active(run: RunDir) -> None:
    """InputError where a job of the run waits or runs already: two would write to one directory."""
    from megafish.jobs.status import ACTIVE, run_status

    if run.config_file.is_file():
        status = run_status(run.path)
        if status.state in ACTIVE:
            raise InputError(
                f"{run.path}: {f'job {status.job}' if status.job else 'a run'} is {status.state} there already: "
                f"`megafish cancel {run.path}` ends it"
            )


def wait_for(prepared: Prepared, seconds: float = 120.0) -> None:
    """Wait until the first node has made the run directory. InputError when it does not appear."""
    deadline = time.monotonic() + seconds
    while not prepared.run.config_file.is_file():
        if time.monotonic() > deadline:
            raise InputError(
                f"{prepared.run.path}: not there after {seconds:.0f} s: run the same command with --node-rank 0 on the "
                "first node; both must see the same file system"
            )
        time.sleep(0.5)
    refuse_another(prepared.run, prepared.config)
