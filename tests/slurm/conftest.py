"""A real Slurm of two nodes on this machine, for all tests of this folder."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import SCRIPT, SHAPE, Slurm


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """The cluster, started for the session."""
    installed = subprocess.run(["bash", SCRIPT, "install"], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(installed.stderr.strip())
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run(["bash", SCRIPT, "start", folder / "c"], check=True, stdout=subprocess.DEVNULL)
    yield Slurm(folder / "c")
    subprocess.run(["bash", SCRIPT, "stop", folder / "c"], check=True)
    assert not (folder / "c").exists()


@pytest.fixture
def settings(corpus: Path) -> list[str]:
    """Words of `megafish launch slurm` for a run of some seconds on both nodes."""
    return [
        "tiny",
        f"data.train={corpus}",
        f"model={SHAPE}",
        "data.sequence_length=64",
        "train.precision=fp32",
        "train.device=cpu",
        "train.global_batch_size=8",
        "train.micro_batch_size=2",
        "train.steps=150",
        "eval.interval=null",
        "--profile=local",
    ]
