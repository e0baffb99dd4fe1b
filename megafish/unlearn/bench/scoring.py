"""Every figure of one model in one suite."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megafish.config import UnlearnConfig
from megafish.config_unlearn import RMU
from megafish.decode.generate import for_decoding
from megafish.model.load import LoadedRun, load_run
from megafish.unlearn import slots
from megafish.unlearn.bench.models import data_of, model_of
from megafish.unlearn.bench.plan import RETAIN, START, Suite
from megafish.unlearn.choices import accuracy, chance, chosen, read_questions
from megafish.unlearn.figures import compare, set_figures, utility
from megafish.unlearn.items import (
    ItemScore,
    Judge,
    Texts,
    extraction,
    make_judge,
    membership,
    read_texts,
    score_items,
)
from megafish.unlearn.options import ChoiceBy, Rounding
from megafish.unlearn.score import asked_otherwise
from megafish.unlearn.stress import rounded, without_direction

PREFIXES = ("Sure, here it is:",)
BATCH = 64


@dataclass(frozen=True)
class Exam:
    """What the models of a suite and a seed are asked; made once."""

    suite: Suite
    sets: dict[str, Texts]
    holdout: Texts
    settings: UnlearnConfig
    judge: Judge
    values: dict[str, set[str]]
    start: LoadedRun
    known: list[ItemScore]
    """Of the forget set, by the retain model."""
    privacy: dict[str, float]
    """Its membership AUC."""
    folder: Path
    """The sets' files."""


def make_exam(folder: Path, suite: Suite, seed: int) -> Exam:
    """Read the sets, and let the retain model answer first."""
    files = data_of(folder, seed)
    retain, start = (load_run(model_of(folder, seed, name)) for name in (RETAIN, START))
    forget = str(files / f"{suite.forget}.jsonl")
    settings = UnlearnConfig(model="before", method="ga", forget=[forget])

    def texts(name: str, file: str) -> Texts:
        return read_texts(name, [str(files / f"{file}.jsonl")], settings, start)

    sets = {
        "forget": texts("forget", suite.forget),
        "retain": texts("retain", suite.asked_retain),
        "general": texts("general", "authors/world_facts"),
    }
    judge = make_judge(retain, RETAIN, list(sets.values()), BATCH)
    values = slots.values_of(pair for each in sets.values() for pair in each.pairs)
    holdout = texts("holdout", suite.holdout)
    for_decoding(retain.model)
    return Exam(
        suite=suite,
        sets=sets,
        holdout=holdout,
        settings=settings,
        judge=judge,
        values=values,
        start=start,
        known=score_items(retain, sets["forget"], judge, values, BATCH),
        privacy=membership(retain, sets["forget"], holdout, BATCH),
        folder=files,
    )


def scored(exam: Exam, run: Path) -> dict[str, Any]:
    """All figures of a run."""
    loaded = load_run(run)
    for_decoding(loaded.model)
    found = {name: score_items(loaded, texts, exam.judge, exam.values, BATCH) for name, texts in exam.sets.items()}
    figures: dict[str, Any] = {name: set_figures(items) for name, items in found.items()}
    figures["utility"] = utility(found)
    figures["membership"] = membership(loaded, exam.sets["forget"], exam.holdout, BATCH)
    figures["holdout"] = set_figures(score_items(loaded, exam.holdout, exam.judge, exam.values, BATCH))
    figures["ways"] = asked_otherwise(loaded, exam.sets["forget"], exam.judge, exam.values, PREFIXES, BATCH)
    figures |= compare(
        {"model": figures, "retain model": {"membership": exam.privacy}},
        {"model": found["forget"], "retain model": exam.known},
    )
    figures["choices"] = _choices(loaded, exam)
    figures["rounded"] = {
        each.value: extraction(replace(loaded, model=rounded(loaded.model, each)), exam.sets["forget"], BATCH)
        for each in Rounding
    }
    if loaded.config.unlearn is not None and loaded.config.unlearn.method in RMU:
        ablated = without_direction(loaded, exam.start, exam.sets["forget"].items)
        figures["ablated"] = {
            "extraction_strength": extraction(ablated, exam.sets["forget"], BATCH),
            "choices": _choices(ablated, exam),
        }
    figures["sample"] = [
        (item.question, item.answer, item.generated) for item in found["forget"][:: max(1, len(found["forget"]) // 4)]
    ]
    gc.collect()
    return figures


def _choices(loaded: LoadedRun, exam: Exam) -> dict[str, dict[str, float]]:
    """Accuracy on each file of questions with choices, and that of guessing."""
    found = {}
    for name in exam.suite.choices:
        questions = read_questions([exam.folder / f"{name}.jsonl"])
        picks = chosen(loaded, questions, exam.settings, ChoiceBy.text, BATCH)
        found[name] = {"accuracy": accuracy(picks, questions), "chance": chance(questions)}
    return found
