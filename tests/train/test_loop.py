"""A run from its configuration to its files, and the mistakes that must not start one."""

from __future__ import annotations

import errno
import io
import json
import math
import re
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from megafish.config import Config, load_config
from megafish.errors import InputError
from megafish.model.load import load_run
from megafish.run import RunDir
from megafish.train.engine import Engine
from megafish.train.loop import Outcome, train
from megafish.train.recovery import Diverged
from tests.helpers import read_metrics

QUIET = Console(quiet=True)


@pytest.fixture
def settings(corpus: Path, tmp_path: Path) -> list[str]:
    return [
        f"data.train={corpus}",
        f"run_dir={tmp_path / 'run'}",
        "model={num_layers: 1, hidden_size: 32, num_heads: 2, intermediate_size: 48}",
        "data.sequence_length=32",
        "engine.zero_stage=1",
        "train.global_batch_size=4",
        "train.micro_batch_size=2",
        "train.steps=4",
        "eval={interval: 2, sequences: 6, dropped_sequences: 4}",
        "checkpoint={interval: 1, keep: 2}",
    ]


def configure(settings: list[str], *more: str) -> Config:
    return load_config("tiny", [*settings, *more])


def run(settings: list[str], *more: str, resume: bool = False) -> Outcome:
    return train(configure(settings, *more), resume=resume, console=QUIET)


def test_a_run_leaves_what_the_next_stages_need(settings: list[str]) -> None:
    outcome = run(settings)
    directory = outcome.run
    assert directory.load_config() == configure(settings)
    assert directory.steps() == [3, 4], "keep=2"
    assert directory.latest() == directory.checkpoint(4)
    assert not list(directory.checkpoints.glob("*.tmp"))
    loaded = load_run(directory.path)
    assert loaded.step == 4
    metrics = read_metrics(directory.path)
    assert [record["step"] for record in metrics["train"]] == [1, 2, 3, 4]
    assert [record["step"] for record in metrics["valid"]] == [2, 4]
    assert [record["step"] for record in metrics["dropped"]] == [2, 4]


def test_logged_numbers_add_up(settings: list[str]) -> None:
    metrics = read_metrics(run(settings).run.path)
    supervised = 0
    for record in metrics["train"]:
        supervised += record["kept_tokens"]
        assert record["supervised_tokens"] == supervised
        assert record["tokens"] == record["step"] * 4 * 32
        assert record["kept_tokens"] + record["dropped_tokens"] <= 4 * 32, "first tokens of documents are neither"
        assert record["drop_rate"] == record["dropped_tokens"] / (record["kept_tokens"] + record["dropped_tokens"])
        assert record["mfu"] is None, "no peak is invented for a CPU"
        assert record["model_flops_per_s"] / record["tokens_per_s"] > 6 * 32 * 48
    # An untrained model predicts almost uniformly over the real vocabulary.
    assert metrics["train"][0]["loss"] == pytest.approx(math.log(512), abs=0.1)
    assert metrics["train"][0]["bpb"] < metrics["train"][0]["loss"] / math.log(2), "tokens are longer than a byte"


def test_supervised_budget_stops_at_equal_supervision(settings: list[str]) -> None:
    settings = ["train.supervised_tokens=1000", *(item for item in settings if not item.startswith("train.steps"))]
    goldfish = run(settings).spent
    shutil.rmtree(configure(settings).run_path)
    plain = run(settings, "goldfish.k=null").spent
    for spent in (goldfish, plain):
        assert 1000 <= spent.supervised_tokens < 1000 + 4 * 32
    assert goldfish.tokens > plain.tokens


def test_plain_training_reports_no_dropped_loss(settings: list[str]) -> None:
    metrics = read_metrics(run(settings, "goldfish.k=null").run.path)
    assert "dropped" not in metrics
    assert {record["dropped_tokens"] for record in metrics["train"]} == {0}


def test_a_directory_with_a_run_is_not_overwritten(settings: list[str]) -> None:
    directory = run(settings).run
    before = directory.metrics_file.read_bytes()
    with pytest.raises(InputError, match=r"holds a run already.*megafish train"):
        run(settings)
    assert directory.metrics_file.read_bytes() == before


def test_a_run_directory_in_use_is_refused(settings: list[str]) -> None:
    with RunDir(configure(settings).run_path).lock(), pytest.raises(InputError, match="in use by another run"):
        run(settings)
    run(settings)


def test_a_file_system_without_locks_is_named(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(InputError, match=r"cannot lock files \(No locks available\): mount it"):
        run(settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("goldfish.k=5", "goldfish mask.*mask.k was 4, is 5"),
        ("goldfish.seed=1", "goldfish mask.*mask.seed was 0, is 1"),
        ("data.seed=1", "order.*data.seed was 0, is 1"),
        ("data.sequence_length=64", "sequence_length was 32, is 64"),
        ("model.hidden_size=64", "shape.*model.hidden_size was 32, is 64"),
    ],
)
def test_resume_with_another_setting_is_refused(settings: list[str], change: str, message: str) -> None:
    directory = run(settings).run
    with pytest.raises(InputError, match=message):
        run(settings, change, "train.steps=6", resume=True)
    assert directory.latest() == directory.checkpoint(4)


