"""`megafish unlearn score`: what a model still knows of a forget set, what it has kept, whether it writes sense.

Every figure stands for the model and, where one is named, for the retain model beside it: a model that was trained
without the forget set is what forgetting aims at, and none of the figures has an ideal value of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from megafish.config import UnlearnConfig
from megafish.config_unlearn import RMU
from megafish.errors import InputError
from megafish.model.load import LoadedRun, load_run
from megafish.progress import table_console
from megafish.run import write_atomic
from megafish.unlearn import slots
from megafish.unlearn.choices import chance, read_questions
from megafish.unlearn.exam import Exam, examine
from megafish.unlearn.figures import compare
from megafish.unlearn.items import ItemScore, Texts, make_judge, questions_of, read_texts
from megafish.unlearn.options import ChoiceBy, Rounding
from megafish.unlearn.score_tables import notes, tables
from megafish.unlearn.semantics import Semantics
from megafish.unlearn.stress import rounded, without_direction


@dataclass(frozen=True)
class ScoreOptions:
    """What is scored. Sets that are not named are those of the unlearning run."""

    forget: list[str] = field(default_factory=list)
    retain: list[str] = field(default_factory=list)
    general: list[str] = field(default_factory=list)
    """What the model knew besides, and no method was told to keep."""
    holdout: list[str] = field(default_factory=list)
    """Texts like those of the forget set that no model has seen."""
    choices: list[str] = field(default_factory=list)
    choice_by: ChoiceBy | None = None
    """None: by text."""
    retain_model: str | Path | None = None
    """A run that never saw the forget set. It is also the judge of fluency; without it the starting model is."""
    roundings: Sequence[Rounding] = ()
    prefixes: Sequence[str] = ()
    """Beginnings of answers that the model is given."""
    ablate: bool = False
    """RMU: take the direction that its block was steered in out of what the block says."""
    nli: str | None = None
    """Entailment model that judges contradictions, in the place of the slots' values."""
    embeddings: str | None = None
    """Model of embeddings that judges whether an answer names a slot in other words."""
    batch_size: int = 32


