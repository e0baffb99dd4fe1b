"""Runs of several real processes over gloo, as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import Launch

SHAPE = "{num_layers: 2, hidden_size: 64, num_heads: 4, num_kv_heads: 2, intermediate_size: 128}"


@pytest.fixture
def settings(corpus: Path) -> list[str]:
    """Overrides of the tiny preset for a run of a second or two."""
    return [
        f"data.train={corpus}",
        f"model={SHAPE}",
        "data.sequence_length=64",
        "train.precision=fp32",
        "train.global_batch_size=8",
        "train.micro_batch_size=2",
        "optimizer.lr=2e-3",
        "eval={interval: 5, sequences: 8, dropped_sequences: 8}",
    ]


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Start `processes` processes of a Python command, by torchrun unless it is one, in a session of their own."""

    def start(processes: int, *command: str) -> subprocess.Popen[str]:
        python = [sys.executable]
        if processes > 1:
            python += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        return subprocess.Popen(
            [*python, *command],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    return start