def test_resume_with_other_data_is_refused(settings: list[str], corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(corpus, other)
    run(settings)
    run(settings, f"data.train={other}", "train.steps=5", resume=True)  # a moved corpus is the same corpus
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["splits"]["train"]["files"]["train.bin"]["sha256"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"training samples.*sha256|training samples.*train.bin"):
        run(settings, f"data.train={other}", "train.steps=6", resume=True)


def test_resume_of_a_finished_run_changes_nothing(settings: list[str]) -> None:
    directory = run(settings).run
    before = directory.metrics_file.read_bytes(), (directory.checkpoint(4) / "model.safetensors").read_bytes()
    assert run(settings, resume=True).spent.steps == 4
    assert (directory.metrics_file.read_bytes(), (directory.checkpoint(4) / "model.safetensors").read_bytes()) == before


def damage(file: Path) -> None:
    """Flip one bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "state.json", "manifest.json", "optimizer/rank_00000.safetensors"]
)
def test_a_damaged_checkpoint_is_passed_over(settings: list[str], name: str) -> None:
    directory = run(settings).run
    damage(directory.checkpoint(4) / name)
    console = Console(record=True, width=400, file=io.StringIO())
    outcome = train(configure(settings, "train.steps=5"), resume=True, console=console)
    text = console.export_text()
    blamed = "" if name == "manifest.json" else name  # the bit may lie in another file's checksum
    assert re.search(f"step_00000004/{blamed}.*damaged; continuing from the newest good one, step_00000003", text), text
    assert outcome.spent.steps == 5 and directory.latest() == directory.checkpoint(5)
    assert [record["step"] for record in read_metrics(directory.path)["train"]] == [1, 2, 3, 4, 5]


def test_a_run_that_passed_over_a_damaged_checkpoint_can_be_killed(
    settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its next checkpoint: `latest` must not name the one that was set aside."""
    directory = run(settings).run
    damage(directory.checkpoint(4) / "state.json")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(settings, resume=True)
    assert directory.steps() == [3] and directory.latest() == directory.checkpoint(3)
    monkeypatch.undo()
    assert run(settings, resume=True).spent.steps == 4


def test_without_a_good_checkpoint_a_resume_is_refused(settings: list[str]) -> None:
    directory = run(settings).run
    for step in directory.steps():
        damage(directory.checkpoint(step) / "state.json")
    with pytest.raises(InputError, match=r"step_00000004/state.json.*none of the 1 older ones is good"):
        run(settings, "train.steps=6", resume=True)


def test_latest_that_names_nothing_is_refused(settings: list[str]) -> None:
    directory = run(settings).run
    directory.latest_file.write_text("step_00000009\n")
    with pytest.raises(InputError, match=r"step_00000003.*step_00000004"):
        run(settings, resume=True)


def test_going_back_sets_later_checkpoints_aside(settings: list[str]) -> None:
    directory = run(settings, "checkpoint.keep=null").run
    assert directory.steps() == [1, 2, 3, 4]
    first = (directory.checkpoint(4) / "model.safetensors").read_bytes()
    directory.latest_file.write_text("step_00000002\n")
    run(settings, "checkpoint.keep=1", resume=True)
    assert directory.steps() == [4], "keep=1 keeps the newest of this branch"
    aside = sorted(path.name for path in directory.checkpoints.glob("abandoned_*"))
    assert aside == ["abandoned_step_00000003", "abandoned_step_00000004"]
    assert (directory.checkpoint(4) / "model.safetensors").read_bytes() == first, "the same steps, done again"
    assert [record["step"] for record in read_metrics(directory.path)["train"]] == [1, 2, 3, 4]


def test_a_resume_says_what_changed_and_keeps_the_old_settings(settings: list[str]) -> None:
    directory = run(settings).run
    console = Console(record=True, width=300, file=io.StringIO())
    moved = f"run_dir={directory.path.parent / '.' / directory.path.name}/../{directory.path.name}"
    train(configure(settings, "train.steps=6", "optimizer.lr=5e-4", moved), resume=True, console=console)
    text = console.export_text()
    assert "run_dir was" not in text, "the same place by another name is no change"
    assert "changed from step 4 on: " in text
    assert "optimizer.lr was 0.001, is 0.0005" in text and "train.steps was 4, is 6" in text
    assert load_config(directory.path / "config.until_step_00000004.yaml").optimizer.lr == 0.001
    assert directory.load_config().optimizer.lr == 0.0005


def test_bf16_without_zero_is_refused(settings: list[str]) -> None:
    with pytest.raises(InputError, match=r"engine.zero_stage=1"):
        configure(settings, "train.precision=bf16", "engine.zero_stage=0")


def test_batches_that_do_not_divide_are_refused(settings: list[str]) -> None:
    with pytest.raises(InputError, match="global_batch_size=5 is not a multiple"):
        run(settings, "train.global_batch_size=5")


def test_no_data_is_refused(settings: list[str]) -> None:
    with pytest.raises(InputError, match="megafish prepare"):
        run(settings, "data.train=[]")


def test_divergence_stops_the_run_and_keeps_the_last_checkpoint(settings: list[str]) -> None:
    with pytest.raises(Diverged, match="diverged"):
        run(settings, "optimizer.lr=1e30", "optimizer.grad_clip=null", "train.steps=20", "schedule.warmup_fraction=0")
    directory = RunDir(configure(settings).run_path)
    assert all(torch_finite(directory.checkpoint(step)) for step in directory.steps())


def torch_finite(checkpoint: Path) -> bool:
    model = load_run(checkpoint).model
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_no_space_is_said_before_anything_is_written(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(InputError, match="no space for a checkpoint"):
        run(settings)
    assert RunDir(configure(settings).run_path).steps() == []


def test_a_run_killed_before_it_first_wrote_latest_continues(settings: list[str]) -> None:
    config = load_config("tiny", settings)
    run = train(config, console=QUIET).run
    name = run.latest_file.read_text().strip()
    run.latest_file.unlink()
    found = run.latest()
    assert found is not None and found.name == name
    with pytest.raises(InputError, match="holds a run already"):
        train(config, console=QUIET)
