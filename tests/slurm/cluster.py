"""What the tests of Slurm jobs share: the cluster as its user sees it, and what runs leave behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "launch" / "local_slurm.sh"
SHAPE = "{num_layers: 2, hidden_size: 64, num_heads: 4, num_kv_heads: 2, intermediate_size: 128}"


class Slurm:
    """The cluster, and megafish as its user calls it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}

    def run(self, *command: str | Path, cwd: Path, code: int = 0) -> str:
        """Run a command to its end; what it printed."""
        done = subprocess.run(
            list(map(str, command)), cwd=cwd, env=self.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert done.returncode == code, done.stdout
        return done.stdout

    def megafish(self, *arguments: str | Path, cwd: Path, code: int = 0) -> str:
        """Run megafish's command line."""
        return self.run(sys.executable, "-m", "megafish", *arguments, cwd=cwd, code=code)

    def submit(self, *arguments: str, cwd: Path) -> str:
        """`megafish launch slurm`; the job's number."""
        told = self.megafish("launch", "slurm", *arguments, cwd=cwd)
        return re.findall(r"^job (\d+):", told, re.MULTILINE)[0]

    def job(self, number: str) -> dict[str, str]:
        """`scontrol show job` of one job."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", number, cwd=self.folder)))

    def wait(self, number: str, *states: str, seconds: float = 150) -> dict[str, str]:
        """Wait until a job is in one of the states."""
        return until(lambda: (job := self.job(number))["JobState"] in states and job, seconds, lambda: self.job(number))


def until(found: Callable[[], object], seconds: float = 90, what: Callable[[], object] = lambda: "") -> object:
    """Wait until `found` gives something true, and return it."""
    end = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what()}"
        time.sleep(0.2)
    return result


def weights(run: Path) -> bytes:
    """The weights that a run ended with."""
    latest = (run / "latest").read_text(encoding="utf-8").strip()
    return (run / "checkpoints" / latest / "model.safetensors").read_bytes()


def steps_of(run: Path) -> int:
    """Steps that a run has reported."""
    file = run / "metrics.jsonl"
    return file.read_text(encoding="utf-8").count('"kind": "train"') if file.is_file() else 0
