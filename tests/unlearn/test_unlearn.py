"""`megafish unlearn` from a trained run to one that has forgotten."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megafish.audit.audit import audit_run
from megafish.config_unlearn import OPTIONS, RMU
from megafish.errors import InputError
from megafish.model.load import load_run
from megafish.run import RunDir
from megafish.unlearn.choices import accuracy, chosen, read_questions
from megafish.unlearn.loop import unlearn
from megafish.unlearn.options import ChoiceBy
from megafish.unlearn.score import ScoreOptions, score_run
from megafish.unlearn.settings import unlearning_config
from tests.helpers import read_metrics


def run(learned: Path, settings: list[str], *more: str) -> tuple[RunDir, list[dict[str, Any]]]:
    config, resume = unlearning_config(str(learned / "start"), [*settings, *more])
    outcome = unlearn(config, resume=resume)
    return outcome.run, read_metrics(outcome.run.path)["unlearned"]


def run_on(made: RunDir, *more: str) -> tuple[RunDir, list[dict[str, Any]]]:
    config, resume = unlearning_config(str(made.path), list(more))
    assert resume
    outcome = unlearn(config, resume=resume)
    return outcome.run, read_metrics(outcome.run.path)["unlearned"]


def test_the_start_has_it_by_heart_and_the_end_has_not(learned: Path, settings: list[str]) -> None:
    made, (before, after) = run(learned, settings, "unlearn.method=wga", "unlearn.epochs=30")
    assert before["forget_extraction_strength"] > 0.9 and before["retain_extraction_strength"] > 0.9
    assert before["step"] == 0 and after["step"] == 30
    assert after["forget_loss"] > before["forget_loss"] + 1
    assert after["forget_extraction_strength"] < 0.5 and after["retain_extraction_strength"] > 0.9
    loaded = load_run(made.path)
    assert loaded.step == 30 and loaded.config.unlearn is not None and loaded.config.unlearn.method == "wga"
    # What an audit asks of a run's training is that of the run it came from.
    assert made.command == f"megafish unlearn {made.path}"
    states = [json.loads((each.latest() / "state.json").read_text()) for each in (made, RunDir(learned / "start"))]  # type: ignore[operator]
    for key in ("spent", "order", "data", "mask"):
        assert states[0].get(key) == states[1].get(key), key
    found = audit_run(made.path, overrides=["audit={prompt_tokens: 6, suffix_tokens: 6, membership: 0}"]).summary
    assert found["step"] == 30 and found["tokens"] == states[1]["spent"]["tokens"]


@pytest.mark.parametrize("method", list(OPTIONS))
def test_every_method_goes_its_way(learned: Path, settings: list[str], tmp_path: Path, method: str) -> None:
    """The loss of what is to be forgotten rises above that of what is kept; what is put in its place is learned."""
    own = [f"unlearn.method={method}", "unlearn.epochs=12"]
    if method == "relearn":
        vague = tmp_path / "vague.jsonl"
        vague.write_text('{"question": "Where was she born?", "answer": "That is not known."}\n' * 4, encoding="utf-8")
        own.append(f"unlearn.substitutes={vague}")
    if method == "dpo":  # the refusal's gain soon satisfies the loss
        own += ["unlearn.epochs=20", "optimizer.lr=3e-3"]
    if method in RMU:  # 1200 is for a model of 7 billion parameters
        own += ["unlearn.retain_weight=1", "optimizer.lr=1e-2"]
    if method == "task_vector":  # what is known by heart gives a small change
        own.append("unlearn.negation=3")
    if method == "memflex":  # the magnitude is for a model of 7 billion parameters
        own.append("unlearn.magnitude=1e-6")
    made, (before, after) = run(learned, settings, *own)
    if method in ("idk", "relearn"):
        steps = read_metrics(made.path)["train"]
        assert steps[-1]["forget_loss"] < steps[0]["forget_loss"] - 0.2
    else:
        assert after["forget_loss"] > before["forget_loss"] + 0.2
        assert after["forget_loss"] > after["retain_loss"]


def test_a_task_vector_is_taken_off(learned: Path, settings: list[str], tmp_path: Path) -> None:
    """The weights are the starting ones minus twice the change that fine-tuning on the same texts makes."""
    made, _ = run(learned, settings, "unlearn.method=task_vector", "unlearn.negation=2", "train.steps=4",
                  "checkpoint.interval=2")  # fmt: skip
    tune = ["unlearn.method=relearn", f"unlearn.substitutes={learned / 'forget.jsonl'}", "unlearn.retain_loss=none"]
    tuned, _ = run(learned, settings, *tune, "train.steps=4", f"run_dir={tmp_path / 'tuned'}")
    start, change, end = (
        load_file(each.latest() / "model.safetensors")
        for each in (RunDir(learned / "start"), tuned, made)  # type: ignore[operator]
    )
    for name, weight in start.items():
        torch.testing.assert_close(end[name], weight - 2 * (change[name] - weight), rtol=0, atol=1e-6)
        assert not torch.equal(end[name], weight)
    longer, _ = unlearning_config(str(made.path), ["train.steps=6"])
    with pytest.raises(InputError, match="its task vector has been taken off after step 4"):
        unlearn(longer, resume=True)
    # Shortened to a checkpoint on the way, it would be a model that has learned what it was to forget.
    shutil.rmtree(made.checkpoint(4))
    made.latest_file.write_text(made.checkpoint(2).name + "\n")
    shorter, _ = unlearning_config(str(made.path), ["train.steps=2"])
    with pytest.raises(InputError, match=r"stands at step 2, where its task vector is not taken off: set train\.steps"):
        unlearn(shorter, resume=True)


@pytest.mark.parametrize("method", ["npo", "rmu"])
def test_adapters_are_trained_and_merged(learned: Path, settings: list[str], tmp_path: Path, method: str) -> None:
    """Nothing but matrices of the blocks differs, each by a product of the rank that was asked for."""
    own = [f"unlearn.method={method}", "unlearn.lora_rank=2", "optimizer.lr=1e-2", "schedule.name=constant"]
    own += ["schedule.warmup_steps=0", *(["unlearn.layer=3"] if method == "rmu" else [])]
    made, (before, after) = run(learned, settings, *own, "train.steps=6")
    start, end = (
        load_file(each.latest() / "model.safetensors")
        for each in (RunDir(learned / "start"), made)  # type: ignore[operator]
    )
    assert start.keys() == end.keys()
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    if method == "rmu":
        assert changed == {f"blocks.{number}.feed_forward.down.weight" for number in range(3)}
    else:
        assert changed == {name for name in start if name.startswith("blocks.") and start[name].ndim == 2}
        assert after["forget_loss"] > before["forget_loss"] + 0.2
    for name in changed:
        singular = torch.linalg.svdvals(end[name].double() - start[name].double())
        assert singular[2] < 1e-5 * singular[0], name
    # What is scored and audited afterwards is what was measured in the run.
    summary = json.loads((score_run(made.path, ScoreOptions()) / "summary.json").read_text())
    found = summary["models"]["model"]["forget"]["extraction_strength"]
    assert found == pytest.approx(after["forget_extraction_strength"], abs=1e-6)
    # The checkpoint holds the factors alone, and the run goes on from them bit for bit.
    index = json.loads((made.latest() / "optimizer" / "index.json").read_text())  # type: ignore[operator]
    assert all(name.endswith((".up", ".down")) for name in index["parameters"])
    longer, resume = unlearning_config(str(made.path), ["train.steps=8"])
    assert unlearn(longer, resume=resume).spent.steps == 8
    whole, _ = run(learned, settings, *own, "train.steps=8", f"run_dir={tmp_path / 'whole'}")
    files = [each.checkpoint(8) / "model.safetensors" for each in (made, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("method", ["wga", "dpo", "undial"])
def test_a_second_run_is_the_first_bit_for_bit(learned: Path, settings: list[str], tmp_path: Path, method: str) -> None:
    own = [f"unlearn.method={method}", "train.steps=3"]
    first, _ = run(learned, settings, *own)
    second, _ = run(learned, settings, *own, f"run_dir={tmp_path / 'again'}")
    files = [each.checkpoint(3) / "model.safetensors" for each in (first, second)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_rmu_leaves_all_but_three_projections_alone(learned: Path, settings: list[str]) -> None:
    made, _ = run(learned, settings, "unlearn.method=rmu", "unlearn.layer=3", "train.steps=4")
    before, after = (
        load_file(each.latest() / "model.safetensors")
        for each in (RunDir(learned / "start"), made)  # type: ignore[operator]
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"blocks.{number}.feed_forward.down.weight" for number in range(3)}


def test_the_usual_settings(learned: Path, settings: list[str]) -> None:
    config, resume = unlearning_config(str(learned / "start"), [settings[0], settings[1], "unlearn.epochs=16"])
    assert not resume and config.name == "start-npo" and config.optimizer.lr == 1e-5
    assert config.train.steps == 2 and config.train.precision == "fp32"  # 4 texts, a batch of 32, 16 epochs
    assert config.schedule.name == "linear" and config.schedule.warmup_fraction == pytest.approx(1 / 16)
    assert config.data.train[0].path == str(learned / "corpus")


def test_a_run_is_continued_by_its_directory(learned: Path, settings: list[str]) -> None:
    made, _ = run(learned, settings, "train.steps=2")
    config, resume = unlearning_config(str(made.path), ["train.steps=4"])
    assert resume
    unlearn(config, resume=True)
    assert RunDir(made.path).steps() == [2, 4]
    with pytest.raises(InputError, match=r"goes on as it began, and unlearn\.beta would be another: leave it out"):
        unlearning_config(str(made.path), ["unlearn.beta=0.5", "train.steps=6"])
    swapped = [f"unlearn.forget={learned / 'retain.jsonl'}", f"unlearn.retain={learned / 'forget.jsonl'}"]
    changed, _ = unlearning_config(str(made.path), [*swapped, "train.steps=6"])
    with pytest.raises(InputError, match="made by another starting model, or of other texts"):
        unlearn(changed, resume=True)


def test_a_reference_of_another_model_is_refused(learned: Path, settings: list[str]) -> None:
    made, _ = run(learned, settings, "train.steps=2")
    index = made.path / "reference" / "index.json"
    index.write_text(index.read_text().replace('"digest": "', '"digest": "0'))
    config, _ = unlearning_config(str(made.path), ["train.steps=4"])
    with pytest.raises(InputError, match="made by another starting model"):
        unlearn(config, resume=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["unlearn.method=rmu", "unlearn.layer=9"], "unlearn.layer=9: the model has blocks 1 to 4"),
        (["unlearn.method=ga", "unlearn.beta=2"], "beta has no meaning for method=ga"),
        (["unlearn.method=relearn"], "method=relearn needs substitutes"),
        (["unlearn.method=ceu", "unlearn.retain_loss=kl"], "method=ceu with retain_loss=kl"),
        (["unlearn.method=task_vector", "unlearn.retain_loss=ce"], "it would be taken off as well"),
        (["unlearn.method=task_vector", "unlearn.lora_rank=4"], "takes a change of the weights off"),
        (["engine.zero_stage=3", "unlearn.sure_percentile=99"], "unlearn.sure_percentile looks at whole gradients"),
        (["engine.zero_stage=3", "unlearn.method=memflex"], "method=memflex looks at whole gradients"),
        (["unlearn.method=memflex", "unlearn.retain_loss=none"], "it needs a retain_loss"),
        (["unlearn.method=memflex", "unlearn.lora_rank=4"], "compares whole gradients before the first step"),
        (["unlearn.sure_percentile=99", "optimizer.weight_decay=0.1"], "would shrink the weights that are to stay"),
        (["unlearn.lora_alpha=4"], "lora_alpha=4.0 has no meaning without lora_rank"),
        (["unlearn.lora_rank=4", "optimizer.name=muon", "optimizer.betas=[0.9,0.95]"], "Muon is for whole matrices"),
        (["unlearn.retain=[]"], "method=npo needs retain"),
        (["unlearn.template=Q {question}"], "must have {question} and behind it {answer}"),
        (["train.tokens=1e6"], "the budget of unlearning is unlearn.epochs, or train.steps"),
        (["engine.tensor_parallel=2"], "unlearning shards by engine.zero_stage"),
        (["train.steps=1"], "the last step has the rate that the schedule ends with, which is 0"),
        (["data.train=corpus"], "data.train: unlearning reads unlearn.forget and unlearn.retain"),
        (["unlearn={model: elsewhere}"], "unlearn.model=elsewhere: the run to start from is named already"),
        (["unlearn.model=elsewhere"], "unlearn.model=elsewhere: the run to start from is named already"),
        (["model.num_layers=5"], "model is that of the starting run"),
        (["loss.z_loss=1e-4"], "loss: its terms have no part in unlearning"),
        (["patch.size=4"], "patch: has no meaning for unlearning"),
        (["train.micro_batch_size=3", "train.global_batch_size=4"], "not a multiple"),
    ],
)
def test_bad_settings_are_one_clear_line(learned: Path, settings: list[str], words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        unlearning_config(str(learned / "start"), [*settings, *words])
    assert "\n" not in str(error.value)


def test_what_is_no_start(learned: Path, tmp_path: Path) -> None:
    for source, message in ((str(tmp_path), "not a run directory"), ("tiny", "a preset has no weights"),
                            ("nothing.yaml", "no run and no configuration")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            unlearning_config(source, [])
    (tmp_path / "own.yaml").write_text("optimizer: {lr: 1e-4}\n")
    with pytest.raises(InputError, match=r"unlearn\.model is not set"):
        unlearning_config(str(tmp_path / "own.yaml"), [])


def test_a_file_names_the_start(learned: Path, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        f"unlearn: {{model: {learned / 'start'}, method: ga, forget: {learned / 'forget.jsonl'}}}\n"
    )
    config, resume = unlearning_config(str(tmp_path / "own.yaml"), ["optimizer.lr=1e-4", "unlearn.epochs=16"])
    assert not resume and config.name == "start-ga" and config.optimizer.lr == 1e-4


def test_questions_with_choices_are_measured_on_the_way(learned: Path, settings: list[str], tmp_path: Path) -> None:
    """Of each file the accuracy that the same checkpoint has when it is scored."""
    files = []
    for name in ("forget", "retain"):
        rows = [json.loads(line) for line in (learned / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        wrong = [row["answer"] for row in rows]
        asked = [
            {"question": row["question"], "choices": [wrong[i - 1], row["answer"], wrong[i - 2]], "answer": 1}
            for i, row in enumerate(rows)
        ]
        files.append(tmp_path / f"{name}_asked.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
    listed = f"unlearn.choices=[{files[0]}, {files[1]}]"
    made, (before, after) = run(learned, settings, "unlearn.method=graddiff", "unlearn.epochs=12", listed)
    assert before["forget_asked_accuracy"] == before["retain_asked_accuracy"] == 1
    loaded = load_run(made.path)
    for path in files:
        questions = read_questions([path])
        assert loaded.config.unlearn is not None
        picks = chosen(loaded, questions, loaded.config.unlearn, ChoiceBy.text, 5)
        assert after[f"{path.stem}_accuracy"] == accuracy(picks, questions)
    assert after["forget_asked_accuracy"] < after["retain_asked_accuracy"]
    with pytest.raises(InputError, match=r"goes on as it began, and unlearn\.method would be another: leave it out"):
        run_on(made, "unlearn.method=rmu")
    for word, message in (
        ("data.train=corpus", "data.train: unlearning reads"),
        ("goldfish.k=4", "goldfish is that of"),
    ):
        with pytest.raises(InputError, match=message):
            run_on(made, word)
    with pytest.raises(InputError, match="the run to start from is named already"):
        unlearning_config(str(made.latest()), [f"unlearn.model={learned / 'start'}"])
    # It goes on with other questions: nothing is learned of them.
    made, records = run_on(made, f"unlearn.choices=[{files[1]}]", "train.steps=14")
    assert records[-1]["step"] == 14 and "forget_asked_accuracy" not in records[-1]
    assert records[-1]["retain_asked_accuracy"] > after["forget_asked_accuracy"]
    other = tmp_path / "elsewhere" / files[0].name
    with pytest.raises(InputError, match="two files forget_asked"):
        run(
            learned,
            settings,
            "unlearn.method=ga",
            f"run_dir={tmp_path / 'b'}",
            f"unlearn.choices=[{files[0]}, {other}]",
        )
