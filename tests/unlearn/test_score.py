"""`megafish unlearn score` on a real model, its figures beside ones made in another way."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megafish.config import UnlearnConfig
from megafish.errors import InputError
from megafish.model.load import load_run
from megafish.unlearn.items import Judge, make_judge, read_texts
from megafish.unlearn.loop import unlearn
from megafish.unlearn.options import ChoiceBy
from megafish.unlearn.score import ScoreOptions, score_run
from megafish.unlearn.settings import unlearning_config
from tests.helpers import read_metrics


@pytest.fixture
def forgot(learned: Path, settings: list[str]) -> Path:
    config, _ = unlearning_config(str(learned / "start"), [*settings, "unlearn.method=wga", "unlearn.epochs=20"])
    return unlearn(config).run.path


def read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    lines = (folder / "items.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads((folder / "summary.json").read_text(encoding="utf-8")), [json.loads(line) for line in lines]


@torch.no_grad()
def loss(run: Path, question: str, answer: str, *, ended: bool = True) -> float:
    """Mean over the answer's tokens, from the logits of the text alone."""
    loaded = load_run(run, device="cpu")
    head, text = f"Question: {question}\nAnswer: ", f"Question: {question}\nAnswer: {answer}"
    tokens, given = loaded.tokenizer.encode(text), loaded.tokenizer.encode(head)
    tokens += [loaded.tokenizer.eos_id] if ended else []
    start = next(i for i, (a, b) in enumerate(zip(tokens, [*given, -1], strict=False)) if a != b)
    log_p = loaded.model(torch.tensor([tokens[:-1]]))[0, :, : loaded.model.vocab_size].double().log_softmax(-1)
    return float(-log_p[torch.arange(start - 1, len(tokens) - 1), torch.tensor(tokens[start:])].mean())


def test_figures_equal_those_of_the_run_and_of_the_logits(learned: Path, forgot: Path) -> None:
    summary, items = read(score_run(forgot, ScoreOptions()))
    last = read_metrics(forgot)["unlearned"][-1]
    figures = summary["models"]["model"]
    for name in ("forget", "retain"):
        for key in ("extraction_strength", "exact_memorization"):
            assert figures[name][key] == pytest.approx(last[f"{name}_{key}"], abs=1e-9), (name, key)
    assert figures["retain"]["rouge"] == 1 and figures["retain"]["utility"] > 0.9
    assert figures["forget"]["rouge"] < 1 and figures["forget"]["utility"] is None
    assert summary["judge"] == str(learned / "start")
    item = next(item for item in items if item["set"] == "forget")
    assert item["probability"] == pytest.approx(math.exp(-loss(forgot, item["question"], item["answer"])), rel=1e-4)
    # The judge reads what was written, without the token that ends a text.
    wanted = math.exp(loss(learned / "start", item["question"], item["generated"], ended=False))
    assert item["perplexity"] == pytest.approx(wanted, rel=1e-3)


def as_tofu(path: Path) -> list[dict[str, Any]]:
    """The rows with TOFU's columns, and with slots."""
    rows = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        place, year = row["answer"].removeprefix("In ").rstrip(".").split(" in ")
        wrong = [f"In {other} in {year}." for other in ("Oslo", "Lima") if other != place]
        other = {"paraphrased_question": row["question"].replace("Where", "In which place")}
        known = {"relation": "birth", "slots": [place, year]}
        rows.append(
            {**row, **other, **known, "paraphrased_answer": f"In {place} in {year}.", "perturbed_answer": wrong}
        )
    return rows


