"""What stands in a checkpoint, how long it is kept, and what happens on the way to it."""

from __future__ import annotations

import io
import json
import math
import shutil
import threading
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from megafish.config import CheckpointConfig, Config, load_config
from megafish.errors import InputError
from megafish.model.load import WEIGHTS, WEIGHTS_INDEX, load_weights
from megafish.model.transformer import Transformer
from megafish.run import RunDir
from megafish.train import saver as saver_module
from megafish.train.checkpoint import best_step, kept_steps, publish, verify_checkpoint, verify_run, write_weights
from megafish.train.engine import Engine, start_processes
from megafish.train.loop import train
from megafish.train.saver import Saver
from megafish.train.state import StateReader, make_index, write_pieces
from tests.helpers import read_metrics

QUIET = Console(quiet=True)


@pytest.fixture
def settings(corpus: Path, tmp_path: Path) -> list[str]:
    return [
        f"data.train={corpus}",
        f"run_dir={tmp_path / 'run'}",
        "model={num_layers: 2, hidden_size: 32, num_heads: 2, intermediate_size: 48}",
        "data.sequence_length=32",
        "train.global_batch_size=4",
        "train.micro_batch_size=2",
        "train.steps=3",
        "eval={interval: 1, sequences: 4, dropped_sequences: 0}",
        "checkpoint={interval: 1, keep: null}",
    ]


def configure(settings: list[str], *more: str) -> Config:
    return load_config("tiny", [*settings, *more])


def engine_of(config: Config) -> Engine:
    model = Transformer(config.model, 512, loss=config.loss, seed=5)
    return Engine(config, model, start_processes("cpu"))


LAYOUTS = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_what_is_loaded_is_what_was_stored(settings: list[str], tmp_path: Path, stage: int, precision: str) -> None:
    """To the last bit, into every layout, and the weights to compute with are the fp32 ones rounded."""
    own = (f"engine.zero_stage={stage}", f"train.precision={precision}")
    run = train(configure(settings, *own), console=QUIET).run
    folder = run.checkpoint(3)
    stored = StateReader(folder)
    assert stored.states("norm.weight") == ["exp_avg", "exp_avg_sq", "master"]
    assert stored.scalars("norm.weight")["step"].value == 3
    weights = load_file(folder / WEIGHTS)
    for other, its_precision in LAYOUTS:
        engine = engine_of(configure(settings, f"engine.zero_stage={other}", f"train.precision={its_precision}"))
        engine.load(folder)
        again = tmp_path / f"{other}{its_precision}"
        (again / "optimizer").mkdir(parents=True)
        reader = StateReader(again, make_index([write_pieces(again, 0, engine.pieces())]))
        assert reader.parameters.keys() == stored.parameters.keys() == weights.keys()
        for name in stored.parameters:
            assert reader.scalars(name) == stored.scalars(name)
            assert reader.states(name) == stored.states(name)
            for state in stored.states(name):
                assert torch.equal(reader.whole(name, state), stored.whole(name, state)), (name, state)
        if its_precision == precision:
            for name, parameter in engine.module.named_parameters():
                # On one process ZeRO-3 has all of a parameter in its part, flattened.
                held = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter
                assert torch.equal(held.detach().flatten(), weights[name].flatten()), name


def test_large_weights_are_written_in_parts(settings: list[str], tmp_path: Path) -> None:
    config = configure(settings)
    run = train(config, console=QUIET).run
    whole = load_file(run.checkpoint(3) / WEIGHTS)
    parts = tmp_path / "parts"
    shutil.copytree(run.checkpoint(3) / "optimizer", parts / "optimizer")
    receipt_folder = parts / "receipts"
    receipt_folder.mkdir()
    engine = engine_of(config)
    engine.load(run.checkpoint(3))
    receipts = [write_pieces(parts, 0, engine.pieces())]
    receipts += [{"files": {}, "pieces": []}] * 2  # two processes that own nothing
    for rank, receipt in enumerate(receipts):
        (receipt_folder / f"pieces_{rank:05d}.json").write_text(json.dumps(receipt))
    for rank in range(3):
        written = write_weights(parts, engine.weights, torch.float32, rank, 3, limit=20_000)
        (receipt_folder / f"weights_{rank:05d}.json").write_text(json.dumps(written))
        assert written["files"], "every process has its share"
    other = RunDir(tmp_path / "other")
    other.checkpoints.mkdir(parents=True)
    publish(other, parts, {"step": 7, "valid_loss": None}, config.checkpoint, 3)
    folder = other.checkpoint(7)
    verify_checkpoint(folder)
    index = json.loads((folder / WEIGHTS_INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] > 0 and not (folder / WEIGHTS).exists()
    model = Transformer(config.model, 512, loss=config.loss, seed=9)
    load_weights(model, folder)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, whole[name])
    (folder / files[1]).unlink()
    with pytest.raises(InputError, match=rf"{files[1]}.*damaged"):
        load_weights(model, folder)


