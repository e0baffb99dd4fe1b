"""What `megafish status` makes of what runs and jobs leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from signal import Signals
from typing import Any

import psutil
import pytest

from megafish.config import load_config
from megafish.errors import InputError
from megafish.jobs.prepare import write_job
from megafish.jobs.reason import reason_in_logs
from megafish.jobs.status import find_runs, run_status
from megafish.jobs.table import advice, format_duration
from megafish.life import Announcement, is_alive, read_life
from megafish.run import RunDir

Make = Callable[..., RunDir]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes a run directory with so many steps of a budget of 100."""

    def made(name: str = "r", steps: int = 10, ago: float = 0.0) -> RunDir:
        run = RunDir(tmp_path / name)
        run.save_config(load_config("tiny", [f"run_dir={run.path}", "data.train=corpus"]))
        now = time.time()
        records = [
            {"kind": "train", "step": step, "time": now - ago - steps + step, "loss": 5.0, "progress": step / 100,
             "tokens_per_s": 1000.0}
            for step in range(1, steps + 1)
        ]  # fmt: skip
        records.append({"kind": "valid", "step": steps, "valid_loss": 4.5})
        run.metrics_file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        run.logs.mkdir()
        return run

    return made


def live(run: RunDir, **changes: Any) -> None:
    """status.json of a run that has just started here, with changes."""
    with Announcement(run, 1):
        pass
    life = json.loads(run.status_file.read_text()) | {"state": "running", "ended": None, "started": time.time() - 60}
    run.status_file.write_text(json.dumps(life | changes), encoding="utf-8")


def test_an_announcement_tells_how_the_run_ended(make: Make) -> None:
    run = make()
    assert run_status(run.path).state == "not started"
    with Announcement(run, 2) as announced:
        assert run_status(run.path).state == "running"
        announced.end(None)
    assert (run_status(run.path).state, run_status(run.path).progress) == ("completed", 1.0)
    with Announcement(run, 2) as announced:
        announced.end(Signals.SIGUSR1)
    assert (run_status(run.path).state, run_status(run.path).reason) == ("stopped", "stopped by SIGUSR1")
    with pytest.raises(InputError), Announcement(run, 2):
        raise InputError("no corpus: name one\nsecond line")
    assert (run_status(run.path).state, run_status(run.path).reason) == ("failed", "no corpus: name one")
    with pytest.raises(ZeroDivisionError), Announcement(run, 2):
        _ = 1 / 0
    assert run_status(run.path).reason == "ZeroDivisionError: division by zero"
    life = read_life(run)
    assert life is not None and life.here and life.alive and life.processes == 2 and life.ended is not None


def test_figures_of_a_running_run(make: Make) -> None:
    run = make()
    live(run)
    status = run_status(run.path)
    assert (status.state, status.step, status.progress, status.loss) == ("running", 10, 0.1, 5.0)
    assert (status.valid_loss, status.tokens_per_s) == (4.5, 1000.0)
    assert status.seconds_left == pytest.approx(90, abs=3)  # 1 % a second


def test_a_process_that_is_gone(make: Make) -> None:
    run = make()
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    born = psutil.Process(child.pid).create_time()
    assert is_alive(child.pid, born)
    child.wait()
    assert not is_alive(child.pid, born)
    live(run, pid=child.pid, born=born)
    assert (run_status(run.path).state, run_status(run.path).reason) == (
        "failed", f"process {child.pid} ended without a word",
    )  # fmt: skip
    # Another process has the number now.
    live(run, pid=os.getpid(), born=psutil.Process().create_time() - 100)
    assert run_status(run.path).state == "failed"


def test_a_run_on_another_machine(make: Make) -> None:
    run = make(ago=60)
    live(run, host="elsewhere")
    assert run_status(run.path).state == "running"
    old = time.time() - 7200
    os.utime(run.metrics_file, (old, old))
    assert (run_status(run.path).state, run_status(run.path).reason) == ("lost", "no word from elsewhere for 2.0 h")


def test_a_job_that_slurm_cannot_tell_of(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    run = make()
    write_job(run, "slurm", submitted=time.time(), number="7")
    assert run_status(run.path).reason == "Slurm cannot be asked: squeue is not on this machine"
    run.attempts_file.write_text(f'{{"job": "7", "code": 139, "time": {time.time()}}}\n', encoding="utf-8")
    assert (run_status(run.path).state, run_status(run.path).reason) == ("failed", "exit code 139")
    # It goes on by hand.
    live(run, job=None, started=time.time() + 1)
    assert run_status(run.path).state == "running"


def test_the_reason_is_that_of_the_process_that_fell_silent_first(make: Make) -> None:
    run = make()
    first = "Traceback (most recent call last):\n  File x\nRuntimeError: [gloo] Connection closed by peer [127.0.0.1]\n"
    run.log_of(0).write_text(first, encoding="utf-8")
    run.log_of(1).write_text(
        "step 5\n[rank1]: Traceback:\n[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB\n"
    )
    assert reason_in_logs(run, 0.0) == "torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB"
    live(run, state="failed", reason="RuntimeError: Connection closed by peer")
    assert run_status(run.path).state == "out of memory"
    run.log_of(1).write_text("error: stalled: late: rank 1\n", encoding="utf-8")
    assert reason_in_logs(run, 0.0) == "stalled: late: rank 1"
    run.log_of(1).write_text("error: an old one\nr continues at step 7: 2M parameters\n", encoding="utf-8")
    assert "closed by peer" in str(reason_in_logs(run, 0.0))
    assert reason_in_logs(run, time.time() + 60) is None
    run.log_of(1).write_text("nothing\n", encoding="utf-8")
    assert "closed by peer" in str(reason_in_logs(run, 0.0))
    (run.logs / "slurm_7.log").write_text(
        "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 12:00 DUE TO TIME LIMIT ***\n"
    )
    run.log_of(0).unlink()
    assert reason_in_logs(run, 0.0) == "JOB 7 ON n1 CANCELLED AT 12:00 DUE TO TIME LIMIT"


def test_runs_are_found_below_folders(make: Make, tmp_path: Path) -> None:
    for name in ("a", "sweep/b", "sweep/c"):
        make(name)
    (tmp_path / "a" / "checkpoints" / "inner").mkdir(parents=True)
    (tmp_path / "a" / "checkpoints" / "inner" / "config.yaml").write_text("", encoding="utf-8")
    names = [str(path.relative_to(tmp_path)) for path in find_runs([tmp_path])]
    assert names == ["a", "sweep/b", "sweep/c"]
    with pytest.raises(InputError, match="no run directory is there"):
        find_runs([tmp_path / "nothing"])


def test_damaged_files_are_named(make: Make) -> None:
    run = make()
    run.status_file.write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"status\.json: not valid JSON"):
        run_status(run.path)
    run.status_file.write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="not written by this version"):
        run_status(run.path)


def test_what_is_next(make: Make) -> None:
    run = make()
    live(run, state="failed", reason="x")
    assert advice([run_status(run.path)]) == f"megafish logs {run.path}"
    live(run, state="completed")
    assert advice([run_status(run.path)]) == f"megafish audit {run.path}"
    assert [format_duration(seconds) for seconds in (40, 720, 12600, 181440)] == ["40 s", "12 min", "3.5 h", "2.1 d"]


def test_without_slurm_the_user_is_told_before_anything_is_written(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megafish", "launch", "slurm", "tiny", "data.train=corpus", "name=a"],
        cwd=tmp_path, env={**os.environ, "PATH": "/nowhere"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "sbatch is not on this machine" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()
