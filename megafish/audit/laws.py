"""The log-linear laws of memorization (Carlini et al. 2023, section 4), fitted to what audits have measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megafish.audit.audit_panels import cells, parameters_of
from megafish.audit.statistics import LogLinear, log_linear_fit
from megafish.audit.view import RunView


@dataclass(frozen=True)
class Law:
    """Share of canaries recited against the logarithm of something."""

    run: str
    """Name of the run; empty: over several."""
    against: str
    x: list[float]
    y: list[float]
    fit: LogLinear | None
    reason: str = ""
    """Why there is no fit."""


def laws(runs: Sequence[RunView]) -> list[Law]:
    """The three laws: copies and prompt length of every run, model size over several."""
    found = []
    for run in runs:
        seen = [level for level in run.levels if level["exposures"]]
        points = [(level["exposures"], level["exact_rate"]) for level in seen]
        found.append(_law(run.name, "copies", points))
        lengths = [
            (cell["prompt_tokens"], cell["levels"][-1]["exact_rate"]) for cell in cells(run, "prompt_tokens", "offset")
        ]
        found.append(_law(run.name, "tokens given", lengths))
    for masked in (False, True):
        own = [run for run in runs if run.levels and run.masked == masked]
        sizes = [(parameters_of(run) or 0.0, run.levels[-1]["exact_rate"]) for run in own]
        found.append(_law("runs with a mask" if masked else "runs without a mask", "parameters", sizes))
    return [law for law in found if len(set(law.x)) > 1]


def _law(run: str, against: str, points: Sequence[tuple[float, float]]) -> Law:
    x, y = [float(a) for a, _ in points], [float(b) for _, b in points]
    if len(set(x)) < 3:
        return Law(run, against, x, y, None, f"{len(set(x))} different values: a line fits any two")
    if len(set(y)) == 1:
        return Law(run, against, x, y, None, f"the rate is {y[0]:.0%} at all of them")
    return Law(run, against, x, y, log_linear_fit(x, y))
