"""The bench from beginning to end. What is done already is not done again: a bench that was cut short goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from rich.console import Console

from megafish.progress import table_console, track
from megafish.run import write_atomic
from megafish.unlearn.bench.models import MODELS, is_trained, make_data, make_model, model_of
from megafish.unlearn.bench.plan import SUITES, Plan, Suite
from megafish.unlearn.bench.pool import run_all, usual_workers
from megafish.unlearn.bench.report import write_report
from megafish.unlearn.bench.scoring import make_exam, scored
from megafish.unlearn.bench.table import caution, printed, suite_table
from megafish.unlearn.bench.unlearning import final, is_tuned, relearned, tuned


def run_bench(folder: str | Path, plan: Plan, *, workers: int | None = None, console: Console | None = None) -> Path:
    """Train, tune, unlearn, score, stress, report; returns the page. workers: processes, by default one a core.

    Raises InputError.
    """
    console = console or table_console()
    workers = workers or usual_workers()
    target = Path(folder)
    plan.keep(target)
    suites = [SUITES[name] for name in plan.suites]
    for seed in range(plan.seeds):
        make_data(target, plan, seed)
    seeds = range(plan.seeds)
    models = [(target, plan, seed, name) for seed in seeds for name in MODELS]
    _phase("train", "model", make_model, [each for each in models if not is_trained(*each)], workers)
    methods = [(target, plan, suite, method) for suite in suites for method in plan.methods_of(suite)]
    _phase("tune", "method", tuned, [each for each in methods if not is_tuned(*each)], workers)
    entries = [
        (target, plan, suite, name, seed)
        for seed in seeds
        for suite in suites
        for name in (*MODELS, *plan.methods_of(suite))
    ]
    missing = [each for each in entries if not record_of(target, *each[2:]).is_file()]
    _phase("unlearn and score", "model", measure_model, missing, workers)
    every = list(records(target, plan))
    for suite in suites:
        own = [record for record in every if record["suite"] == suite.name]
        console.print(printed(suite_table(suite.name, own), suite.about))
        if (warning := caution(own)) is not None:
            console.print(warning, highlight=False)
    page = write_report(target, plan, every)
    console.print(f"next: open {page} in a browser", highlight=False, soft_wrap=True)
    return page


def _phase(what: str, unit: str, call: Callable[..., Any], arguments: list[tuple[Any, ...]], workers: int) -> None:
    with track(len(arguments), what, unit) as bar:
        run_all([(call, each) for each in arguments], workers, bar)


def measure_model(folder: Path, plan: Plan, suite: Suite, name: str, seed: int) -> None:
    """Make a model if a method makes it, score it, teach it again, and write all of it down."""
    exam = _exam(folder, suite, seed)
    run = model_of(folder, seed, name) if name in MODELS else final(folder, plan, suite, name, seed)
    figures = None if run is None else scored(exam, run)
    if run is not None and figures is not None:
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
        "figures": figures,
    }
    write_atomic(path, json.dumps(record) + "\n")


# Of a suite and a seed made once in a process, which goes through its models one after another.
_exam = lru_cache(maxsize=1)(make_exam)


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