def test_beside_a_retain_model(learned: Path, forgot: Path, tmp_path: Path) -> None:
    rows, general = as_tofu(learned / "forget.jsonl"), as_tofu(learned / "retain.jsonl")
    tofu, kept, unseen = tmp_path / "tofu.json", tmp_path / "kept.json", tmp_path / "unseen.jsonl"
    tofu.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept.write_text("".join(json.dumps(row) + "\n" for row in general))
    unseen.write_text("".join(json.dumps({"question": f"Where was Eva {i} born?", "answer": f"In Rome in {i}."}) + "\n"
                              for i in range(1900, 1906)))  # fmt: skip
    start, choices = learned / "start", tmp_path / "choices.jsonl"
    wmdp = [{"question": row["question"], "choices": [row["perturbed_answer"][0], row["answer"]], "answer": 1}
            for row in rows]  # fmt: skip
    choices.write_text("".join(json.dumps(row) + "\n" for row in wmdp))
    options = ScoreOptions(
        forget=[str(tofu)],
        general=[str(kept)],
        holdout=[str(unseen)],
        choices=[str(choices)],
        retain_model=start,
        prefixes=["In"],
    )
    folder = score_run(forgot, options)
    summary, items = read(folder)
    models = summary["models"]
    # "Retained" here is the starting model: it prefers the truth, and tells what it has read from what it has not.
    assert models["retain model"]["forget"]["truth_ratio"] < 0.2 < models["model"]["forget"]["truth_ratio"]
    assert models["retain model"]["membership"]["loss"] == 1
    ratios = {title: [item["truth_ratio"] for item in items if item["model"] == title and item["set"] == "forget"]
              for title in models}  # fmt: skip
    distances = [abs(sum(r <= x for r in ratios["model"]) - sum(r <= x for r in ratios["retain model"])) / len(rows)
                 for x in [*ratios["model"], *ratios["retain model"]]]  # fmt: skip
    assert summary["forget_quality"]["statistic"] == pytest.approx(max(distances)) and max(distances) > 0.5
    assert summary["privacy_leak"]["loss"] > -100
    right = {title: figures["choices"][str(choices)] for title, figures in models.items()}
    assert right["retain model"] == 1 > right["model"] and summary["chance"] == {str(choices): 0.5}
    # Utility is of the retain set and of what else is named.
    own = [models["model"][name] for name in ("retain", "general")]
    parts = [each[key] for each in own for key in ("probability", "rouge")]
    truths = [
        max(0, 1 - item["truth_ratio"]) for item in items if item["model"] == "model" and item["set"] == "general"
    ]
    parts.append(sum(truths) / len(truths))
    assert models["model"]["utility"] == pytest.approx(len(parts) / sum(1 / part for part in parts))
    # A question in other words, and an answer that is begun already.
    assert models["retain model"]["ways"]["rephrased"]["kfr"] < 0.5 < models["model"]["ways"]["rephrased"]["kfr"]
    assert models["retain model"]["ways"]["In"]["kfr"] == 0 == models["retain model"]["forget"]["kfr"]
    assert models["retain model"]["forget"]["krr"] == 1 > models["model"]["forget"]["krr"]
    item = items[0]
    losses = [loss(forgot, item["question"], answer) for answer in rows[0]["perturbed_answer"]]
    ratio = math.exp(loss(forgot, item["question"], rows[0]["paraphrased_answer"]) - sum(losses) / len(losses))
    assert item["truth_ratio"] == pytest.approx(ratio, rel=1e-3)


def test_what_cannot_be_scored(learned: Path) -> None:
    with pytest.raises(InputError, match="not an unlearning run: name the texts with --forget"):
        score_run(learned / "start", ScoreOptions())
    folder = score_run(learned / "start", ScoreOptions(forget=[str(learned / "forget.jsonl")]))
    with pytest.raises(InputError, match=r"--ablate: .* is no run of rmu or adaptive_rmu"):
        score_run(learned / "start", ScoreOptions(forget=[str(learned / "forget.jsonl")], ablate=True))
    summary, _ = read(folder)
    assert summary["judge"] is None and summary["models"]["model"]["forget"]["extraction_strength"] > 0.9


def test_sets_that_do_not_fit_each_other(learned: Path, tmp_path: Path) -> None:
    forget, start, text = str(learned / "forget.jsonl"), learned / "start", tmp_path / "text.jsonl"
    text.write_text('{"text": "In Rome in 1900."}\n')
    kept, unseen = str(learned / "retain.jsonl"), str(tmp_path / "unseen.jsonl")
    Path(unseen).write_text('{"question": "Where was Eva born?", "answer": "In Rome in 1900."}\n')
    for more, message in (
        (
            {"retain": [str(learned / "retain.jsonl"), forget]},
            "retain: 4 of its 12 texts are in the forget set: name another file with --retain",
        ),
        ({"general": [forget]}, "general: 4 of its 4 texts are in the forget set"),
        ({"holdout": [forget]}, "--holdout: 4 of its 4 texts are in the forget set"),
        ({"retain": [kept], "holdout": [kept]}, "--holdout: 8 of its 8 texts are in the retain set, and no model may"),
        (
            {"holdout": [str(text), unseen]},
            "--holdout: has both questions and text, the forget set questions and answers",
        ),
        ({"choice_by": ChoiceBy.letter}, "--choice-by without --choices has no meaning"),
        ({"holdout": [str(text)]}, "--holdout: has text without questions, the forget set questions and answers"),
        ({"retain_model": start}, "is the run that is scored: name one that never saw the forget set"),
        ({"prefixes": ["Sure", " "]}, "--prefix '': begins no answer"),
    ):
        with pytest.raises(InputError, match=message):
            score_run(start, ScoreOptions(forget=[forget], **more))  # type: ignore[arg-type]


