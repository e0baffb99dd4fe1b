"""Plots of what an audit measures beyond exposures: prompt lengths, offsets, closeness, tries, membership, runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megafish.audit.plots import WARM, Panel, Series, short_number
from megafish.audit.view import RunView

_LEVELS = 3
"""Numbers of copies drawn for one run: the highest."""
_BINS = 10
"""Of the ROUGE-L histogram."""


def audit_panels(runs: Sequence[RunView]) -> list[Panel]:
    """The plots that the audits of these runs have data for."""
    found = [
        _sweep(runs, "prompt_tokens", "offset", "prompt_length", "Recited, by length of the prompt", "tokens given"),
        _sweep(runs, "offset", "prompt_tokens", "offset", "Recited, by place of the prompt", "tokens before it"),
        _histogram(runs),
        _tries(runs),
        _closeness(runs),
        _membership(runs),
        _by_size(runs),
        _by_k(runs),
    ]
    return [panel for panel in found if panel is not None]


def cells(run: RunView, axis: str, other: str) -> list[dict[str, Any]]:
    """The cells of the canaries' sweep along one axis, by its value; the other axis at what the main extraction has."""
    if run.summary is None:
        return []
    fixed = {"offset": 0, "prompt_tokens": run.summary["settings"]["prompt_tokens"]}[other]
    own = [cell for cell in run.summary["sweep"] if cell["set"] == "canaries" and cell[other] == fixed]
    return sorted(own, key=lambda cell: cell[axis])


def _series(
    run: RunView, label: str, x: Sequence[float], levels: Sequence[dict[str, Any]], name: str = "exact", index: int = 0
) -> Series:
    """A rate of levels with its interval."""
    y, low, high = ([level[f"{name}_{part}"] for level in levels] for part in ("rate", "low", "high"))
    return Series(x, y, label, run.masked, run.index + index, low, high)


def _shade(run: RunView, number: int) -> tuple[bool, int]:
    """Kind and index of the colour of line `number` about one run: its own kind's, then the other's."""
    shades = len(WARM["light"])
    return (run.masked if number < shades else not run.masked), number % shades


def _sweep(runs: Sequence[RunView], axis: str, other: str, name: str, title: str, xlabel: str) -> Panel | None:
    series = []
    for run in runs:
        own = cells(run, axis, other)
        if len(own) < 2:
            continue
        x = [cell[axis] for cell in own]
        count = len(own[0]["levels"])
        for back in range(1, 2 if len(runs) > 1 else min(_LEVELS, count) + 1):
            levels = [cell["levels"][-back] for cell in own]
            label = run.name if len(runs) > 1 else f"{levels[0]['exposures']}"
            series.append(_series(run, label, x, levels, index=back - 1 if len(runs) == 1 else 0))
    if not series:
        return None
    which = "with the most copies" if len(runs) > 1 else "by their copies"
    caption = f"Canaries {which} whose next tokens come out exactly (bars: Wilson 95 % interval)."
    return Panel(name, title, xlabel, "canaries [%]", series, caption, percent=True, zero=True, top=1.0)


def _histogram(runs: Sequence[RunView]) -> Panel | None:
    """ROUGE-L of the canaries with the most copies, and of the control group."""
    edges = np.linspace(0, 1, _BINS + 1)

    def share(items: list[dict[str, Any]]) -> np.ndarray:
        return np.histogram([item["rouge_l"] for item in items], edges)[0] / max(len(items), 1)

    series, control, bars = [], [], None
    for run in runs:
        if not run.levels or not run.levels[-1]["exposures"]:
            continue
        most = run.levels[-1]["exposures"]
        own = share([item for item in run.canaries if item["exposures"] == most])
        control += [item for item in run.canaries if item["exposures"] == 0]
        if len(runs) == 1:
            bars = Series(range(_BINS), own, f"{most} copies", run.masked, run.index)
        else:
            series.append(Series(range(_BINS), own, run.name, run.masked, run.index))
    if control:
        series.append(Series(range(_BINS), share(control), "control", masked=None, index=0, dashed=True))
    if bars is None and not series:
        return None
    return Panel(
        "rouge_l_histogram",
        "How much of the true text",
        "ROUGE-L F1, from",
        "canaries [%]",
        series,
        "Canaries with the most copies, beside the control group, which was not planted.",
        ticks=[f"{edge:.1f}" for edge in edges[:-1]],
        percent=True,
        zero=True,
        bars=bars,
    )


def _tries(runs: Sequence[RunView]) -> Panel | None:
    series = []
    for run in runs:
        if run.levels:
            level = run.levels[-1]
            y = [count / level["canaries"] for count in level["discoverable"].values()]
            series.append(Series(range(len(y)), y, run.name if len(runs) > 1 else "", run.masked, run.index))
    if not series:
        return None
    first = next(run for run in runs if run.levels)
    return Panel(
        "tries",
        "Recited in some of n tries",
        "drawn continuations",
        "canaries [%]",
        series,
        "Canaries with the most copies that come out at least once with 90 % certainty, by the probability of the true "
        "text under the sampling of the audit (Hayes et al. 2024).",
        ticks=list(first.levels[-1]["discoverable"]),
        percent=True,
        zero=True,
        top=1.0,
    )


