"""The life of a job on a real Slurm: whatever interrupts it, it ends with the weights of an undisturbed run."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from pathlib import Path

import pytest

from tests.helpers import read_metrics
from tests.slurm.cluster import Slurm, steps_of, until, weights


@pytest.fixture(scope="module")
def whole(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """Folder with the run `whole`: 150 steps on two nodes, undisturbed."""
    return tmp_path_factory.mktemp("jobs")


def test_a_job_on_two_nodes_trains_to_the_end(slurm: Slurm, whole: Path, settings: list[str]) -> None:
    number = slurm.submit(*settings, "name=whole", cwd=whole)
    job = slurm.wait(number, "COMPLETED", "FAILED")
    run = whole / "runs/whole"
    assert job["JobState"] == "COMPLETED", slurm.megafish("logs", run, cwd=whole)
    assert job["NodeList"] == "n[1-2]"
    assert sorted(log.name for log in (run / "logs").glob("rank_*")) == ["rank_00000.log", "rank_00001.log"]
    assert "2 x cpu" in slurm.megafish("logs", run, cwd=whole)
    assert "exit code 0: the run is complete" in slurm.megafish("logs", run, "--batch", cwd=whole)
    assert json.loads(slurm.megafish("status", run, "--json", cwd=whole))["state"] == "completed"
    assert json.loads((run / "status.json").read_text())["job"] == number


def test_requeued_in_mid_step_it_continues_in_one_wandb_run(slurm: Slurm, whole: Path, settings: list[str]) -> None:
    tracked = ["track.wandb={enabled: true, mode: offline}"]
    number = slurm.submit(*settings, *tracked, "name=requeued", cwd=whole)
    run = whole / "runs/requeued"
    for step in (10, 60):
        until(lambda step=step: steps_of(run) > step, what=lambda: slurm.job(number))  # type: ignore[misc]
        slurm.run("scontrol", "requeue", number, cwd=whole)
    assert slurm.wait(number, "COMPLETED", "FAILED")["Restarts"] == "2"
    assert weights(run) == weights(whole / "runs/whole")
    assert [record["step"] for record in read_metrics(run)["train"]] == list(range(1, 151))
    identity = (run / "wandb_id").read_text().strip()
    assert len(list((run / "wandb").glob(f"offline-run-*-{identity}"))) == 3


def test_preempted_it_saves_within_the_grace_time_and_comes_back(
    slurm: Slurm, whole: Path, settings: list[str]
) -> None:
    number = slurm.submit(*settings, "name=preempted", cwd=whole)
    run = whole / "runs/preempted"
    until(lambda: steps_of(run) > 20, what=lambda: slurm.job(number))
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"]
    blow = slurm.run(*urgent, "--wrap=sleep 5", cwd=whole).strip()
    slurm.wait(number, "PENDING")
    assert json.loads(slurm.megafish("status", run, "--json", cwd=whole))["state"] == "pending"
    slurm.wait(blow, "COMPLETED")
    assert slurm.wait(number, "COMPLETED", "FAILED")["Restarts"] == "1"
    assert weights(run) == weights(whole / "runs/whole")
    attempts = [json.loads(line) for line in (run / "logs/attempts.jsonl").read_text().splitlines()]
    assert [attempt["code"] for attempt in attempts] == [143, 0]


def test_signalled_before_its_time_limit_it_goes_back_to_the_queue(
    slurm: Slurm, whole: Path, settings: list[str]
) -> None:
    number = slurm.submit(*settings, "name=limited", "slurm.signal_seconds=20", cwd=whole)
    run = whole / "runs/limited"
    until(lambda: steps_of(run) > 20, what=lambda: slurm.job(number))
    # Slurm looks at time limits every 30 s: the run must not have ended by then, however fast this machine is.
    pid = json.loads((run / "status.json").read_text())["pid"]
    os.kill(pid, signal.SIGSTOP)
    slurm.run("scontrol", "update", f"JobId={number}", "TimeLimit=1", cwd=whole)
    until(lambda: is_pending(pid, signal.SIGUSR1), what=lambda: slurm.job(number))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    slurm.run("scontrol", "update", f"JobId={number}", "TimeLimit=30", cwd=whole)
    assert slurm.wait(number, "COMPLETED", "FAILED")["Restarts"] == "1"
    attempts = [json.loads(line) for line in (run / "logs/attempts.jsonl").read_text().splitlines()]
    assert [attempt["code"] for attempt in attempts] == [138, 0]
    assert weights(run) == weights(whole / "runs/whole")


def is_pending(pid: int, number: signal.Signals) -> bool:
    """Whether a process that was stopped has been sent a signal, and waits for SIGCONT or has got that too."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except FileNotFoundError:
        return True
    waiting = re.findall(r"^ShdPnd:\s*(\w+)", status, re.MULTILINE)[0]
    return bool(int(waiting, 16) >> (number - 1) & 1)


def test_cancelled_it_saves_and_stays_away(slurm: Slurm, whole: Path, settings: list[str]) -> None:
    number = slurm.submit(*settings, "train.steps=100000", "name=cancelled", cwd=whole)
    run = whole / "runs/cancelled"
    until(lambda: steps_of(run) > 5, what=lambda: slurm.job(number))
    assert f"job {number} is running there already" in slurm.megafish(
        "launch", "slurm", run, "--profile=local", cwd=whole, code=2
    )
    assert f"job {number} cancelled" in slurm.megafish("cancel", run, cwd=whole)
    slurm.wait(number, "CANCELLED")
    until(lambda: (run / "latest").is_file())
    until(lambda: json.loads(slurm.megafish("status", run, "--json", cwd=whole))["state"] == "cancelled")
    assert "neither waits nor runs (cancelled)" in slurm.megafish("cancel", run, cwd=whole)


def test_status_tells_why_a_job_has_failed(slurm: Slurm, whole: Path, settings: list[str]) -> None:
    number = slurm.submit(*settings, "--no-check", "data.train=nowhere", "name=failing", cwd=whole)
    assert slurm.wait(number, "FAILED")["ExitCode"] == "2:0"  # a mistake of the user's: no second start
    told = json.loads(slurm.megafish("status", "runs/failing", "--json", cwd=whole))
    assert told["state"] == "failed"
    assert "nowhere" in told["reason"]
    assert "next: megafish logs runs/failing" in slurm.megafish("status", "runs/failing", cwd=whole)


def test_a_job_that_crashes_again_and_again_stops(slurm: Slurm, whole: Path, settings: list[str]) -> None:
    crash = whole / "crash.yaml"
    # Too little memory even for the libraries.
    crash.write_text("gpus_per_node: 0\npartition: main\nmax_tries: 2\nsetup: ulimit -v 400000\n", encoding="utf-8")
    number = slurm.submit(*settings[:-1], f"--profile={crash}", "name=crashing", cwd=whole)
    job = slurm.wait(number, "FAILED")
    assert job["Restarts"] == "1"
    told = json.loads(slurm.megafish("status", "runs/crashing", "--json", cwd=whole))
    assert told["state"] in ("failed", "out of memory")
    assert "no new checkpoint in 2 starts" in slurm.megafish("logs", "runs/crashing", "--batch", cwd=whole)


def test_slurms_own_words_reach_the_user(slurm: Slurm, whole: Path, settings: list[str]) -> None:
    told = slurm.megafish("launch", "slurm", *settings, "name=x", "slurm.partition=nosuch", cwd=whole, code=2)
    assert "invalid partition specified: nosuch" in told
    assert told.count("\n") == 1
