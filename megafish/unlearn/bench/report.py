"""The bench's page: a table and three plots a suite, what was chosen, what the models answer."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from megafish import __version__
from megafish.audit.plots import to_png
from megafish.run import read_json, write_atomic
from megafish.unlearn.bench import plots
from megafish.unlearn.bench.plan import FASTER, LONGER, OPTIONS, SUITES, VARIANTS, Plan
from megafish.unlearn.bench.table import SuiteTable, caution, cell, markdown, suite_table


def write_report(folder: Path, plan: Plan, records: list[dict[str, Any]]) -> Path:
    """Write report/index.html, its plots, results.json and results.md; returns the page."""
    target = folder / "report"
    target.mkdir(parents=True, exist_ok=True)
    write_atomic(target / "results.json", json.dumps(records, indent=1) + "\n")
    sections, text = [], [about(plan)]
    for name in plan.suites:
        every = [record for record in records if record["suite"] == name]
        table = suite_table(name, every)
        own = [record for record in every if record["figures"] is not None]
        images = {}
        for kind, draw in (("trade_off", plots.trade_off), ("relearning", plots.relearning), ("stress", plots.stress)):
            image = to_png(draw(own))
            (target / f"{name}_{kind}.png").write_bytes(image)
            images[kind] = base64.b64encode(image).decode()
        chosen = _chosen(folder, plan, name)
        rows = "".join(f"| {' | '.join(map(str, row))} |\n" for row in chosen)
        warning = caution(every)
        parts = [f"## {name}: {SUITES[name].about}", *([warning] if warning else []), markdown(table)]
        text.append(
            "\n\n".join(parts) + "\n| method | always | tried | chosen | steps |\n"
            f"| --- | --- | --- | --- | ---: |\n{rows}"
        )
        sections.append(
            {
                "name": name,
                "about": SUITES[name].about,
                "caution": warning,
                "head": [row.model for row in table.rows],
                "rows": _rows(table),
                "verdicts": [row.verdict for row in table.rows],
                "images": images,
                "chosen": chosen,
                "samples": _samples(own),
            }
        )
    write_atomic(target / "results.md", "\n".join(text))
    environment = Environment(
        loader=PackageLoader("megafish.unlearn.bench"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template("bench.html").render(sections=sections, about=about(plan), version=__version__)
    write_atomic(target / "index.html", page)
    return target / "index.html"


def about(plan: Plan) -> str:
    """The plan in a few sentences."""
    rates = ", ".join(f"{rate:g}" for rate in plan.learning_rates)
    faster = ", ".join(
        f"{times} times these for {method}" for method, times in FASTER.items() if method in plan.methods
    )
    longer = ", ".join(
        f"{times} times as many for {method}" for method, times in LONGER.items() if method in plan.methods
    )
    return (
        f"Models of {plan.num_layers} layers of width {plan.hidden_size}, trained for {plan.train_steps} steps of "
        f"{plan.batch} x {plan.sequence_length} tokens on {plan.authors} made-up authors with 20 questions each, world "
        "facts, substances, questions that ask for harm and a book; the retain model on the same text without what is "
        "to be forgotten; the goldfish model on all of it with 1 in 4 tokens left out of the loss. Every method was "
        f"tuned on seed 0: learning rates {rates}{_aside(faster)}, {plan.tuning_steps} steps, measured every "
        f"{plan.measured_every}{_aside(longer)}. The extraction strength of the forget set, the retain set and texts "
        "never seen decided, with the poisons the retain set's and the accuracy on the questions with choices about "
        "them and about the world; nothing else. "
        f"{plan.seeds} seed{'s' if plan.seeds > 1 else ''}, each with data and models of its own: mean ± standard "
        f"deviation. Relearned: {plan.relearn_steps} steps of fine-tuning on the forget set.\n"
    )


def _aside(text: str) -> str:
    return f" ({text})" if text else ""


def _rows(table: SuiteTable) -> list[dict[str, Any]]:
    return [
        {
            "axis": column.axis,
            "name": column.name,
            "cells": [cell(column, row.values[number]) for row in table.rows],
        }
        for number, column in enumerate(table.columns)
    ]


def _chosen(folder: Path, plan: Plan, suite: str) -> list[tuple[str, str, str, str, int]]:
    """Of each method: what was set beside its defaults, what was tried, what was chosen, how many steps."""
    found = []
    for method in plan.methods_of(SUITES[suite]):
        record = read_json(folder / "tuning" / suite / f"{method}.json")
        given = [f"{key} {value}" for key, value in OPTIONS.get(method, {}).items()]
        always = ", ".join(([f"method {VARIANTS[method]}"] if method in VARIANTS else []) + given)
        tried = "; ".join(_settings(trial["settings"]) for trial in record["trials"])
        found.append((method, always, tried, _settings(record["settings"]), record["steps"]))
    return found


def _settings(settings: dict[str, float]) -> str:
    return ", ".join(f"{key.split('.')[-1]} {value:g}" for key, value in settings.items())


def _samples(records: list[dict[str, Any]]) -> list[tuple[str | None, str, list[tuple[str, str]]]]:
    """Questions of the first seed with every model's answer."""
    first = [record for record in records if record["seed"] == 0]
    if not first:
        return []
    found = []
    for number, (question, answer, _) in enumerate(first[0]["figures"]["sample"][:3]):
        said = [(record["model"], record["figures"]["sample"][number][2]) for record in first]
        found.append((question, answer, said))
    return found