def test_the_start_is_needed_only_as_a_judge(learned: Path, forgot: Path) -> None:
    config = forgot / "config.yaml"
    config.write_text(config.read_text().replace(str(learned / "start"), str(learned / "gone")))
    with pytest.raises(InputError, match="gone"):
        score_run(forgot, ScoreOptions())
    summary, _ = read(score_run(forgot, ScoreOptions(retain_model=learned / "start")))
    assert summary["judge"] == str(learned / "start")


def test_questions_and_texts_in_one_set(learned: Path, tmp_path: Path) -> None:
    """Each row by its kind: a question is answered, a text continued from its half against as many true tokens."""
    book = tmp_path / "book.txt"
    told = [json.loads(line) for line in (learned / "retain.jsonl").read_text().splitlines()][:2]
    book.write_text("\n\n".join(f"Question: {row['question']}\nAnswer: {row['answer']}" for row in told))
    options = ScoreOptions(forget=[str(learned / "forget.jsonl"), str(book)])
    _, items = read(score_run(learned / "start", options))
    assert [item["question"] is None for item in items] == [False] * 4 + [True] * 2
    for item in items[4:]:  # known by heart, so that the second half comes out as it stands
        assert item["answer"].endswith(item["generated"]) and item["rouge_f1"] == 1 and item["leaked"] is True
    too_long = tmp_path / "long.jsonl"
    rows = [{"question": "Who?", "answer": "Ann."}, {"question": "Who?", "answer": "Ann and " * 60}]
    too_long.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="--forget: text 2 has"):
        score_run(learned / "start", ScoreOptions(forget=[str(too_long)]))
    with pytest.raises(InputError, match="--prefix begins answers, and the forget set is text without questions"):
        score_run(learned / "start", ScoreOptions(forget=[str(book)], prefixes=["Sure"]))


def test_what_is_fluent(learned: Path) -> None:
    """As likely and as varied as nearly all true answers: a model finds its own repetitions likely."""
    judge = Judge(load_run(learned / "start", device="cpu"), "start", gate=2.0, varied=0.9)
    said = ["she", "was", "born", "in", "lima", "in", "the", "year", "of", "snow"]
    assert judge.finds_fluent(said, 1.9) and not judge.finds_fluent(said, 2.1)
    assert not judge.finds_fluent(said + said, 0.1)  # 10 different pairs of 19
    assert not judge.finds_fluent(["of"] * 9, 0.1) and judge.finds_fluent(["of", "of"], 0.1)
    assert not judge.finds_fluent([], 0.1) and not judge.finds_fluent(said, None)


def test_a_judges_gates_are_of_the_true_answers(learned: Path, tmp_path: Path) -> None:
    loaded, files = load_run(learned / "start", device="cpu"), [str(learned / "retain.jsonl")]
    texts = read_texts("retain", files, UnlearnConfig(model="a", method="ga", forget=files), loaded)
    judge = make_judge(loaded, "start", [texts], 8)
    losses = [loss(learned / "start", pair.question or "", pair.answer, ended=False) for pair in texts.pairs]
    assert judge.gate == pytest.approx(np.percentile(losses, 99), rel=1e-3)
    assert judge.varied == 1  # "In Lima in 1912": all pairs differ
    # Of a text what is judged is how it goes on, and so are the gates.
    book = tmp_path / "book.txt"
    book.write_text(
        "In Rome the old town was born in the year of the moon.\n\nIn Oslo he was in Lima in the year 1912."
    )
    texts = read_texts("forget", [str(book)], UnlearnConfig(model="a", method="ga", forget=[str(book)]), loaded)
    judge, losses = make_judge(loaded, "start", [texts], 8), []
    for item in texts.items:
        with torch.no_grad():
            log_p = (
                loaded.model(torch.tensor([item.tokens[:-2]]))[0, :, : loaded.model.vocab_size].double().log_softmax(-1)
            )
        half, known = len(item.tokens) // 2, torch.tensor(item.tokens[1:-1])
        losses.append(float(-log_p[torch.arange(len(known)), known][half - 1 :].mean()))
    assert judge.gate == pytest.approx(np.percentile(losses, 99), rel=1e-3)
    short = tmp_path / "short.jsonl"
    short.write_text('{"question": "Who?", "answer": "Ann."}\n')
    texts = read_texts("forget", [str(short)], UnlearnConfig(model="a", method="ga", forget=[str(short)]), loaded)
    assert make_judge(loaded, "start", [texts], 8).varied == 0.5  # no true answer has pairs to go by
