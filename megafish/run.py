"""A run directory: where everything of one run is, and the only place that knows its file names.

config.yaml   metrics.jsonl   status.json   latest   checkpoints/step_00001000/   audit/   evals/   report.html   plots/
quarantine.jsonl   logs/   profile/   tensorboard/   wandb/   wandb_id   job.json   submit.sbatch   .lock
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megafish.config import Config, dump_config, load_config
from megafish.errors import InputError

_STEP = re.compile(r"^step_(\d{8})$")


class RunDir:
    """Paths and small files of a run. Holds no state: two objects of the same path are interchangeable."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.status_file = self.path / "status.json"
        self.job_file = self.path / "job.json"
        self.batch_script = self.path / "submit.sbatch"
        self.latest_file = self.path / "latest"
        self.checkpoints = self.path / "checkpoints"
        self.quarantine_file = self.path / "quarantine.jsonl"
        self.logs = self.path / "logs"
        self.attempts_file = self.logs / "attempts.jsonl"
        self.audit = self.path / "audit"
        self.profile = self.path / "profile"
        self.report_file = self.path / "report.html"

    @classmethod
    def existing(cls, path: str | Path) -> RunDir:
        """The run at `path`; InputError when there is none."""
        run = cls(path)
        if not run.config_file.is_file():
            if (run.path / "config.json").is_file():
                raise InputError(
                    f"{path}: a Hugging Face folder, not a run directory: make one of it (megafish import {path} --to "
                    "RUN)"
                )
            raise InputError(f"{path}: not a run directory (no config.yaml): name one that `megafish train` made")
        return run

    def load_config(self, overrides: list[str] | tuple[str, ...] = ()) -> Config:
        """The configuration saved with the run, with overrides on top."""
        return load_config(self.config_file, overrides)

    def save_config(self, config: Config) -> None:
        """Write config.yaml."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self.config_file, dump_config(config))

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint of a step, whether it exists or not."""
        return self.checkpoints / f"step_{step:08d}"

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending (a checkpoint gets its name only when it is complete)."""
        if not self.checkpoints.is_dir():
            return []
        return sorted(int(m[1]) for entry in self.checkpoints.iterdir() if (m := _STEP.match(entry.name)))

    def latest(self) -> Path | None:
        """Folder of the checkpoint that a resume starts from, or None."""
        if not self.latest_file.is_file():
            # Complete, but killed before `latest` was first written.
            return self.checkpoint(steps[-1]) if (steps := self.steps()) else None
        name = self.latest_file.read_text(encoding="utf-8").strip()
        folder = self.checkpoints / name
        if not _STEP.match(name) or not folder.is_dir():
            there = ", ".join(f"step_{step:08d}" for step in self.steps())
            advice = f"write one of {there} into it" if there else "no checkpoint is left; start a new run"
            raise InputError(f"{self.latest_file} names {name!r}, which is not in {self.checkpoints}: {advice}")
        return folder

    def log_of(self, rank: int) -> Path:
        """What a process of a launched run printed."""
        return self.logs / f"rank_{rank:05d}.log"

    @property
    def used(self) -> bool:
        """Whether a run is here that has begun: one that could be continued."""
        # metrics.jsonl comes to be after config.yaml.
        return self.metrics_file.exists() or self.latest() is not None

    @property
    def command(self) -> str:
        """What continues the run."""
        unlearns = self.config_file.is_file() and self.load_config().unlearn is not None
        return f"megafish {'unlearn' if unlearns else 'train'} {self.path}"

    def refuse_if_used(self) -> None:
        """InputError where a run is here already, which a new one must not overwrite."""
        if self.used:
            again = "" if self.latest() else " (it has no checkpoint yet and will start over)"
            raise InputError(
                f"{self.path} holds a run already: continue it with `{self.command}`{again}, or choose another name=..."
            )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process; InputError when another process has it.

        An advisory lock of the operating system: it ends with the process, however that ends, so a killed run never
        leaves a stale one behind.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "a+", encoding="utf-8") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.seek(0)
                holder = handle.read().strip() or "unknown"
                raise InputError(
                    f"{self.path}: in use by another run (process {holder}): wait for it, or choose another name=... "
                    "or run_dir=..."
                ) from None
            except OSError as error:
                raise InputError(
                    f"{self.path}: its file system cannot lock files ({error.strerror}): mount it with locks (Lustre: "
                    "-o flock), or choose another run_dir=..."
                ) from None
            handle.truncate(0)
            handle.write(f"{os.getpid()} on {os.uname().nodename}\n")
            handle.flush()
            yield


def write_atomic(path: Path, text: str) -> None:
    """Write a text file beside and rename it, so that a reader or a kill never meets half of it."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last: without it a power cut may undo them."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; InputError when it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: missing") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}): the file is damaged") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def sha256_file(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
