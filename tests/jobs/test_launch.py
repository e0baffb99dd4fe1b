"""`megafish launch local` and `deepspeed`: real processes, their codes, logs and signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import read_metrics

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "megafish", *words],
        cwd=folder,
        env=ENV,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def call(folder: Path, *words: str, code: int = 0) -> str:
    process = start(folder, *words)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == code, output
    return output


def until(found: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end and process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def test_two_processes_here_and_their_logs(tmp_path: Path, settings: list[str]) -> None:
    words = ["launch", "local", *settings, "name=a", "--processes=2"]
    planned = call(tmp_path, *words, "--dry-run")
    assert planned.count("megafish train") == 2 and "RANK=1" in planned and "WORLD_SIZE=2" in planned
    assert not (tmp_path / "runs").exists()

    told = call(tmp_path, *words)
    assert "2 x cpu" in told and "next: megafish audit" in told
    assert "2 x cpu" in call(tmp_path, "logs", "runs/a")
    assert (tmp_path / "runs/a/logs/rank_00001.log").is_file()
    assert "there are ranks 0 to 1" in call(tmp_path, "logs", "runs/a", "--rank=2", code=2)
    status = json.loads(call(tmp_path, "status", "--json"))
    assert (status["state"], status["step"], status["progress"]) == ("completed", 20, 1.0)

    assert "train.steps was 20, is 30" in call(tmp_path, *words, "train.steps=30", code=2)
    longer = call(tmp_path, "launch", "local", "runs/a", "train.steps=30", "--processes=1")
    assert "a continues at step 20" in longer  # on another number of processes
    assert len(read_metrics(tmp_path / "runs/a")["train"]) == 30


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_the_launcher_stops_all_with_a_checkpoint(
    tmp_path: Path, settings: list[str], number: signal.Signals
) -> None:
    process = start(
        tmp_path, "launch", "local", *settings, "train.steps=100000", "name=a", "--processes=2", "--no-check"
    )
    metrics = tmp_path / "runs/a/metrics.jsonl"
    until(lambda: metrics.is_file() and metrics.read_text().count("\n") > 3, process)
    assert json.loads(call(tmp_path, "status", "--json"))["state"] == "running"
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number
    assert (tmp_path / "runs/a/latest").is_file()
    status = json.loads(call(tmp_path, "status", "--json"))
    assert status["state"] == "stopped" and number.name in status["reason"]


def test_cancel_and_a_killed_process(tmp_path: Path, settings: list[str]) -> None:
    words = ["launch", "local", *settings, "train.steps=100000", "name=a", "--processes=2", "--no-check"]
    metrics = tmp_path / "runs/a/metrics.jsonl"
    process = start(tmp_path, *words)
    until(lambda: metrics.is_file() and metrics.read_text().count("\n") > 3, process)
    assert "SIGTERM sent to its launcher" in call(tmp_path, "cancel", "runs/a")
    assert process.wait(timeout=60) == 128 + signal.SIGTERM

    process = start(tmp_path, *words)
    steps = metrics.read_text().count("\n")
    until(lambda: metrics.read_text().count("\n") > steps + 3, process)
    life = json.loads((tmp_path / "runs/a/status.json").read_text())
    os.kill(life["pid"], signal.SIGKILL)
    assert process.wait(timeout=90) in (1, 128 + signal.SIGKILL)  # whichever process was seen to end first
    status = json.loads(call(tmp_path, "status", "--json"))
    assert status["state"] == "failed"


def test_deepspeeds_launcher_on_two_nodes_without_ssh(tmp_path: Path, settings: list[str]) -> None:
    # Both names mean this machine: the launcher tells its nodes apart by them.
    (tmp_path / "hosts").write_text("127.0.0.1 slots=1\nlocalhost slots=1\n", encoding="utf-8")
    words = ["launch", "deepspeed", *settings, "name=a", "--hostfile=hosts", "--master-addr=127.0.0.1"]
    second = start(tmp_path, *words, "--node-rank=1", "--master-port=29511")
    first = start(tmp_path, *words, "--node-rank=0", "--master-port=29511", "--rank-logs")
    for process in (first, second):
        output = process.communicate(timeout=180)[0]
        assert process.returncode == 0, output
    assert "2 x cpu" in call(tmp_path, "logs", "runs/a")
    assert len(read_metrics(tmp_path / "runs/a")["train"]) == 20


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--nodes=3"], "without --hostfile there is this machine alone"),
        (["--node-rank=1"], "give --hostfile and --master-addr"),
        (["--hostfile=none"], "none: cannot be read"),
        (["--hostfile=bad"], "bad, line 2: 'node2 8': expected `name slots=8`"),
        (["--hostfile=good", "--nodes=3"], "good has 2"),
        (["--hostfile=good", "--include=node1", "--nodes=1"], "leave out --nodes"),
        (["--hostfile=good", "--node-rank=2", "--master-addr=node1"], "has nodes 0 to 1"),
    ],
)
def test_deepspeed_options_that_cannot_be(tmp_path: Path, settings: list[str], words: list[str], told: str) -> None:
    (tmp_path / "bad").write_text("node1 slots=8\nnode2 8\n", encoding="utf-8")
    (tmp_path / "good").write_text("# two\nnode1 slots=8\nnode2 slots=8  # the second\n", encoding="utf-8")
    output = call(tmp_path, "launch", "deepspeed", *settings, "name=a", *words, code=2)
    assert told in output and output.count("\n") == 1