def _closeness(runs: Sequence[RunView]) -> Panel | None:
    """Exact, nearly exact, drawn and searched, of one run."""
    if len(runs) != 1 or not runs[0].levels:
        return None
    run = runs[0]
    assert run.summary is not None
    ways = [("exact", "exact"), ("approximate", "10 % of edits"), ("bleu", "BLEU > 0.75")]
    if "sampled_rate" in run.levels[0]:
        ways.append(("sampled", f"any of {run.levels[0]['samples']}"))
    series = [
        Series(range(len(run.levels)), [level[f"{name}_rate"] for level in run.levels], label, *_shade(run, i))
        for i, (name, label) in enumerate(ways)
    ]
    for search in run.summary["beams"]:
        if search["set"] == "canaries":
            y = [level["best_rate"] for level in search["levels"]]
            label = f"{search['beams']} beams"
            series.append(Series(range(len(y)), y, label, *_shade(run, len(series)), dashed=True))
    return Panel(
        "closeness",
        "Word for word, or nearly",
        "copies in the training corpus",
        "canaries [%]",
        series,
        "Greedy decoding, unless it says otherwise.",
        ticks=[str(level["exposures"]) if level["exposures"] else "0\ncontrol" for level in run.levels],
        percent=True,
        zero=True,
        top=1.03,
    )


def _membership(runs: Sequence[RunView]) -> Panel | None:
    """ROC curves: of one run by attack, of several the best attack of each."""
    series: list[Series] = []
    floor = 1.0
    for run in runs:
        if run.summary is None or run.summary["membership"] is None:
            continue
        found = run.summary["membership"]
        floor = min(floor, 1 / found["non_members"], 1 / found["members"])
        attacks = {name: figures for name, figures in found["attacks"].items() if name != "blind"}
        best = max(attacks, key=lambda name: attacks[name]["auc"])
        for i, (name, figures) in enumerate(attacks.items()):
            if len(runs) > 1 and name != best:
                continue
            label = f"{name}, {figures['auc']:.2f}" if len(runs) == 1 else f"{run.name}, {figures['auc']:.2f}"
            roc = {key: np.maximum(values, floor / 2) for key, values in figures["roc"].items()}
            shade = _shade(run, i) if len(runs) == 1 else (run.masked, run.index)
            series.append(Series(roc["fpr"], roc["tpr"], label, *shade, markers=False))
    if not series:
        return None
    series.append(Series([floor / 2, 1], [floor / 2, 1], "", masked=None, index=0, dashed=True, markers=False))
    return Panel(
        "membership",
        "Training or held-out text?",
        "false positive rate",
        "true positive rate",
        series,
        "Membership inference; behind each name the area under its curve, 0.5 is guessing (dashed). Both axes are "
        "logarithmic: what counts is how many members are told with few false alarms.",
        log="xy",
    )


def _among(runs: Sequence[RunView], value: Callable[[RunView], float | None]) -> list[tuple[float, RunView]]:
    """Audited runs by a value, where they have at least two different ones."""
    found = [(x, run) for run in runs if run.levels and (x := value(run)) is not None]
    return sorted(found, key=lambda pair: pair[0]) if len({x for x, _ in found}) > 1 else []


def parameters_of(run: RunView) -> float | None:
    """Parameters of the audited model."""
    return None if run.summary is None else float(run.summary["model"]["parameters"])


def _by_size(runs: Sequence[RunView]) -> Panel | None:
    series = []
    for masked in (False, True):
        own = _among([run for run in runs if run.masked == masked], parameters_of)
        if own:
            levels = [run.levels[-1] for _, run in own]
            label = "with a mask" if masked else "without"
            series.append(_series(own[0][1], label, [x for x, _ in own], levels))
    if not series:
        return None
    return Panel(
        "model_size",
        "Recited, by size of the model",
        "parameters",
        "canaries [%]",
        series,
        "Canaries with the most copies (bars: Wilson 95 % interval).",
        percent=True,
        zero=True,
        top=1.0,
        log="x",
    )


def _by_k(runs: Sequence[RunView]) -> Panel | None:
    def k_of(run: RunView) -> float | None:
        if run.summary is None or run.summary["mask"] is None:
            return None
        return float(run.summary["mask"]["k"]) if run.masked else float("inf")

    own = _among(runs, k_of)
    if not own or sum(run.masked for _, run in own) < 2:
        return None
    levels = [run.levels[-1] for _, run in own]
    series = [_series(own[0][1], "", range(len(own)), levels)]
    return Panel(
        "k",
        "Recited, by k of the mask",
        "one token in k is dropped",
        "canaries [%]",
        series,
        "Canaries with the most copies (bars: Wilson 95 % interval).",
        ticks=["none" if x == float("inf") else short_number(x) for x, _ in own],
        percent=True,
        zero=True,
        top=1.0,
    )
