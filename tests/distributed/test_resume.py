"""A run killed with SIGKILL and resumed ends as an undisturbed one, bit for bit."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from megafish.run import RunDir
from megafish.train.checkpoint import verify_checkpoint
from tests.helpers import Launch, finish, read_metrics

TIMINGS = {"time", "tokens_per_s", "model_flops_per_s", "mfu", "memory_bytes"}


def without_timings(run: Path) -> dict[str, list[dict]]:
    """All records but those of checkpoints: a kill between a checkpoint and its record costs the record."""
    return {
        kind: [{key: value for key, value in record.items() if key not in TIMINGS} for record in records]
        for kind, records in read_metrics(run).items()
        if kind != "checkpoint"
    }


def kill_tree(process: subprocess.Popen[str]) -> None:
    """SIGKILL to a launcher and to what it started: torchrun's workers outlive it otherwise."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family, timeout=60)
    process.communicate(timeout=60)


def wait_for_step(run: Path, step: int) -> None:
    """Until the run has logged a step past its checkpoint."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (run / "latest").exists() and f'"step": {step},' in (run / "metrics.jsonl").read_text():
            return
        time.sleep(0.02)
    raise AssertionError("the run never got that far")


@pytest.mark.parametrize(
    ("processes", "stage", "precision", "more"),
    [
        (1, 0, "fp32", []),
        (1, 1, "bf16", []),
        (2, 1, "fp32", []),
        (2, 2, "fp32", []),
        # The checkpoint of step 16 is the last of the patch stage.
        (2, 3, "bf16", ["patch={size: 4, fraction: 0.4}"]),
    ],
)
def test_killed_and_resumed(
    launch: Launch, settings: list[str], tmp_path: Path, processes: int, stage: int, precision: str, more: list[str]
) -> None:
    own = [f"engine.zero_stage={stage}", f"train.precision={precision}", *more]
    settings = [*settings, *own, "train.steps=40", "checkpoint.interval=8"]
    start = ("-m", "megafish", "train")
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finish(launch(processes, *start, "tiny", *settings, f"run_dir={undisturbed}"))

    process = launch(processes, *start, "tiny", *settings, f"run_dir={killed}")
    wait_for_step(killed, 19)
    kill_tree(process)
    reached = int((killed / "latest").read_text().strip().removeprefix("step_"))
    assert 8 <= reached < 40, "killed too late for the test to mean anything"
    assert f"continues at step {reached}" in " ".join(finish(launch(processes, *start, str(killed))).split())

    assert without_timings(killed) == without_timings(undisturbed)
    last = Path("checkpoints") / "step_00000040"
    assert (killed / last / "model.safetensors").read_bytes() == (undisturbed / last / "model.safetensors").read_bytes()
    assert json.loads((killed / last / "state.json").read_text())["spent"]["steps"] == 40


def test_killed_while_it_saves(launch: Launch, settings: list[str], tmp_path: Path) -> None:
    """Whatever is half-written then, `latest` names a good checkpoint."""
    run = RunDir(tmp_path / "run")
    command = ("-m", "megafish", "train", "tiny", *settings, f"run_dir={run.path}", "train.steps=2000", "--resume")
    for attempt in range(2):
        process = launch(1, *command, "checkpoint={interval: 1, keep: 2}")
        wait_for_step(run.path, 5 * (attempt + 1))
        deadline = time.monotonic() + 60
        while not list(run.checkpoints.glob("*.tmp")) and time.monotonic() < deadline:
            pass
        kill_tree(process)
        latest = run.latest()
        assert latest is not None
        verify_checkpoint(latest)
    steps = int(latest.name.removeprefix("step_")) + 2
    finish(launch(1, *command, f"train.steps={steps}", "checkpoint={interval: null, keep: 1}"))
    assert run.steps() == [steps] and not list(run.checkpoints.glob("*.tmp"))


def test_sigterm_saves_and_the_same_command_continues(launch: Launch, settings: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = (
        "-m",
        "megafish",
        "train",
        "tiny",
        *settings,
        f"run_dir={run}",
        "train.steps=400",
        "checkpoint.interval=3",
    )
    process = launch(1, *command, "--resume")
    wait_for_step(run, 4)
    process.terminate()
    output = finish(process, code=128 + signal.SIGTERM)
    assert "stopped by SIGTERM" in output and f"next: megafish train {run}" in output
    steps = [record["step"] for record in read_metrics(run)["train"]]
    assert int((run / "latest").read_text().strip().removeprefix("step_")) == steps[-1] < 400
    output = finish(launch(1, *command, "--resume", f"train.steps={steps[-1] + 2}"))
    assert [record["step"] for record in read_metrics(run)["train"]] == list(range(1, steps[-1] + 3))