def score_run(path: str | Path, options: ScoreOptions, *, console: Console | None = None) -> Path:
    """Score a run, print the tables and write summary.json and items.jsonl into the run; returns their folder.

    Raises InputError.
    """
    console = console or table_console()
    loaded = load_run(path)
    settings = loaded.config.unlearn
    named = {
        "forget": options.forget or (settings.forget if settings else []),
        "retain": options.retain or (settings.retain if settings else []),
        "general": options.general,
    }
    if not named["forget"]:
        raise InputError(f"{path}: not an unlearning run: name the texts with --forget FILE")
    asked = settings or UnlearnConfig(model=str(path), method="ga", forget=named["forget"])
    sets = {name: read_texts(name, files, asked, loaded) for name, files in named.items() if files}
    holdout = read_texts("holdout", options.holdout, asked, loaded) if options.holdout else None
    _check_sets(sets, holdout)
    if not all(prefix.strip() for prefix in options.prefixes):
        raise InputError("--prefix '': begins no answer: leave it out, or say how an answer begins")
    if options.prefixes and questions_of(sets["forget"]) is None:
        raise InputError("--prefix begins answers, and the forget set is text without questions: leave it out")
    if options.ablate and (settings is None or settings.method not in RMU):
        raise InputError(f"--ablate: {path} is no run of rmu or adaptive_rmu: leave it out")
    named_choices = options.choices or (settings.choices if settings else [])
    if options.choice_by is not None and not named_choices:
        raise InputError("--choice-by without --choices has no meaning: name a file of questions, or leave it out")
    choice_by = options.choice_by or ChoiceBy.text
    questions = {name: read_questions([name]) for name in named_choices}
    if options.nli is not None and not any(texts.asked for texts in sets.values()):
        raise InputError(f"--nli {options.nli} judges answers, and the sets are texts without questions: leave it out")

    models = {"model": loaded}
    if options.retain_model is not None:
        if Path(options.retain_model).resolve() == Path(path).resolve():
            raise InputError(
                f"--retain-model {path}: is the run that is scored: name one that never saw the forget set"
            )
        models["retain model"] = peer_of(options.retain_model, loaded)
    # The starting model may be gone where neither of these asks for it.
    judged_by = options.retain_model or (settings.model if settings else None)
    start = peer_of(settings.model, loaded) if settings and (options.ablate or judged_by == settings.model) else None
    by = models.get("retain model", start)
    semantics = None
    if options.nli is not None or options.embeddings is not None:
        device = str(next(loaded.model.parameters()).device)
        semantics = Semantics(options.nli, options.embeddings, device=device, batch_size=options.batch_size)
    exam = Exam(
        settings=asked,
        sets=sets,
        values=slots.values_of(pair for texts in sets.values() for pair in texts.pairs),
        judge=None if by is None else make_judge(by, str(judged_by), list(sets.values()), options.batch_size),
        holdout=holdout,
        questions=questions,
        choice_by=choice_by,
        prefixes=options.prefixes,
        semantics=semantics,
        batch_size=options.batch_size,
    )
    models |= {each.value: replace(loaded, model=rounded(loaded.model, each)) for each in options.roundings}
    if options.ablate:
        assert start is not None
        models["without the direction"] = without_direction(loaded, start, sets["forget"].items)

    summary: dict[str, Any] = {
        "run": str(path),
        "step": loaded.step,
        "judge": None if exam.judge is None else exam.judge.name,
        "nli": options.nli,
        "embeddings": options.embeddings,
        "choice_by": choice_by.value,
        "chance": {name: chance(some) for name, some in questions.items()},
        "models": {},
    }
    lines: list[dict[str, Any]] = []
    forgotten: dict[str, list[ItemScore]] = {}
    for title, each in models.items():
        found, figures = examine(each, exam, progress=True)
        figures["forget"]["utility"] = None  # of what is kept
        summary["models"][title], forgotten[title] = figures, found["forget"]
        lines += [{"model": title, "set": name, **asdict(item)} for name, items in found.items() for item in items]
    if "retain model" in models:
        summary |= compare(summary["models"], forgotten)

    folder = loaded.run.path / "unlearning" / f"step_{loaded.step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "items.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_atomic(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    for table in tables(summary):
        console.print(table)
    for note in notes(summary):
        console.print(note, highlight=False)
    console.print(f"written to {folder}", highlight=False, soft_wrap=True)
    return folder


def _check_sets(sets: dict[str, Texts], holdout: Texts | None) -> None:
    """InputError where a set shares texts with the forget set, the holdout with any, and for one of another kind."""
    forget = sets["forget"]
    forgotten = {item.tokens for item in forget.items}
    for name, texts in sets.items():
        shared = sum(item.tokens in forgotten for item in texts.items)
        if name != "forget" and shared:
            raise InputError(
                f"{name}: {shared} of its {len(texts.items)} texts are in the forget set: name another file with "
                f"--{name}, or take them out"
            )
    if holdout is None:
        return
    for name, texts in sets.items():
        seen = {item.tokens for item in texts.items}
        shared = sum(item.tokens in seen for item in holdout.items)
        if shared:
            raise InputError(
                f"--holdout: {shared} of its {len(holdout.items)} texts are in the {name} set, and no model may have "
                "seen them: take them out"
            )
    if _kind(holdout) != _kind(forget):
        raise InputError(
            f"--holdout: has {_kind(holdout)}, the forget set {_kind(forget)}: membership is told from texts of the "
            "same kind"
        )


def _kind(texts: Texts) -> str:
    if not texts.asked:
        return "text without questions"
    return "questions and answers" if len(texts.asked) == len(texts.pairs) else "both questions and text"


def peer_of(path: str | Path, loaded: LoadedRun) -> LoadedRun:
    """Another run whose losses can be compared. InputError where its tokenizer is another."""
    found = load_run(path)
    if found.tokenizer.sha256 != loaded.tokenizer.sha256:
        raise InputError(f"{path}: has another tokenizer than {loaded.run.path}: their losses cannot be compared")
    return found
