"""Questions with choices, as WMDP and MMLU have them: which choice a model finds likeliest."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megafish.audit.scores import token_scores
from megafish.config import Config, UnlearnConfig
from megafish.data.tokenizer import Tokenizer
from megafish.errors import InputError
from megafish.model.load import LoadedRun
from megafish.unlearn.data import Item, encode, without_end
from megafish.unlearn.options import ChoiceBy
from megafish.unlearn.readers import Pair, read_rows, several

LETTERS = "ABCDEFGHIJ"


class Question(NamedTuple):
    """A question, its choices and the number of the right one."""

    text: str
    choices: tuple[str, ...]
    right: int


def read_questions(paths: Sequence[str | Path]) -> list[Question]:
    """Rows with question, choices and answer. InputError for others."""
    found = []
    for path in map(Path, paths):
        for number, row in enumerate(read_rows(path), start=1):
            missing = [key for key in ("question", "choices", "answer") if key not in row]
            if missing:
                raise InputError(
                    f"{path}: row {number}: has no {' and no '.join(missing)}: expected question, choices (a list), "
                    "answer (a number)"
                )
            try:
                right = int(row["answer"])
            except (TypeError, ValueError):
                raise InputError(
                    f"{path}: row {number}: answer {row['answer']!r} is no number: expected that of the right choice, "
                    "counted from 0"
                ) from None
            question = Question(str(row["question"]), several(row["choices"]), right)
            if len(question.choices) < 2 or not all(choice.strip() for choice in question.choices):
                raise InputError(f"{path}: row {number}: choices has to be a list of two or more texts, none empty")
            if not 0 <= question.right < len(question.choices) <= len(LETTERS):
                raise InputError(
                    f"{path}: row {number}: answer {question.right} is none of {len(question.choices)} choices, "
                    "counted from 0"
                )
            found.append(question)
    if not found:
        raise InputError(f"{', '.join(map(str, paths))}: no question there")
    return found


def chosen(
    loaded: LoadedRun,
    questions: Sequence[Question],
    settings: UnlearnConfig,
    by: ChoiceBy,
    batch_size: int,
    name: str = "",
) -> list[int]:
    """The model's choice for each question. name: the file's, for errors."""
    longest = loaded.config.data.sequence_length
    items = _encoded(questions, by, settings, loaded.tokenizer, longest, f"--choices {name}".strip())
    scores = token_scores(loaded.model, [item.tokens for item in items], batch_size=batch_size)
    # By text: without the token that ends it, which says nothing about the choice.
    losses = [
        float(-without_end(score.log_prob[item.start - 1 :]).mean()) for item, score in zip(items, scores, strict=True)
    ]
    return likeliest(losses, questions)


def likeliest(losses: Sequence[float], questions: Sequence[Question]) -> list[int]:
    """The choice of each question with the smallest loss. losses: of all choices, question after question."""
    starts = np.cumsum([0, *(len(question.choices) for question in questions)])
    return [int(np.argmin(losses[start:end])) for start, end in pairwise(starts)]


class Asked(NamedTuple):
    """A file of questions, and each of their choices as the answer, as tokens."""

    name: str
    questions: list[Question]
    items: list[Item]


def read_asked(config: Config, tokenizer: Tokenizer) -> list[Asked]:
    """What `unlearn.choices` names. InputError for files that do not fit, and for two of one name."""
    settings = config.unlearn
    assert settings is not None
    found: dict[str, Asked] = {}
    for path in settings.choices:
        name = Path(path).stem
        if name in found:
            raise InputError(f"unlearn.choices names two files {name}: their figures would have one name: rename one")
        questions = read_questions([path])
        longest = config.data.sequence_length
        items = _encoded(questions, ChoiceBy.text, settings, tokenizer, longest, f"unlearn.choices {path}")
        found[name] = Asked(name, questions, items)
    return list(found.values())


def accuracy(choices: Sequence[int], questions: Sequence[Question]) -> float:
    """Share of right choices."""
    return float(np.mean([choice == question.right for choice, question in zip(choices, questions, strict=True)]))


def chance(questions: Sequence[Question]) -> float:
    """Accuracy of guessing."""
    return float(np.mean([1 / len(question.choices) for question in questions]))


def _encoded(
    questions: Sequence[Question],
    by: ChoiceBy,
    settings: UnlearnConfig,
    tokenizer: Tokenizer,
    longest: int,
    where: str,
) -> list[Item]:
    """All choices, question after question."""
    return [
        item
        for number, question in enumerate(questions, start=1)
        for item in encode(_pairs(question, by), settings, tokenizer, longest, f"{where}: row {number}")
    ]


def _pairs(question: Question, by: ChoiceBy) -> list[Pair]:
    if by is ChoiceBy.text:
        return [Pair(question.text, choice) for choice in question.choices]
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False))
    return [Pair(f"{question.text}\n{listed}", letter) for letter in LETTERS[: len(question.choices)]]
