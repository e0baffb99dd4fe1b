"""A mistake that only one process meets ends all of them, at once and with one line."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from rich.console import Console

from megafish.run import RunDir
from megafish.train.checkpoint import verify_run
from tests.helpers import Launch, finish, read_metrics


def test_a_lock_held_elsewhere_ends_every_process(launch: Launch, settings: list[str], tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with run.lock():
        process = launch(2, "-m", "megafish", "train", "tiny", *settings, f"run_dir={run.path}")
        started = time.monotonic()
        output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "in use by another run" in errors[0], output
    assert time.monotonic() - started < 120, "no process waits for a collective to time out"


def test_a_full_disk_on_one_process_ends_every_process(launch: Launch, settings: list[str], tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    worker = str(Path(__file__).with_name("full_disk.py"))
    own = (f"run_dir={run.path}", "train.steps=100000", "checkpoint.interval=5", "engine.zero_stage=2")
    process = launch(2, worker, "train", "tiny", *settings, *own)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "process 1: " in errors[0] and "no space left on the device" in errors[0], output
    assert "Traceback" not in output.partition("error: ")[0]
    assert run.steps() == [5] and run.latest() == run.checkpoint(5), "the one before is the latest"
    assert verify_run(run, Console(quiet=True)) == ([5], [])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_stays_near_fp32(launch: Launch, settings: list[str], tmp_path: Path, stage: int) -> None:
    """bf16 with fp32 accumulation, activation checkpointing and an untied head, on two processes."""
    losses = {}
    for precision in ("fp32", "bf16"):
        folder = tmp_path / precision
        finish(
            launch(
                *(2, "-m", "megafish", "train", "tiny", *settings, f"run_dir={folder}", f"train.precision={precision}"),
                *(f"engine.zero_stage={stage}", "train.steps=20", "train.activation_checkpointing=true"),
            )
        )
        losses[precision] = [record["loss"] for record in read_metrics(folder)["train"]]
    assert losses["bf16"] != losses["fp32"]
    for ours, theirs in zip(losses["bf16"], losses["fp32"], strict=True):
        assert abs(ours - theirs) < 0.02 * theirs