def test_checkpoints_are_reported(settings: list[str]) -> None:
    run = train(configure(settings), console=QUIET).run
    records = read_metrics(run.path)["checkpoint"]
    assert [record["step"] for record in records] == [1, 2, 3]
    assert [record["asynchronous"] for record in records] == [True, True, False], "the last one is waited for"
    for record in records:
        folder = run.checkpoint(record["step"])
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.name != "manifest.json")
        assert record["bytes"] == size
        assert 0 < record["stall_s"] <= record["write_s"]


def test_asynchronous_and_synchronous_checkpoints_are_equal(settings: list[str], tmp_path: Path) -> None:
    folders = []
    for asynchronous in ("true", "false"):
        path = tmp_path / asynchronous
        train(configure(settings, f"run_dir={path}", f"checkpoint.asynchronous={asynchronous}"), console=QUIET)
        folders.append(RunDir(path).checkpoint(2))
    files = sorted(file.relative_to(folders[0]) for file in folders[0].rglob("*") if file.is_file())
    for file in files:
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes(), file


def test_a_snapshot_does_not_follow_the_training(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first checkpoint waits to be written, the weights go on."""
    config = configure(settings, "train.steps=1")
    run = train(config, console=QUIET).run
    engine = engine_of(config)
    engine.load(run.checkpoint(1))
    may_write = threading.Event()
    write = saver_module.write_pieces
    monkeypatch.setattr(saver_module, "write_pieces", lambda *args: may_write.wait(60) and write(*args))
    with Saver(run, engine, config.checkpoint) as saver:
        saver.save({"step": 2, "valid_loss": None}, wait=False)
        assert saver.flags() == (1, 0)
        with torch.no_grad():
            for piece in engine.pieces():
                piece.states["master"].add_(1)
        may_write.set()
        saver.finish()
        assert saver.flags() == (0, 0)
    before, after = (StateReader(run.checkpoint(step)) for step in (1, 2))
    for name in before.parameters:
        assert torch.equal(before.whole(name, "master"), after.whole(name, "master"))


def test_a_writer_that_fails_ends_the_run(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saver_module, "write_weights", full)
    with pytest.raises(InputError, match="no space left on the device: free some, then resume"):
        train(configure(settings, "train.steps=1000"), console=QUIET)
    run = RunDir(configure(settings).run_path)
    assert run.steps() == [] and not run.latest_file.exists()
    assert len(read_metrics(run.path)["train"]) < 1000, "the failure is met on the way"
    monkeypatch.undo()
    train(configure(settings), resume=True, console=QUIET)
    assert run.latest() == run.checkpoint(3) and not list(run.checkpoints.glob("*.tmp"))


def losses(run: RunDir, values: dict[int, float | None]) -> list[int]:
    for step, value in values.items():
        run.checkpoint(step).mkdir(parents=True)
        (run.checkpoint(step) / "state.json").write_text(json.dumps({"step": step, "valid_loss": value}))
    return sorted(values)


def test_retention(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    steps = losses(run, {5: math.nan, 10: 3.0, 20: 1.0, 30: 1.0, 40: None, 50: 2.0, 60: 2.5})

    def kept(**config: object) -> list[int]:
        return sorted(kept_steps(run, steps, CheckpointConfig.model_validate(config)))

    assert kept(keep=None) == steps
    assert kept(keep=2) == [50, 60]
    assert kept(keep=1, keep_every=20) == [20, 40, 60]
    assert kept(keep=1, keep_best=True) == [30, 60]
    (run.checkpoint(30) / "state.json").write_text("{")
    assert best_step(run, steps) == 20, "a damaged one is not the best"


def test_the_best_is_kept(settings: list[str]) -> None:
    keep = "checkpoint={interval: 1, keep: 1, keep_best: true, keep_every: 4}"
    run = train(configure(settings, "train.steps=6", "optimizer.lr=0.3", keep), console=QUIET).run
    valid = {record["step"]: record["valid_loss"] for record in read_metrics(run.path)["valid"]}
    best = min(valid, key=lambda step: valid[step])
    assert run.steps() == sorted({best, 4, 6})


def test_keeping_the_best_needs_validations(settings: list[str]) -> None:
    with pytest.raises(InputError, match=r"checkpoint.interval=3 must be a multiple of eval.interval=2"):
        configure(settings, "eval.interval=2", "checkpoint={interval: 3, keep_best: true}")
    with pytest.raises(InputError, match="keep_best needs validation text"):
        train(configure(settings, "data.valid=[]", "checkpoint.keep_best=true"), console=QUIET)


def test_verify(settings: list[str]) -> None:
    run = train(configure(settings), console=QUIET).run
    console = Console(record=True, width=250, file=io.StringIO())
    assert verify_run(run, console) == ([1, 2, 3], [])
    (run.checkpoint(2) / WEIGHTS).unlink()
    assert verify_run(run, console) == ([1, 3], [2])
    text = console.export_text()
    assert "latest" in text and "best" in text and f"damaged: {run.checkpoint(2) / WEIGHTS}: missing" in text
    with pytest.raises(InputError, match="no checkpoint yet"):
        verify_run(RunDir(run.path.parent / "none"))
