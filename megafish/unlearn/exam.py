"""What every model is asked when it is scored: the same questions, judged by the same judges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megafish.config import UnlearnConfig
from megafish.decode.packed import for_decoding
from megafish.model.load import LoadedRun
from megafish.unlearn.choices import Question, accuracy, chosen
from megafish.unlearn.figures import set_figures, utility
from megafish.unlearn.items import ItemScore, Judge, Texts, membership, questions_of, rephrased, score_items
from megafish.unlearn.options import ChoiceBy
from megafish.unlearn.semantics import Semantics


@dataclass(frozen=True)
class Exam:
    """Texts, questions and judges, made once for all models."""

    settings: UnlearnConfig
    """Its template is how questions and answers stand in the texts."""
    sets: Mapping[str, Texts]
    """forget, and what is there of retain and general."""
    values: Mapping[str, set[str]]
    """Of all sets, what the relations of their slots have."""
    questions: Mapping[str, Sequence[Question]]
    judge: Judge | None
    holdout: Texts | None = None
    choice_by: ChoiceBy = ChoiceBy.text
    prefixes: Sequence[str] = ()
    semantics: Semantics | None = None
    batch_size: int = 32


def examine(
    loaded: LoadedRun, exam: Exam, *, progress: bool = False
) -> tuple[dict[str, list[ItemScore]], dict[str, Any]]:
    """Every text of the sets as the model takes it, and the figures of each set, of all, and of other ways to ask.

    On a CPU the matrices of the blocks are in memory twice meanwhile: the given model stays as it is.
    """
    loaded = replace(loaded, model=for_decoding(loaded.model))
    items = {name: _scored(loaded, exam, texts, progress=progress) for name, texts in exam.sets.items()}
    figures: dict[str, Any] = {name: set_figures(found) for name, found in items.items()}
    figures["utility"] = utility(items)
    if exam.holdout is not None:
        figures["membership"] = membership(loaded, exam.sets["forget"], exam.holdout, exam.batch_size)
    figures["choices"] = right_choices(loaded, exam)
    figures["ways"] = {
        way: {name: found[name] for name in ("rouge", "kfr", "kfr_fluent", "harmful")}
        for way, found in _asked_otherwise(loaded, exam).items()
    }
    return items, figures


def figures_of(loaded: LoadedRun, exam: Exam, texts: Texts) -> dict[str, float | None]:
    """Of a set that is none of the exam's."""
    return set_figures(_scored(loaded, exam, texts))


def right_choices(loaded: LoadedRun, exam: Exam) -> dict[str, float]:
    """Accuracy on each file of questions with choices."""
    return {
        name: accuracy(chosen(loaded, some, exam.settings, exam.choice_by, exam.batch_size, name), some)
        for name, some in exam.questions.items()
    }


def _asked_otherwise(loaded: LoadedRun, exam: Exam) -> dict[str, dict[str, float | None]]:
    """What the answers are when the questions are put in other words, and when an answer is begun already."""
    found = {}
    other = rephrased(exam.sets["forget"], loaded)
    if other is not None:
        found["rephrased"] = figures_of(loaded, exam, other)
    questions = questions_of(exam.sets["forget"])
    if questions is not None:
        for prefix in exam.prefixes:
            found[prefix] = set_figures(_scored(loaded, exam, questions, prefix=prefix))
    return found


def _scored(
    loaded: LoadedRun, exam: Exam, texts: Texts, *, prefix: str = "", progress: bool = False
) -> list[ItemScore]:
    return score_items(
        loaded, texts, exam.judge, exam.values, exam.batch_size,
        prefix=prefix, semantics=exam.semantics, progress=progress,
    )  # fmt: skip
