"""Phases add up to the step, a trace opens, and what is off leaves everything as it was."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megafish.config import Config, ProfileConfig, load_config
from megafish.errors import InputError
from megafish.train.loop import train
from megafish.train.profile import PHASES, CommunicationTimer, HostClock, Profiler
from tests.helpers import read_metrics

CPU = torch.device("cpu")


def settings(corpus: Path, run: Path, *overrides: str) -> Config:
    return load_config(
        "tiny",
        [
            f"data.train={corpus}",
            f"run_dir={run}",
            "model={num_layers: 1, hidden_size: 32, num_heads: 2, intermediate_size: 64}",
            "data.sequence_length=32",
            "train.global_batch_size=4",
            "train.micro_batch_size=2",
            "train.steps=4",
            "eval={interval: null, sequences: 4, dropped_sequences: 0}",
            *overrides,
        ],
    )


def profiler(folder: Path, **values: object) -> Profiler:
    return Profiler(ProfileConfig.model_validate(values), folder, rank=0, world_size=2, device=CPU, first_step=1)


def test_phases_hold_the_time_that_was_spent_in_them(tmp_path: Path) -> None:
    with profiler(tmp_path, phases=True) as ours:
        for _ in range(3):
            ours.begin("data")
            time.sleep(0.02)
            for _ in range(2):
                ours.begin("forward")
                time.sleep(0.01)
                ours.begin("backward")
                time.sleep(0.03)
            ours.begin("optimizer")
            seconds = ours.end_step()
    for phase, expected in {"data": 0.02, "forward": 0.02, "backward": 0.06, "optimizer": 0.0}.items():
        assert expected <= seconds[f"seconds_{phase}"] < expected + 0.5, phase
    assert seconds["seconds_communication"] == 0.0
    table = "\n".join(ours.report())
    assert "mean over 2 steps" in table
    assert all(f"  {phase}" in table for phase in PHASES)


def test_nothing_is_touched_when_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [getattr(dist.ProcessGroup, name) for name in ("allreduce", "_allgather_base")] + [dist.Work.wait]
    monkeypatch.setattr("megafish.train.profile.HostClock.now", lambda self: pytest.fail("read the clock"))
    with profiler(tmp_path) as ours:
        for phase in PHASES:
            ours.begin(phase)
        assert ours.end_step() == {}
        during = [getattr(dist.ProcessGroup, name) for name in ("allreduce", "_allgather_base")] + [dist.Work.wait]
    assert during == before and ours.report() == [] and not list(tmp_path.iterdir())


def test_functions_come_back(tmp_path: Path) -> None:
    before = dist.ProcessGroup.allreduce, dist.Work.wait
    with pytest.raises(RuntimeError), profiler(tmp_path, phases=True):
        assert dist.ProcessGroup.allreduce is not before[0]
        raise RuntimeError
    assert (dist.ProcessGroup.allreduce, dist.Work.wait) == before


def late(rank: int, store: str, queue: multiprocessing.Queue) -> None:
    """Two processes sum a number twice, the second time with one of them 0.3 s late; reports what they waited."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    before = dist.ProcessGroup.allreduce
    with CommunicationTimer(HostClock()) as timer:
        numbers = torch.ones(3)
        dist.all_reduce(numbers)
        timer.take()
        time.sleep(0.3 if rank == 1 else 0.0)
        dist.all_reduce(numbers)
        waited = timer.take()
        handle = dist.all_reduce(numbers, async_op=True)
        time.sleep(0.3)  # computes meanwhile
        handle.wait()
        beside = timer.take()
    assert dist.ProcessGroup.allreduce == before
    dist.all_reduce(numbers)
    queue.put((rank, numbers.tolist(), waited, beside, timer.take()))
    dist.destroy_process_group()


def test_communication_is_the_time_spent_standing_still(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=late, args=(rank, str(tmp_path / "store"), queue)) for rank in range(2)]
    for process in processes:
        process.start()
    results = sorted(queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(timeout=60)
    for rank, numbers, waited, beside, after in results:
        assert numbers == [16.0] * 3
        assert (waited > 0.25) == (rank == 0), "who is in time waits, who is late does not"
        assert beside < 0.15, "what runs beside the computation is no standing still"
        assert after == 0.0


def test_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="memory_step records the allocations of a GPU"):
        profiler(tmp_path, memory_step=3)
    with profiler(tmp_path, trace_step=1, ranks=[1]) as ours:  # this is process 0
        ours.begin("data")
        ours.end_step()
    assert ours.report() == [f"profile.trace_step=1: the files of the processes [1] are in {tmp_path}"]
    with pytest.raises(InputError, match=r"profile.ranks=\[2, 5\]: this run has the processes 0 to 1"):
        profiler(tmp_path, trace_step=3, ranks=[0, 2, 5])


def test_a_run_reports_its_phases_and_writes_a_trace(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    train(settings(corpus, run, "profile={phases: true, trace_step: 2, steps: 2}"))
    records = read_metrics(run)["train"]
    for record in records:
        measured = sum(record[f"seconds_{phase}"] for phase in PHASES)
        whole = 4 * 32 / record["tokens_per_s"]
        assert 0.8 * whole < measured < 1.2 * whole
        assert 0 < record["seconds_communication"] < whole
    (path,) = (run / "profile").iterdir()
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    assert {f"megafish: {phase}" for phase in PHASES} <= names
    assert any("addmm" in str(name) or "mm" in str(name) for name in names)
    printed = " ".join(capsys.readouterr().out.split())
    assert "mean over 3 steps" in printed and "next: open" in printed and "perfetto" in printed


def test_a_window_that_is_cut_short_is_written_and_one_out_of_reach_is_said(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train(settings(corpus, tmp_path / "short", "profile={trace_step: 4, steps: 5}"))
    assert [path.name for path in (tmp_path / "short" / "profile").iterdir()] == ["trace_step_00000004_rank_00000.json"]
    assert "seconds_data" not in read_metrics(tmp_path / "short")["train"][0]
    train(settings(corpus, tmp_path / "late", "profile.trace_step=5"))
    assert "profile.trace_step=5: nothing recorded" in " ".join(capsys.readouterr().out.split())
