"""Where the numbers of a run go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from megafish.config import load_config
from megafish.run import RunDir
from megafish.train.track import Recited, Tracker, publish_audit

RECORD = {"kind": "train", "step": 1, "loss": 2.5, "drop_rate": 0.25, "lr": 1e-3, "tokens_per_s": 1234.0, "mfu": None}


def records(steps: range) -> list[dict]:
    return [{**RECORD, "step": step, "loss": 10.0 / step} for step in steps]


def track(run: RunDir, steps: range, *, resume_step: int = 0, overrides: tuple[str, ...] = ()) -> str:
    console = Console(record=True, width=200, quiet=False, force_terminal=False, file=open("/dev/null", "w"))  # noqa: SIM115
    run.path.mkdir(exist_ok=True)
    with Tracker(run, load_config("tiny", list(overrides)), resume_step=resume_step, console=console) as tracker:
        for record in records(steps):
            tracker.log(record)
            tracker.show(record["step"] / 10, record)
    return console.export_text()


def logged_steps(run: RunDir) -> list[int]:
    return [json.loads(line)["step"] for line in run.metrics_file.read_text().splitlines()]


def test_a_resume_forgets_the_steps_that_it_does_again(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    track(run, range(1, 8))
    with open(run.metrics_file, "a") as handle:
        handle.write('{"kind": "train", "st')  # cut off by a kill
    track(run, range(5, 11), resume_step=4)
    assert logged_steps(run) == list(range(1, 11))


def test_plain_lines_without_a_terminal(tmp_path: Path) -> None:
    text = track(RunDir(tmp_path / "run"), range(1, 11))
    lines = text.splitlines()
    assert len(lines) == 2, "the first step, then nothing for ten seconds, then the end"
    assert lines[0].split() == [
        "10%",
        "step",
        "1",
        "loss",
        "10.000",
        "drop",
        "25.0%",
        "lr",
        "1.00e-03",
        "1,234",
        "tokens/s",
    ]
    assert lines[1].startswith("100%  step 10 loss 1.000")


def test_tensorboard_receives_every_number(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunDir(tmp_path / "run")
    track(run, range(1, 11), overrides=("track.tensorboard=true",))
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    scalars = events.Scalars("train/loss")
    assert [event.step for event in scalars] == list(range(1, 11))
    assert scalars[3].value == pytest.approx(2.5)


ROWS = [Recited(8, True, 3, "the | big\nfish", " swims", " swims"), Recited(0, False, 0, "a", "b", "c")]


def test_an_audit_goes_to_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunDir(tmp_path / "run")
    overrides = ["track.tensorboard=true"]
    track(run, range(1, 3), overrides=tuple(overrides))
    publish_audit(run, load_config("tiny", overrides), 2, {"recited_8": 0.5}, ROWS)
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("memorization/recited_8")] == [(2, 0.5)]
    assert {"optimizer/lr", "speed/tokens_per_s", "goldfish/drop_rate"} <= set(events.Tags()["scalars"])
    (text,) = events.Tensors("memorization/recited/text_summary")
    table = text.tensor_proto.string_val[0].decode().splitlines()
    assert len(table) == 4 and "the \\| big⏎fish" in table[2]
    (config,) = events.Tensors("config/text_summary")
    assert "hidden_size: 192" in config.tensor_proto.string_val[0].decode()


def test_an_audit_continues_the_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = RunDir(tmp_path / "run")
    overrides = ["track.wandb.enabled=true", "track.wandb.mode=offline"]
    track(run, range(1, 3), overrides=tuple(overrides))
    publish_audit(run, load_config("tiny", overrides), 2, {"recited_8": 0.5}, ROWS)
    folders = sorted((run.path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2, "a second part of the same run"
    (table,) = (run.path / "wandb").glob("offline-run-*/files/media/table/memorization/recited_*.table.json")
    found = json.loads(table.read_text())
    assert found["columns"] == list(Recited._fields) and found["data"][0] == list(ROWS[0])


def test_wandb_offline_keeps_its_run_id_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = RunDir(tmp_path / "run")
    overrides = ("track.wandb.enabled=true", "track.wandb.mode=offline")
    track(run, range(1, 4), overrides=overrides)
    first = (run.path / "wandb_id").read_text()
    track(run, range(4, 6), resume_step=3, overrides=overrides)
    assert (run.path / "wandb_id").read_text() == first
    stored = sorted((run.path / "wandb").glob("offline-run-*"))
    # wandb puts the second in front of the id, and a "-1" behind it if both began in the same one.
    assert len(stored) == 2 and all(f"-{first.strip()}" in folder.name for folder in stored)
