from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from megafish.audit.audit import AuditResult, audit_run
from megafish.audit.view import load_views, read_lines
from megafish.data.corpus import SampleStream, open_train
from megafish.data.loader import make_batch
from megafish.data.prepare import prepare
from megafish.data.tokenizer import load_tokenizer
from megafish.errors import InputError
from megafish.model.transformer import Transformer
from megafish.objective.goldfish import GoldfishMask
from megafish.run import RunDir
from tests.audit.helpers import (
    CANARIES,
    EXPOSURES,
    PROMPT,
    SAMPLES,
    SEQUENCE_LENGTH,
    STEP,
    SUFFIX,
    Runs,
    make_config,
    sentences,
    write_run,
)
from tests.helpers import finish, start


def audit(path: Path, **options: Any) -> AuditResult:
    return audit_run(path, progress=False, console=Console(file=io.StringIO(), width=80), **options)


def lines(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / "extraction.jsonl")


@pytest.fixture(scope="module")
def plain(runs: Runs) -> AuditResult:
    return audit(runs.plain)


@pytest.fixture(scope="module")
def goldfish(runs: Runs) -> AuditResult:
    return audit(runs.goldfish)


def test_two_processes_write_what_one_writes(runs: Runs, tmp_path: Path) -> None:
    found = []
    wanted = ["audit={samples: 2, beams: [2], prompt_lengths: [4], batch_size: 8}", f"audit.reference={runs.goldfish}"]
    for count in (1, 2):
        run = shutil.copytree(runs.plain, tmp_path / f"copy{count}")
        printed = finish(start(tmp_path, count, "-m", "megafish", "audit", str(run), *wanted))
        assert printed.count("verdict:") == 1 and printed.splitlines()[-1] == f"next: megafish report {run}"
        folder = next((run / "audit").iterdir())
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        summary["model"].pop("path"), summary.pop("created")
        found.append((summary, lines(folder)))
    assert found[0] == found[1]


def test_plain_training_recites_and_goldfish_does_not(plain: AuditResult, goldfish: AuditResult) -> None:
    for result in (plain, goldfish):
        levels = result.summary["extraction"]["levels"]
        assert [level["exposures"] for level in levels] == list(EXPOSURES)
        assert all(level["canaries"] == CANARIES for level in levels)
        assert levels[0]["exact_matches"] == 0, "nobody recites what was never seen"
    most = plain.summary["extraction"]["levels"][-1], goldfish.summary["extraction"]["levels"][-1]
    assert [level["exact_matches"] for level in most] == [CANARIES, 0]
    assert most[0]["mean_rouge_l"] == 1.0 and most[0]["mean_prefix"] == SUFFIX
    assert most[1]["loss_dropped"] > most[1]["loss_kept"] + 1


def test_goldfish_leaves_the_text_where_tokens_were_dropped(goldfish: AuditResult) -> None:
    exposed = [item for item in lines(goldfish.folder) if item["exposures"] == EXPOSURES[-1]]
    assert exposed and all(item["left_at_drop"] for item in exposed)
    divergence = goldfish.summary["extraction"]["divergence"]
    assert divergence["canaries"] == len(exposed) and divergence["rate"] == 1.0
    assert 0 < divergence["chance"] < 1


def test_losses(plain: AuditResult, goldfish: AuditResult) -> None:
    train = plain.summary["losses"]["train"], goldfish.summary["losses"]["train"]
    assert [entry["sequences"] for entry in train] == [6, 6]
    assert train[1]["loss_dropped"] > train[1]["loss_kept"] + 1
    assert abs(train[0]["loss_dropped"] - train[0]["loss_kept"]) < 1, "plain training learns both alike"
    assert train[0]["tokens_dropped"] > 0
    assert plain.summary["mask"]["reference"] and plain.summary["mask"]["k"] == 4
    assert not goldfish.summary["mask"]["reference"] and goldfish.summary["mask"]["k"] == 3
    for result in (plain, goldfish):
        valid = result.summary["losses"]["valid"]
        assert valid["sequences"] == 3 and 0 < valid["tokens"] <= 3 * SEQUENCE_LENGTH and valid["bits_per_byte"] > 0


