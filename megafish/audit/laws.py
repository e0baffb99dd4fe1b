"""The log-linear laws of memorization (Carlini et al. 2023, section 4), fitted to what audits have measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megafish.audit.plots import Series
from megafish.audit.statistics import LogLinear, log_linear_fit
from megafish.audit.view import RunView


@dataclass(frozen=True)
class Law:
    """Share of passages recited against the logarithm of something."""

    run: str
    """Name of the run; of several: which."""
    against: str
    x: list[float]
    y: list[float]
    fit: LogLinear | None
    reason: str = ""
    """Why there is no fit."""

    def at(self, x: float) -> float:
        """What the fitted line gives at x."""
        assert self.fit is not None
        return self.fit.intercept + self.fit.slope * math.log10(x)


def laws(runs: Sequence[RunView]) -> list[Law]:
    """The three laws: copies and prompt length of every run, model size over several. A set of passages by their
    occurrences has the first one too. Left out is what was measured at one value alone."""
    found = []
    for run in runs:
        found += [copies_law(run), prompt_law(run)]
        found += [occurrences_law(run, each) for each in (run.summary["probes"] if run.summary else [])]
    found += [size_law(runs, masked) for masked in (False, True)]
    return [law for law in found if len(set(law.x)) > 1]


def copies_law(run: RunView) -> Law:
    """Canaries by copies in the corpus, without the control group."""
    points = [(level["exposures"], level["exact_rate"]) for level in run.levels if level["exposures"]]
    return _law(run.name, "copies", points)


def occurrences_law(run: RunView, probes: dict[str, Any]) -> Law:
    """Passages of a set by occurrences in the corpus, where these are known."""
    points = [(occurrences(level), level["exact_rate"]) for level in probes["levels"] if level["exposures"]]
    return _law(run.name, f"occurrences in {probes['name']}", points)


def occurrences(level: dict[str, Any]) -> float:
    """Mean occurrences of the passages of a level (of an audit that did not count them: the least of its bin)."""
    return float(level.get("occurrences") or level["exposures"])


def prompt_law(run: RunView) -> Law:
    """Canaries with the most copies by tokens given."""
    own = cells(run, "prompt_tokens", "offset")
    return _law(run.name, "tokens given", [(cell["prompt_tokens"], cell["levels"][-1]["exact_rate"]) for cell in own])


def size_law(runs: Sequence[RunView], masked: bool) -> Law:
    """Canaries with the most copies by parameters of the model, over the runs with or without a mask."""
    points = [(size, run.levels[-1]["exact_rate"]) for size, run in by_size(runs, masked)]
    return _law("runs with a mask" if masked else "runs without a mask", "parameters", points)


def by_size(runs: Sequence[RunView], masked: bool) -> list[tuple[float, RunView]]:
    """Audited runs with or without a mask by the parameters of their models, ascending."""
    own = [(float(run.summary["model"]["parameters"]), run) for run in runs if run.summary is not None and run.levels]
    return sorted((pair for pair in own if pair[1].masked == masked), key=lambda pair: pair[0])


def cells(run: RunView, axis: str, other: str) -> list[dict[str, Any]]:
    """The cells of the canaries' sweep along one axis, by its value; the other axis at what the main extraction has."""
    if run.summary is None:
        return []
    fixed = {"offset": 0, "prompt_tokens": run.summary["settings"]["prompt_tokens"]}[other]
    own = [cell for cell in run.summary["sweep"] if cell["set"] == "canaries" and cell[other] == fixed]
    return sorted(own, key=lambda cell: cell[axis])


def fitted(law: Law, masked: bool, index: int, places: Sequence[float] | None = None) -> list[Series]:
    """The line of a law, drawn at `places` (by default at its own x) in the colour of a run; none without a fit."""
    if law.fit is None:
        return []
    x = sorted(set(law.x))
    y = [law.at(value) for value in x]
    return [Series(x if places is None else places, y, "", masked, index, fit=True)]


def _law(run: str, against: str, points: Sequence[tuple[float, float]]) -> Law:
    x, y = [float(a) for a, _ in points], [float(b) for _, b in points]
    if len(set(x)) < 3:
        return Law(run, against, x, y, None, f"{len(set(x))} different values: a line fits any two")
    if len(set(y)) == 1:
        return Law(run, against, x, y, None, f"the rate is {y[0]:.0%} at all of them")
    return Law(run, against, x, y, log_linear_fit(x, y))
