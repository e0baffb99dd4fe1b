"""Bad steps, signals, stalls and flipped bits in runs of several processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megafish.run import RunDir
from megafish.train.checkpoint import verify_checkpoint
from megafish.train.guard import EXIT_CORRUPT, EXIT_STALLED
from tests.distributed.guarded import CASES, FACTORS
from tests.distributed.test_resume import without_timings
from tests.helpers import Launch, finish, read_metrics

GUARD = "guard={window: 8, min_history: 4, sigma: 20, stall_seconds: 60}"


def test_a_refused_step_changes_nothing_at_any_zero_stage(launch: Launch, settings: list[str], tmp_path: Path) -> None:
    """The run that refuses two steps, one by a NaN and one by a spike of a single process's gradient, is bit for bit
    the run that never read their samples."""
    worker = str(Path(__file__).with_name("guarded.py"))
    cases = ",".join([*CASES, "flipped", "unreadable"])
    output = finish(launch(2, worker, str(tmp_path), cases, *settings, GUARD, "train.steps=9", "eval.interval=null"))
    last = Path("checkpoints") / "step_00000009" / "model.safetensors"
    for case in CASES:
        faulty, clean = tmp_path / case / "faulty", tmp_path / case / "clean"
        entries = [json.loads(line) for line in (faulty / "quarantine.jsonl").read_text().splitlines()]
        assert [(entry["first_sample"], entry["samples"]) for entry in entries] == [(first, 8) for first in FACTORS]
        assert [entry["step"] for entry in entries] == [4, 8], "a refused step is not counted"
        assert "gradient norm inf" in entries[0]["fault"] or "gradient norm nan" in entries[0]["fault"], case
        assert "gradient norm" in entries[1]["fault"] and "20 sigma above" in entries[1]["fault"], case
        metrics = without_timings(faulty)
        assert [record["step"] for record in metrics.pop("skipped")] == [4, 8]
        assert metrics == without_timings(clean), case
        assert (faulty / last).read_bytes() == (clean / last).read_bytes(), case
    # ZeRO 0 of the preset: replicas that nothing renews.
    assert output.count(f"exit code {EXIT_CORRUPT}\n") == 2, output
    flipped, unreadable = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "step 4: norm.weight differs between the processes (suspect: ranks 0, 1)" in flipped
    assert "no checkpoint was written yet" in flipped
    assert unreadable == "error: process 1: a sample is damaged"
    assert output.count("exit code 2\n") == 2, "all processes end, with the message of the one that knows it"


def start_pair(folder: Path, *arguments: str) -> list[subprocess.Popen[str]]:
    """Two processes of `megafish train` without a launcher, which would turn their exit codes into its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "megafish", "train", "tiny", *arguments],
            cwd=folder,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]


def wait_until(condition: object, processes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 120
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes), [
            process.communicate()[0] for process in processes if process.poll() is not None
        ]
        time.sleep(0.02)


def steps_logged(run: Path) -> int:
    return len(read_metrics(run).get("train", [])) if (run / "metrics.jsonl").exists() else 0


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_is_named_and_the_other_ends(settings: list[str], tmp_path: Path, stopped: int) -> None:
    """Process 0 keeps the store through which they tell each other where they are: that it is stopped shows as well."""
    run = tmp_path / "run"
    limit = "guard={stall_seconds: 2, slow_stall_seconds: 60}"
    pair = start_pair(tmp_path, *settings, limit, f"run_dir={run}", "train.steps=100000", "eval.interval=null")
    try:
        wait_until(lambda: steps_logged(run) >= 5, pair)
        pair[stopped].send_signal(signal.SIGSTOP)
        started = time.monotonic()
        output = finish(pair[1 - stopped], code=EXIT_STALLED)
        assert time.monotonic() - started < 2 + 8
    finally:
        for process in pair:
            process.kill()
            process.wait()
    reports = [line for line in output.splitlines() if line.startswith("error: stalled: ")]
    assert len(reports) == 1, output
    if stopped == 1:
        assert "late: rank 1 in " in reports[0] and "without a sign of life" in reports[0]
    else:
        assert "rank 0 or its launcher, which keeps the store of the process group, does not answer" in reports[0]
    assert f"continue with `megafish train {run}`" in reports[0]
    stacks = (run / "logs" / f"stacks_rank_{1 - stopped:05d}.txt").read_text()
    assert "megafish/train/loop.py" in stacks and "megafish/data/loader.py" in stacks, "the stacks of all threads"


def test_a_signal_to_one_process_stops_all_in_the_middle_of_an_evaluation(settings: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    long = "eval={interval: 3, sequences: 100000, dropped_sequences: 100000}"
    pair = start_pair(tmp_path, *settings, long, f"run_dir={run}", "train.steps=1000", "data.sequence_length=16")
    wait_until(lambda: steps_logged(run) == 3, pair)
    pair[1].send_signal(signal.SIGUSR2)
    outputs = [finish(process, code=128 + signal.SIGUSR2) for process in pair]
    assert "stopped by SIGUSR2" in outputs[0] and f"next: megafish train {run}" in outputs[0]
    metrics = read_metrics(run)
    assert len(metrics["train"]) == 3 and "valid" not in metrics
    latest = RunDir(run).latest()
    assert latest is not None and latest.name == "step_00000003"
    verify_checkpoint(latest)
