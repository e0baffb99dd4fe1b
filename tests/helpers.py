"""Functions that several rooms' tests share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Launch = Callable[..., subprocess.Popen[str]]
"""Starts a number of processes of a Python command."""


@contextmanager
def place_kept() -> Iterator[None]:
    """Afterwards the environment names the same place among processes as before, or none."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def start(folder: Path, processes: int, *command: str) -> subprocess.Popen[str]:
    """Start `processes` processes of a Python command in `folder`, by torchrun unless it is one, in a session of their
    own."""
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [*python, *command],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def read_metrics(run: Path) -> dict[str, list[dict[str, Any]]]:
    """metrics.jsonl by kind of record."""
    records = defaultdict(list)
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        records[record["kind"]].append(record)
    return dict(records)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for the end and return what was printed."""
    output = process.communicate(timeout=300)[0]
    assert process.returncode == code, output
    return output
