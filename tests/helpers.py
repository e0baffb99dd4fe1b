"""Functions that several rooms' tests share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

Launch = Callable[..., subprocess.Popen[str]]
"""Starts a number of processes of a Python command."""


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