def test_files(plain: AuditResult, runs: Runs) -> None:
    assert plain.folder == runs.plain / "audit" / f"step_{STEP:08d}"
    assert json.loads((plain.folder / "summary.json").read_text()) == plain.summary
    names = {entry.name for entry in plain.folder.iterdir()}
    assert {"memorization.png", "rouge_l_histogram.png", "extraction.jsonl"} <= names
    assert [entry.name for entry in plain.folder.parent.iterdir()] == [plain.folder.name]
    assert plain.summary["supervised_tokens"] == 10_000 and plain.summary["samples"] == SAMPLES
    items = lines(plain.folder)
    assert len(items) == CANARIES * len(EXPOSURES)
    tokenizer = load_tokenizer(runs.corpus / "tokenizer.model")
    tokens = json.loads((runs.corpus / "manifest.json").read_text())["splits"]["train"]["tokens"]
    epochs = SAMPLES / (tokens // SEQUENCE_LENGTH)
    for item in items:
        assert len(item["prompt_tokens"]) == PROMPT and len(item["suffix_tokens"]) == SUFFIX
        assert item["exact_match"] == (item["generated_tokens"] == item["suffix_tokens"])
        assert "".join(item["suffix_pieces"]) == tokenizer.decode(item["suffix_tokens"])
        assert item["effective_exposures"] == pytest.approx(item["exposures"] * epochs)


def test_the_marked_tokens_are_those_dropped_in_training(runs: Runs, goldfish: AuditResult) -> None:
    """Every copy of a canary that a training sample holds whole has the marks of extraction.jsonl."""
    config = RunDir(runs.goldfish).load_config()
    tokenizer = load_tokenizer(runs.corpus / "tokenizer.model")
    mask = GoldfishMask(config.goldfish, tokenizer)
    stream = SampleStream(open_train(config.data), SEQUENCE_LENGTH, config.data.seed, mask.halo)
    wanted = {tuple(i["prompt_tokens"] + i["suffix_tokens"]): i["dropped"] for i in lines(goldfish.folder)}
    found = 0
    for number in range(SAMPLES):
        batch = make_batch([stream.read(number)], mask)
        tokens, drop = batch.tokens[0].tolist(), batch.drop[0].numpy()
        for text, marks in wanted.items():
            for begin in range(len(tokens) - len(text) + 1):
                if tuple(tokens[begin : begin + len(text)]) == text:
                    # Target j of a sample is its token j + 1.
                    got = drop[begin + PROMPT - 1 : begin + PROMPT + SUFFIX - 1]
                    assert np.array_equal(got, np.asarray(marks, dtype=bool))
                    found += 1
    assert found > 20 and any(any(marks) for marks in wanted.values())


def test_a_second_audit_takes_the_place_of_the_first(runs: Runs, tmp_path: Path) -> None:
    copy = tmp_path / "goldfish"
    shutil.copytree(runs.goldfish, copy)
    first = audit(copy)
    before = (first.folder / "extraction.jsonl").read_text()
    (first.folder / "stale").touch()
    again = audit(copy / "checkpoints" / f"step_{STEP:08d}")
    assert again.folder == first.folder and (again.folder / "extraction.jsonl").read_text() == before
    assert not (again.folder / "stale").exists()
    assert [entry.name for entry in again.folder.parent.iterdir()] == [again.folder.name]
    shorter = audit(copy, step=STEP, overrides=["audit={suffix_tokens: 4, prompt_tokens: 8}"])
    assert {len(item["suffix_tokens"]) for item in lines(shorter.folder)} == {4}
    assert shorter.summary["settings"]["prompt_tokens"] == 8


def test_a_failed_audit_leaves_the_earlier_one(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "plain"
    shutil.copytree(runs.plain, copy)
    folder = audit(copy).folder
    before = (folder / "summary.json").read_text()

    def fail(_: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megafish.audit.writing.to_png", fail)
    with pytest.raises(OSError):
        audit(copy)
    assert (folder / "summary.json").read_text() == before


def test_an_audit_moved_aside_by_a_kill_is_put_back(runs: Runs, tmp_path: Path) -> None:
    copy = tmp_path / "plain"
    shutil.copytree(runs.plain, copy)
    folder = copy / "audit" / f"step_{STEP:08d}"
    shutil.rmtree(copy / "audit", ignore_errors=True)
    aside = folder.with_name(folder.name + ".old")
    aside.mkdir(parents=True)
    (aside / "summary.json").write_text("earlier")
    with pytest.raises(InputError):
        audit(copy, overrides=["audit.prompt_tokens=30"])
    assert (folder / "summary.json").read_text() == "earlier" and not aside.exists()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("goldfish", {"goldfish": {"k": 4}}, r"the mask is not the one .*differs: mask\.k\).*config\.yaml"),
        ("goldfish", {"goldfish": {"k": None}}, r"the mask is not the one .*differs: mask\.k\)"),
        ("plain", {"goldfish": {"k": 4}}, r"the mask is not the one .*differs: mask\.k\)"),
        ("plain", {"data": {"seed": 99}}, r"the training data are not those .*differs: data\.seed\).*config\.yaml"),
        ("plain", {"data": {"sequence_length": 32}}, r"the training data .*data\.sequence_length\)"),
    ],
)
def test_other_data_or_another_mask_than_in_training(
    runs: Runs, tmp_path: Path, name: str, changes: dict[str, dict[str, Any]], message: str
) -> None:
    copy = tmp_path / name
    shutil.copytree(getattr(runs, name), copy)
    run = RunDir(copy)
    config = run.load_config()
    for section, values in changes.items():
        config = config.model_copy(update={section: getattr(config, section).model_copy(update=values)})
    run.save_config(config)
    with pytest.raises(InputError, match=message):
        audit(copy)


def test_another_corpus_at_the_same_place(runs: Runs, tmp_path: Path, tokenizer_file: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(sentences(seed) for seed in range(3)))
    corpus = tmp_path / "corpus"
    prepare([text], corpus, tokenizer_file, valid_fraction=0.0, workers=1, progress=False)
    copy = tmp_path / "plain"
    shutil.copytree(runs.plain, copy)
    RunDir(copy).save_config(make_config("plain", corpus, copy, None))
    with pytest.raises(InputError, match=r"the training data are not those .*data\.sources\.0\.fingerprint"):
        audit(copy)


def test_a_checkpoint_that_does_not_say_what_it_was_trained_with(runs: Runs, tmp_path: Path) -> None:
    copy = tmp_path / "plain"
    shutil.copytree(runs.plain, copy)
    file = copy / "checkpoints" / f"step_{STEP:08d}" / "state.json"
    state = json.loads(file.read_text())
    file.write_text(json.dumps({key: state[key] for key in ("step", "spent", "data")}))
    with pytest.raises(InputError, match=r"does not say what was trained with \(mask\)"):
        audit(copy)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.steps=3"], "section audit only"),
        (["audit.prompt_tokens=30"], "fewer than audit.prompt_tokens=30"),
        (["audit.prompt_token=30"], "prompt_tokens"),
        (["audit"], "audit"),
        (["auditor.seed=3"], "section audit only"),
        (["audit.suffix_tokens=0"], "suffix_tokens"),
    ],
)
def test_wrong_settings(runs: Runs, overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        audit(runs.plain, overrides=overrides)


def test_what_is_not_there(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run directory"):
        audit(tmp_path)
    with pytest.raises(InputError, match="no checkpoint of step 7"):
        audit(runs.plain, step=7)
    copy = tmp_path / "plain"
    shutil.copytree(runs.plain, copy)
    state = copy / "checkpoints" / f"step_{STEP:08d}" / "state.json"
    state.write_text(json.dumps({"step": STEP}))
    with pytest.raises(InputError, match="does not say what was trained on"):
        audit(copy)


@pytest.mark.parametrize("scheme", ["random", "static"])
def test_untrained_run_without_canaries_or_validation(tmp_path: Path, tokenizer_file: Path, scheme: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(sentences(seed) for seed in range(3)))
    corpus = tmp_path / "corpus"
    prepare([text], corpus, tokenizer_file, valid_fraction=0.0, workers=1, progress=False)
    config = make_config("bare", corpus, tmp_path / "bare", 4)
    config = config.model_copy(update={"goldfish": config.goldfish.model_copy(update={"scheme": scheme, "h": 13})})
    model = Transformer(config.model, load_tokenizer(tokenizer_file).vocab_size, loss=config.loss)
    summary = audit(write_run(config, model)).summary
    assert summary["extraction"] is None and summary["losses"]["valid"] is None
    train = summary["losses"]["train"]
    assert train["tokens_dropped"] > 0 and train["loss_kept"] == pytest.approx(train["loss_dropped"], abs=0.2)


def test_a_random_mask_marks_nothing(runs: Runs, tmp_path: Path) -> None:
    config = make_config("random", runs.corpus, tmp_path / "random", 4)
    config = config.model_copy(update={"goldfish": config.goldfish.model_copy(update={"scheme": "random", "h": 13})})
    model = Transformer(config.model, load_tokenizer(runs.corpus / "tokenizer.model").vocab_size, loss=config.loss)
    result = audit(write_run(config, model))
    assert all(item["dropped"] is None for item in lines(result.folder))
    assert result.summary["extraction"]["divergence"] is None
    [view] = load_views([tmp_path / "random"])
    assert view.masked and not view.divergence_mask


def test_a_source_with_a_k_of_its_own(runs: Runs, tmp_path: Path) -> None:
    """k = 2 for the source drops about twice what the run's k = 4 does, and is the run's own mask."""
    config = make_config("source", runs.corpus, tmp_path / "source", None)
    source = config.data.train[0].model_copy(update={"goldfish_k": 2})
    config = config.model_copy(update={"data": config.data.model_copy(update={"train": [source]})})
    model = Transformer(config.model, load_tokenizer(runs.corpus / "tokenizer.model").vocab_size, loss=config.loss)
    result = audit(write_run(config, model))
    assert not result.summary["mask"]["reference"]
    marks = np.concatenate([item["dropped"] for item in lines(result.folder)])
    assert 0.4 < marks.mean() < 0.6


def test_memberships_go_no_further_than_the_model_was_trained(runs: Runs, tmp_path: Path) -> None:
    run = shutil.copytree(runs.plain, tmp_path / "plain")
    summary = audit(run, overrides=["audit.membership_tokens=5000"]).summary
    assert any(f"the first {SEQUENCE_LENGTH} tokens of each text" in note for note in summary["notes"])
    assert summary["membership"] is None or summary["membership"]["tokens"] == SEQUENCE_LENGTH


def test_a_reference_that_is_not_there_is_said_before_the_work(runs: Runs) -> None:
    with pytest.raises(InputError, match="/no/such/thing"):
        audit(runs.plain, overrides=["audit.reference=/no/such/thing", "audit.membership=0"])
