"""The bench from beginning to end. What is done already is not done again: a bench that was cut short goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from megafish.progress import track
from megafish.run import write_atomic
from megafish.unlearn.bench.models import MODELS, make_data, make_model, model_of
from megafish.unlearn.bench.plan import SUITES, Plan, Suite
from megafish.unlearn.bench.report import write_report
from megafish.unlearn.bench.scoring import Exam, make_exam, scored
from megafish.unlearn.bench.table import printed, suite_table
from megafish.unlearn.bench.unlearning import final, relearned, tuned


def run_bench(folder: str | Path, plan: Plan, *, console: Console | None = None) -> Path:
    """Train, tune, unlearn, score, stress, report; returns the page. Raises InputError."""
    console = console or Console()
    target = Path(folder)
    plan.keep(target)
    suites = [SUITES[name] for name in plan.suites]
    jobs = sum(len(MODELS) + len(plan.methods_of(suite)) for suite in suites) * plan.seeds
    tunings = sum(len(plan.methods_of(suite)) for suite in suites)
    with track(len(MODELS) * plan.seeds, "train", "model") as bar:
        for seed in range(plan.seeds):
            make_data(target, plan, seed)
            for name in MODELS:
                bar.note(f"seed {seed}: {name}")
                make_model(target, plan, seed, name)
                bar.advance()
    with track(tunings, "tune", "method") as bar:
        for suite in suites:
            for method in plan.methods_of(suite):
                bar.note(f"{suite.name}: {method}")
                tuned(target, plan, suite, method)
                bar.advance()
    with track(jobs, "unlearn and score", "model") as bar:
        for seed in range(plan.seeds):
            for suite in suites:
                exam: Exam | None = None
                for name in (*MODELS, *plan.methods_of(suite)):
                    if not record_of(target, suite, name, seed).is_file():
                        exam = exam or make_exam(target, suite, seed)
                        _record(target, plan, suite, name, seed, exam)
                    bar.advance()
    for suite in suites:
        console.print(printed(suite_table(suite.name, list(records(target, plan))), suite.about))
    page = write_report(target, plan, list(records(target, plan)))
    console.print(f"next: open {page} in a browser", highlight=False, soft_wrap=True)
    return page


def _record(folder: Path, plan: Plan, suite: Suite, name: str, seed: int, exam: Exam) -> None:
    """Make a model if a method makes it, score it, teach it again, and write all of it down."""
    began = time.monotonic()
    run = model_of(folder, seed, name) if name in MODELS else final(folder, plan, suite, name, seed)
    seconds = time.monotonic() - began
    figures = scored(exam, run)
    figures["relearned"] = relearned(folder, plan, suite, run, seed)
    settings = {}
    if name not in MODELS:
        chosen = tuned(folder, plan, suite, name)
        settings = {**chosen.settings, "steps": chosen.steps}
    path = record_of(folder, suite, name, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "suite": suite.name,
        "model": name,
        "seed": seed,
        "settings": settings,
        "seconds": seconds,
        "figures": figures,
    }
    write_atomic(path, json.dumps(record) + "\n")


def record_of(folder: Path, suite: Suite, name: str, seed: int) -> Path:
    """Where the figures of a model stand."""
    return folder / "results" / suite.name / f"{name.replace(' ', '_')}-seed{seed}.json"


def records(folder: Path, plan: Plan) -> Iterator[dict[str, Any]]:
    """All that are there, in the order of the suites and their models."""
    for suite in (SUITES[name] for name in plan.suites):
        for name in (*MODELS, *plan.methods_of(suite)):
            for seed in range(plan.seeds):
                path = record_of(folder, suite, name, seed)
                if path.is_file():
                    yield json.loads(path.read_text(encoding="utf-8"))
