"""Every figure of one model in one suite."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megafish.config import UnlearnConfig
from megafish.config_unlearn import RMU
from megafish.decode.packed import for_decoding
from megafish.model.load import LoadedRun, load_run
from megafish.unlearn import slots
from megafish.unlearn.bench.models import data_of, model_of
from megafish.unlearn.bench.plan import RETAIN, START, Suite
from megafish.unlearn.choices import read_questions
from megafish.unlearn.exam import Exam, examine, figures_of, right_choices
from megafish.unlearn.figures import compare
from megafish.unlearn.items import ItemScore, Texts, extraction, make_judge, membership, read_texts, score_items
from megafish.unlearn.options import Rounding
from megafish.unlearn.stress import rounded, without_direction

PREFIXES = ("Sure, here it is:",)
BATCH = 64


@dataclass(frozen=True)
class SuiteExam:
    """What the models of a suite and a seed are asked, and what the retain model said; made once."""

    exam: Exam
    start: LoadedRun
    known: list[ItemScore]
    """Of the forget set, by the retain model."""
    privacy: dict[str, float]
    """Its membership AUC."""


def make_exam(folder: Path, suite: Suite, seed: int) -> SuiteExam:
    """Read the sets, and let the retain model answer first."""
    files = data_of(folder, seed)
    retain, start = (load_run(model_of(folder, seed, name)) for name in (RETAIN, START))
    retain = replace(retain, model=for_decoding(retain.model))
    settings = UnlearnConfig(model="before", method="ga", forget=[str(files / f"{suite.forget}.jsonl")])

    def texts(name: str, file: str) -> Texts:
        return read_texts(name, [str(files / f"{file}.jsonl")], settings, start)

    sets = {
        "forget": texts("forget", suite.forget),
        "retain": texts("retain", suite.asked_retain),
        "general": texts("general", "authors/world_facts"),
    }
    holdout = texts("holdout", suite.holdout)
    exam = Exam(
        settings=settings,
        sets=sets,
        values=slots.values_of(pair for each in sets.values() for pair in each.pairs),
        judge=make_judge(retain, RETAIN, list(sets.values()), BATCH),
        holdout=holdout,
        questions={name: read_questions([files / f"{name}.jsonl"]) for name in suite.choices},
        prefixes=PREFIXES,
        batch_size=BATCH,
    )
    known = score_items(retain, sets["forget"], exam.judge, exam.values, BATCH)
    return SuiteExam(exam, start, known, membership(retain, sets["forget"], holdout, BATCH))


def scored(of: SuiteExam, run: Path) -> dict[str, Any]:
    """All figures of a run."""
    exam, loaded = of.exam, load_run(run)
    forget = exam.sets["forget"]
    found, figures = examine(loaded, exam)
    assert exam.holdout is not None
    figures["holdout"] = figures_of(loaded, exam, exam.holdout)
    figures |= compare(
        {"model": figures, "retain model": {"membership": of.privacy}},
        {"model": found["forget"], "retain model": of.known},
    )
    figures["rounded"] = {
        each.value: extraction(replace(loaded, model=rounded(loaded.model, each)), forget, BATCH) for each in Rounding
    }
    if loaded.config.unlearn is not None and loaded.config.unlearn.method in RMU:
        ablated = without_direction(loaded, of.start, forget.items)
        figures["ablated"] = {
            "extraction_strength": extraction(ablated, forget, BATCH),
            "choices": right_choices(ablated, exam),
        }
    asked = found["forget"]
    figures["sample"] = [(item.question, item.answer, item.generated) for item in asked[:: max(1, len(asked) // 4)]]
    gc.collect()
    return figures
