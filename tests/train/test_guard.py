"""Signals at any moment, refused steps and the way back to a checkpoint, in runs of one process."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from megafish.config import load_config
from megafish.data.loader import Loader
from megafish.model.transformer import Transformer
from megafish.run import RunDir
from megafish.train import guard, loop
from megafish.train.checkpoint import verify_checkpoint
from megafish.train.data import TrainingData
from megafish.train.engine import Engine, start_processes
from megafish.train.guard import StopRequest
from megafish.train.recovery import Diverged
from tests.helpers import read_metrics

SHAPE = "model={num_layers: 1, hidden_size: 32, num_heads: 2, intermediate_size: 48}"


@pytest.fixture
def settings(corpus: Path, tmp_path: Path) -> list[str]:
    return [
        f"data.train={corpus}",
        f"run_dir={tmp_path / 'run'}",
        SHAPE,
        "data.sequence_length=32",
        "train.global_batch_size=4",
        "train.micro_batch_size=2",
        "train.steps=6",
        "eval={interval: 2, sequences: 6, dropped_sequences: 4}",
        "checkpoint.interval=2",
    ]


def run(settings: list[str], *more: str, resume: bool = False, console: Console | None = None) -> loop.Outcome:
    return loop.train(load_config("tiny", [*settings, *more]), resume=resume, console=console or Console(quiet=True))


def kill_self(number: int) -> None:
    os.kill(os.getpid(), number)


def before(action: Callable[[], None], function: Callable[..., Any]) -> Callable[..., Any]:
    def both(*args: Any, **kwargs: Any) -> Any:
        action()
        return function(*args, **kwargs)

    return both


# ---- signals


def test_the_first_signal_counts_and_a_second_ctrl_c_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    previous = [signal.getsignal(number) for number in StopRequest.signals]
    with StopRequest() as stop:
        assert stop.received is None
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGUSR1
        # torchrun hands on to its workers the Ctrl-C that the terminal has sent them already.
        os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr(guard, "_SAME_CTRL_C", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert [signal.getsignal(number) for number in StopRequest.signals] == previous


@pytest.mark.parametrize("moment", ["open_data", "Transformer", "StepGuard"])
def test_a_signal_during_start_up_ends_the_run_before_its_first_step(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    run(settings, "train.steps=2")
    directory = RunDir(load_config("tiny", settings).run_path)
    latest = directory.latest()
    metrics = directory.metrics_file.read_bytes()
    monkeypatch.setattr(loop, moment, before(lambda: kill_self(signal.SIGTERM), getattr(loop, moment)))
    outcome = run(settings, resume=True)
    assert outcome.signal == signal.SIGTERM
    assert directory.latest() == latest and directory.steps() == [2]
    assert directory.metrics_file.read_bytes() == metrics


def test_a_signal_during_start_up_leaves_nothing_of_a_new_run(
    settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "open_data", before(lambda: kill_self(signal.SIGINT), loop.open_data))
    outcome = run(settings)
    assert outcome.signal == signal.SIGINT and outcome.spent.steps == 0
    assert not outcome.run.config_file.exists() and outcome.run.steps() == []
    monkeypatch.undo()
    assert run(settings).signal is None, "the same command starts it"


@pytest.mark.parametrize("moment", ["step", "evaluation", "saving"])
def test_a_signal_leaves_a_complete_checkpoint_of_where_the_run_was(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    if moment == "step":
        backward = Engine.backward

        def signalled(self: Engine, loss: torch.Tensor, *, is_last: bool) -> None:
            backward(self, loss, is_last=is_last)
            if self.engine.global_steps == 2:
                kill_self(signal.SIGUSR1)

        monkeypatch.setattr(Engine, "backward", signalled)
        reached = 3
    elif moment == "evaluation":

        def evaluating(self: Engine, mode: bool = True) -> None:
            self.engine.train(mode)
            if not mode:
                kill_self(signal.SIGUSR1)

        monkeypatch.setattr(Engine, "train", evaluating)
        reached = 2
    else:
        monkeypatch.setattr(loop.Saver, "save", before(lambda: kill_self(signal.SIGUSR1), loop.Saver.save))
        reached = 2
    outcome = run(settings)
    assert outcome.signal == signal.SIGUSR1 and outcome.spent.steps == reached
    assert outcome.run.steps()[-1] == reached and outcome.run.latest() == outcome.run.checkpoint(reached)
    verify_checkpoint(outcome.run.checkpoint(reached))
    metrics = read_metrics(outcome.run.path)
    assert [record["step"] for record in metrics["train"]] == list(range(1, reached + 1))
    assert ("valid" in metrics) == (moment != "evaluation"), "an evaluation is cut short, its numbers are not invented"
    monkeypatch.undo()
    assert run(settings, resume=True).spent.steps == 6


def test_a_signal_while_the_loader_stalls_stops_the_run(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    make, stalled = Loader._make_step, threading.Event()

    def stalling(self: Loader, locations: Any) -> Any:
        if int(locations.number[0]) == 48:  # made some steps ahead
            os.kill(os.getpid(), signal.SIGTERM)
            stalled.wait(60)
        return make(self, locations)

    monkeypatch.setattr(Loader, "_make_step", stalling)
    monkeypatch.setattr("megafish.data.loader._LAST_BATCH", 0.1)
    started = time.monotonic()
    outcome = run(settings, "train.steps=20")
    stalled.set()
    assert time.monotonic() - started < 50, "not until the data comes"
    assert outcome.signal == signal.SIGTERM and 0 < outcome.spent.steps <= 12
    assert outcome.run.latest() == outcome.run.checkpoint(outcome.spent.steps)


# ---- refused steps


@pytest.mark.parametrize(
    ("stage", "precision", "more"),
    [
        *[(stage, "fp32", "") for stage in range(4)],
        *[(stage, "bf16", "") for stage in range(1, 4)],
        *[(stage, "bf16", "engine.offload_optimizer=cpu") for stage in range(1, 4)],
        (2, "bf16", "optimizer.name=muon"),
        (3, "fp32", "optimizer.name=muon"),
    ],
)
@pytest.mark.parametrize("bad", ["refused", "not finite"])
def test_a_refused_step_leaves_every_bit_of_weights_and_optimizer(
    stage: int, precision: str, more: str, bad: str
) -> None:
    config = load_config(
        "tiny",
        [SHAPE, f"engine.zero_stage={stage}", f"train.precision={precision}", "train.global_batch_size=8"]
        + [more] * bool(more),
    )
    generator = torch.Generator().manual_seed(0)
    batches = torch.randint(0, 64, (4, 8, 16), generator=generator)

    def take(
        engine: Engine, tokens: torch.Tensor, factor: float = 1.0, accept: Callable[[float], bool] = math.isfinite
    ) -> tuple[float, bool]:
        for index in range(2):
            loss = engine(tokens, targets=tokens.roll(-1, 1), denominator=2 * tokens.numel()).loss
            engine.backward(loss * factor, is_last=index == 1)
        return engine.step(1e-3, accept)

    spoiled: dict[str, Any] = {"accept": lambda norm: False} if bad == "refused" else {"factor": math.nan}
    engines = []
    for disturbed in (False, True):
        engine = Engine(config, Transformer(config.model, 64, seed=3), start_processes("cpu"))
        for number, tokens in enumerate(batches):
            if disturbed and number in (0, 2):
                kept = frozen(engine)
                norm, taken = take(engine, batches[3 - number], **spoiled)
                assert not taken and math.isfinite(norm) == (bad == "refused")
                assert_same(frozen(engine), kept)
            norm, taken = take(engine, tokens)
            assert taken and 0 < norm < math.inf
        engines.append(engine)
    assert_same(frozen(engines[0]), frozen(engines[1]))


def frozen(engine: Engine) -> dict[str, Any]:
    """Copies of all that a checkpoint holds (master weights, moments, counts of steps) and of the weights in use."""
    found: dict[str, Any] = {}
    for name, parameter in engine.module.named_parameters():
        found[name] = getattr(parameter, "ds_tensor", parameter).detach().clone()
    for piece in engine.pieces():
        place = f"{piece.parameter} {piece.begin}"
        found |= {f"{place} {state}": tensor.clone() for state, tensor in piece.states.items()}
        found |= {f"{place} {name}": torch.tensor(scalar.value) for name, scalar in piece.scalars.items()}
    return found


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys() and len(ours) > 5
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def spoil(monkeypatch: pytest.MonkeyPatch, factors: dict[int, float]) -> list[int]:
    """Multiply the gradient of batches by their first sample. Returns the list of batches that come to be read."""
    count, backward = TrainingData.count, Engine.backward
    read: list[int] = []

    def watch(self: TrainingData, batch: Any, *flags: int) -> Any:
        read.append(batch.first_sample)
        return count(self, batch, *flags)

    def faulty(self: Engine, loss: torch.Tensor, *, is_last: bool) -> None:
        backward(self, loss * factors.get(read[-1], 1.0), is_last=is_last)

    monkeypatch.setattr(TrainingData, "count", watch)
    monkeypatch.setattr(Engine, "backward", faulty)
    return read


@pytest.mark.parametrize(
    "engine",
    [
        ["engine.zero_stage=0"],
        ["engine.zero_stage=3"],
        ["engine={zero_stage: 2, offload_optimizer: cpu}", "train.precision=bf16"],
        ["engine={zero_stage: 3, offload_optimizer: cpu}", "train.precision=bf16", "optimizer.name=muon"],
    ],
)
def test_repeated_faults_go_back_and_leave_the_samples_out(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: list[str]
) -> None:
    nan = float("nan")
    settings = [*settings, *engine, "guard.max_skips=1", "checkpoint.interval=3"]
    settings += ["track.tensorboard=true"]
    # Steps 1 to 3 read samples 0 to 11, and the checkpoint of step 3 is there when 12 and 20 are refused.
    read = spoil(monkeypatch, {12: nan, 20: nan})
    console = Console(record=True, width=300, file=io.StringIO())
    outcome = run(settings, console=console)
    assert read == [0, 4, 8, 12, 16, 20, 16, 24, 28]
    assert outcome.spent.steps == 6 and outcome.spent.tokens == 6 * 4 * 32 and outcome.spent.samples == 32
    text = console.export_text()
    assert "step 4 refused: gradient norm" in text and "samples 12 to 15 are left out" in text
    assert "too many steps refused: back to step 3" in text
    monkeypatch.undo()

    clean = tmp_path / "clean"
    clean.mkdir()
    (clean / "quarantine.jsonl").write_text((outcome.run.path / "quarantine.jsonl").read_text())
    undisturbed = run([*settings, f"run_dir={clean}"])
    last = Path("checkpoints") / "step_00000006" / "model.safetensors"
    assert (outcome.run.path / last).read_bytes() == (clean / last).read_bytes()
    keys = ("step", "loss", "grad_norm", "data_hash", "lr", "supervised_tokens")
    ours, theirs = (
        [[record[key] for key in keys] for record in read_metrics(path)["train"]]
        for path in (outcome.run.path, undisturbed.run.path)
    )
    assert ours == theirs


def test_going_back_passes_over_a_damaged_checkpoint(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    directory = RunDir(tmp_path / "run")
    spoil(monkeypatch, {16: math.nan})
    damage = before((directory.checkpoint(4) / "model.safetensors").unlink, loop.go_back)
    monkeypatch.setattr(loop, "go_back", damage)
    outcome = run(settings, "guard.max_skips=0")
    # Back at step 2, that is sample 8; 16 to 19 are left out.
    assert outcome.spent.steps == 6 and outcome.spent.samples == 28
    assert directory.steps() == [2, 4, 6] and directory.latest() == directory.checkpoint(6)
    assert [path.name for path in directory.checkpoints.glob("abandoned_*")] == ["abandoned_step_00000004"]
    assert [record["step"] for record in read_metrics(directory.path)["train"]] == [1, 2, 3, 4, 5, 6]


def test_faults_that_going_back_does_not_end_stop_the_run(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, {first: float("nan") for first in range(12, 400)})
    with pytest.raises(Diverged, match=r"also after going back to a checkpoint 2 times.*lower optimizer.lr"):
        run(settings, "guard.max_skips=2")
    directory = RunDir(load_config("tiny", settings).run_path)
    entries = [json.loads(line) for line in directory.quarantine_file.read_text().splitlines()]
    assert [entry["first_sample"] for entry in entries] == list(range(12, 12 + 9 * 4, 4)), "3 x 3 steps, none twice"
    assert directory.steps() == [2]
    monkeypatch.undo()
    resumed = run(settings, resume=True)
    assert resumed.spent.steps == 6 and resumed.spent.samples == 8 + 4 + 9 * 4 + 3 * 4


def test_without_a_checkpoint_there_is_no_way_back(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, {0: float("nan")})
    with pytest.raises(Diverged, match="no checkpoint to go back to"):
        run(settings, "guard.max_skips=0")


def test_a_resume_judges_as_an_undisturbed_run(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The window is in the checkpoint: a spike right after a resume is one."""
    tight = "guard={window: 8, min_history: 4, sigma: 20}"
    run(settings, tight, "train.steps=4", "schedule.name=constant")
    spoil(monkeypatch, {16: 1e4})
    outcome = run(settings, tight, resume=True)
    (skipped,) = read_metrics(outcome.run.path)["skipped"]
    assert skipped["step"] == 5 and "sigma above the last 4 steps" in skipped["fault"]
