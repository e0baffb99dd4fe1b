"""Questions with choices, each choice's loss beside one from the logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megafish.config import UnlearnConfig
from megafish.errors import InputError
from megafish.model.load import LoadedRun, load_run
from megafish.unlearn.choices import LETTERS, Question, accuracy, chance, chosen, read_questions
from megafish.unlearn.options import ChoiceBy


@torch.no_grad()
def loss(loaded: LoadedRun, question: str, answer: str) -> float:
    head, text = f"Question: {question}\nAnswer: ", f"Question: {question}\nAnswer: {answer}"
    tokens, given = loaded.tokenizer.encode(text), loaded.tokenizer.encode(head)
    start = next(i for i, (a, b) in enumerate(zip(tokens, [*given, -1], strict=False)) if a != b)
    log_p = loaded.model(torch.tensor([tokens]))[0, :, : loaded.model.vocab_size].double().log_softmax(-1)
    places = torch.arange(start, len(tokens))
    return float(-log_p[places - 1, torch.tensor(tokens[start:])].mean())


@pytest.mark.parametrize("by", ChoiceBy)
def test_the_likeliest_choice(learned: Path, by: ChoiceBy) -> None:
    loaded = load_run(learned / "start", device="cpu")
    settings = UnlearnConfig(model="start", method="ga", forget=["f.jsonl"])
    rows = [json.loads(line) for line in (learned / "retain.jsonl").read_text().splitlines()]
    questions = [
        Question(row["question"], (rows[i - 1]["answer"], row["answer"], "Nobody can say where."), 1)
        for i, row in enumerate(rows)
    ]
    got = chosen(loaded, questions, settings, by, 5)
    wanted = []
    for question in questions:
        if by is ChoiceBy.text:
            losses = [loss(loaded, question.text, choice) for choice in question.choices]
        else:
            listed = "".join(f"\n{letter}. {choice}" for letter, choice in zip("ABC", question.choices, strict=True))
            losses = [loss(loaded, question.text + listed, letter) for letter in "ABC"]
        wanted.append(losses.index(min(losses)))
    assert got == wanted
    if by is ChoiceBy.text:
        assert accuracy(got, questions) == 1
    assert chance(questions) == pytest.approx(1 / 3)


def test_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    for row, match in (
        ({"question": "a?", "choices": ["x", "y"], "answer": 2}, "row 1: answer 2 is none of 2 choices"),
        ({"question": "a?", "choices": ["x"] * (len(LETTERS) + 1), "answer": 2}, "row 1: answer 2 is none of 11"),
        ({"question": "a?", "answer": 2}, "row 1: has no choices: expected question, choices"),
        ({"question": "a?", "choices": ["x", "y"], "answer": "B"}, "row 1: answer 'B' is no number: expected that of"),
    ):
        path.write_text(json.dumps(row) + "\n")
        with pytest.raises(InputError, match=match):
            read_questions([path])
    path.write_text("")
    with pytest.raises(InputError, match="no question there"):
        read_questions([path])
