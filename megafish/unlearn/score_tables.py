"""What `megafish unlearn score` prints of its summary."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

_SETS = ("forget", "retain", "general")
_COMPARED = ("model", "retain model")
_ROWS = {
    "probability": "probability of the answer",
    "rouge": "ROUGE-L recall of what it writes",
    "rouge_f1": "ROUGE-L F1 (KnowMem, VerbMem)",
    "extraction_strength": "extraction strength",
    "exact_memorization": "exact memorization",
    "truth_ratio": "truth ratio",
    "krr": "answers that tell it (KRR)",
    "kfr": "answers that do not (KFR)",
    "kfr_fluent": "answers that do not, and fluent",
    "hallucinated": "answers that tell something else",
    "entailed": "answers in agreement with the true one",
    "contradicted": "answers in contradiction to it",
    "similarity": "similarity to the true answer",
    "leaked": "texts leaked",
    "harmful": "harmful answers",
    "utility": "utility",
    "perplexity": "perplexity of what it writes, median",
    "fluent": "fluent answers",
    "distinct_2": "different pairs of words",
    "repetition": "share of the most frequent word",
    "empty": "empty answers",
    "linguistic_score": "Linguistic Score",
}
_STRESSED = ("probability", "rouge", "extraction_strength", "kfr", "harmful")


def tables(summary: dict[str, Any]) -> list[Table]:
    """The main one, then what the weights' rounding and other questions bring back."""
    models = summary["models"]
    found = [_main(summary)]
    altered = {title: figures for title, figures in models.items() if title != "retain model"}
    if len(altered) > 1:
        found.append(_altered(altered))
    if any(figures["ways"] for figures in models.values()):
        found.append(_ways(models))
    if any(figures["choices"] for figures in models.values()):
        found.append(_choices(models, summary["chance"], summary["choice_by"]))
    return found


def _main(summary: dict[str, Any]) -> Table:
    models = summary["models"]
    columns = [(name, title) for name in _SETS for title in _COMPARED if title in models and name in models[title]]
    table = _table(f"{summary['run']}, step {summary['step']}")
    for name, title in columns:
        table.add_column(name if title == "model" else f"{name}, retain model", justify="right")
    for key, label in _ROWS.items():
        cells = [models[title][name][key] if key != "utility" or name != "forget" else None for name, title in columns]
        if any(cell is not None for cell in cells):
            table.add_row(label, *map(_cell, cells))
    return table


def _altered(models: dict[str, Any]) -> Table:
    table = _table("with its weights or its block altered")
    for title in models:
        table.add_column("as it is" if title == "model" else title, justify="right")
    for name in _SETS:
        for key in _STRESSED:
            cells = [figures.get(name, {}).get(key) for figures in models.values()]
            if any(cell is not None for cell in cells):
                table.add_row(f"{name} | {_ROWS[key]}", *map(_cell, cells))
    return table


def _ways(models: dict[str, Any]) -> Table:
    table = _table("forget set, asked in other ways")
    rows: dict[tuple[str, str], list[float | None]] = {}
    for title, figures in models.items():
        table.add_column(title, justify="right")
        plain = {key: figures["forget"][key] for key in ("rouge", "kfr", "kfr_fluent", "harmful")}
        for way, said in {"as it is": plain, **figures["ways"]}.items():
            for key, value in said.items():
                if value is not None:
                    rows.setdefault((way, key), []).append(value)
    for (way, key), values in rows.items():
        table.add_row(f"{way} | {_ROWS[key]}", *map(_cell, values))
    return table


def _choices(models: dict[str, Any], chance: dict[str, float], by: str) -> Table:
    table = _table(f"questions with choices, by {by}: right ones")
    for title in models:
        table.add_column(title, justify="right")
    table.add_column("by chance", justify="right")
    for name, guessed in chance.items():
        table.add_row(name, *(_cell(figures["choices"][name]) for figures in models.values()), _cell(guessed))
    return table


def notes(summary: dict[str, Any]) -> list[str]:
    """What stands below the tables."""
    found = []
    utilities = {title: figures["utility"] for title, figures in summary["models"].items()}
    if any(value is not None for value in utilities.values()):
        found.append("utility of all that is kept: " + ", ".join(f"{t} {v:.3f}" for t, v in utilities.items()))
    if "forget_quality" in summary:
        quality = summary["forget_quality"]
        found.append(f"forget quality: p = {quality['p_value']:.3g}, KS statistic {quality['statistic']:.3f}")
    for title, figures in summary["models"].items():
        if "membership" in figures:
            areas = ", ".join(f"{name} {value:.3f}" for name, value in figures["membership"].items())
            found.append(f"membership AUC, {title}: {areas}")
    if "privacy_leak" in summary:
        found.append("PrivLeak: " + ", ".join(f"{name} {x:+.1f} %" for name, x in summary["privacy_leak"].items()))
    if summary["judge"] is not None:
        found.append(f"perplexity is under {summary['judge']}, which judges fluency too")
    else:
        found.append("perplexity and fluency take a judge: name a run with --retain-model")
    figures = summary["models"]["model"]
    slots = any(figures[name]["kfr"] is not None for name in _SETS if name in figures)
    if summary["nli"] is not None:
        also = ", also for KFR and KRR," if slots else ""
        found.append(f"agreement and contradiction{also} are judged by {summary['nli']}")
    if summary["embeddings"] is not None:
        also = ", also of names for KFR and KRR," if slots else ""
        found.append(f"similarity{also} is that of {summary['embeddings']}")
    return found


def _table(title: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    return table


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
