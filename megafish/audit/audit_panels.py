"""Plots of what an audit measures beyond exposures: prompt lengths, offsets, closeness, tries, membership, runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from megafish.audit.laws import by_size, cells, fitted, occurrences, occurrences_law, prompt_law, size_law
from megafish.audit.panels import divergence_panel, memorization_panels
from megafish.audit.plots import WARM, Panel, Series, short_number
from megafish.audit.view import RunView

_LEVELS = 3
"""Numbers of copies drawn for one run: the highest."""
_BINS = 10
"""Of the ROUGE-L histogram."""
ATTACKS = {
    "loss": "loss",
    "zlib": "zlib",
    "min_k": "Min-K %",
    "min_k++": "Min-K++ %",
    "reference": "reference",
    "blind": "blind",
}
"""Names of the attacks of summary.json on the page."""


def all_panels(runs: Sequence[RunView]) -> list[Panel]:
    """All that audits have data for: memorization by copies, the plots of this file, where each run leaves the text."""
    divergence = [panel for run in runs if (panel := divergence_panel(run)) is not None]
    return memorization_panels(runs) + audit_panels(runs) + divergence


def audit_panels(runs: Sequence[RunView]) -> list[Panel]:
    """The plots that the audits of these runs have data for."""
    found = [
        _prompt_lengths(runs),
        _offsets(runs),
        _histogram(runs),
        _tries(runs),
        _closeness(runs),
        _occurrences(runs),
        _membership(runs),
        _by_size(runs),
        _by_k(runs),
    ]
    return [panel for panel in found if panel is not None]


def _series(x: Sequence[float], levels: Sequence[dict[str, Any]], label: str, masked: bool, index: int) -> Series:
    """The exact rate of levels with its interval."""
    y, low, high = ([level[f"exact_{part}"] for level in levels] for part in ("rate", "low", "high"))
    return Series(x, y, label, masked, index, low, high)


def _shade(run: RunView, number: int) -> tuple[bool, int]:
    """Kind and index of the colour of line `number` about one run: its own kind's, then the other's."""
    shades = len(WARM["light"])
    return (run.masked if number < shades else not run.masked), number % shades


def _by_copies(
    run: RunView, several: bool, levels: Sequence[dict[str, Any]]
) -> list[tuple[int, str, tuple[bool, int]]]:
    """(place in levels, label, colour) of the lines about one run: its levels with most copies; of several runs one."""
    if several:
        return [(-1, run.name, (run.masked, run.index))]
    count = min(_LEVELS, len(levels))
    return [(-back, f"{levels[-back]['exposures']} copies", _shade(run, back - 1)) for back in range(1, count + 1)]


def _sweep(runs: Sequence[RunView], axis: str, other: str) -> list[Series]:
    """The exact rate along one axis of the sweep: of several runs for most copies, of one run for several levels."""
    series = []
    for run in runs:
        own = cells(run, axis, other)
        if len(own) < 2:
            continue
        x = [cell[axis] for cell in own]
        for place, label, shade in _by_copies(run, len(runs) > 1, own[0]["levels"]):
            series.append(_series(x, [cell["levels"][place] for cell in own], label, *shade))
    return series


def _which(runs: Sequence[RunView]) -> str:
    return "Canaries with the most copies" if len(runs) > 1 else "Canaries, by their copies,"


def _prompt_lengths(runs: Sequence[RunView]) -> Panel | None:
    series = _sweep(runs, "prompt_tokens", "offset")
    if not series:
        return None
    fits = [line for run in runs for line in fitted(prompt_law(run), run.masked, run.index)]
    return Panel(
        "prompt_length",
        "Recited, by length of the prompt",
        "tokens given",
        "canaries [%]",
        series + fits,
        f"{_which(runs)} whose next tokens come out exactly (bars: Wilson 95 % interval"
        + "; dashed: log-linear fit, most copies" * bool(fits)
        + ").",
        percent=True,
        zero=True,
        top=1.0,
        log="x",
    )


def _offsets(runs: Sequence[RunView]) -> Panel | None:
    series = _sweep(runs, "offset", "prompt_tokens")
    if not series:
        return None
    return Panel(
        "offset",
        "Recited, by place of the prompt",
        "tokens of the passage before the prompt",
        "canaries [%]",
        series,
        f"{_which(runs)} whose next tokens come out exactly (bars: Wilson 95 % interval).",
        percent=True,
        zero=True,
        top=1.0,
    )


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
    audited = [run for run in runs if run.levels]
    if not audited:
        return None
    series = []
    for run in audited:
        for place, label, shade in _by_copies(run, len(runs) > 1, run.levels):
            level = run.levels[place]
            y = [count / level["canaries"] for count in level["discoverable"].values()]
            series.append(Series(range(len(y)), y, label, *shade))
    return Panel(
        "tries",
        "Recited in some of n tries",
        "drawn continuations",
        "canaries [%]",
        series,
        f"{_which(runs)} that come out at least once with 90 % certainty, by the probability of the true text under "
        "the sampling of the audit (Hayes et al. 2024).",
        ticks=list(audited[0].levels[-1]["discoverable"]),
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


def _occurrences(runs: Sequence[RunView]) -> Panel | None:
    """Passages of corpora by how often they occur there, where that is known."""
    series, fits = [], []
    for run in runs:
        for number, each in enumerate(run.summary["probes"] if run.summary else []):
            levels = [level for level in each["levels"] if level["exposures"]]
            if len(levels) < 2:
                continue
            label = each["name"] if len(runs) == 1 else run.name
            shade = _shade(run, number) if len(runs) == 1 else (run.masked, run.index)
            series.append(_series([occurrences(level) for level in levels], levels, label, *shade))
            fits += fitted(occurrences_law(run, each), *shade)
    if not series:
        return None
    return Panel(
        "occurrences",
        "Passages of corpora, by occurrences",
        "occurrences in the corpus, mean of a bin",
        "passages [%]",
        series + fits,
        "Passages whose next tokens come out exactly (bars: Wilson 95 % interval"
        + "; dashed: log-linear fit" * bool(fits)
        + ").",
        percent=True,
        zero=True,
        top=1.0,
        log="x",
    )


def _membership(runs: Sequence[RunView]) -> Panel | None:
    """ROC curves: of one run by attack, of several the best attack of each."""
    audited = [run for run in runs if run.summary is not None and run.summary["membership"] is not None]
    if not audited:
        return None
    found = [run.summary["membership"] for run in audited if run.summary is not None]
    # A logarithmic axis has no 0: a rate of none is drawn at half of the smallest that these groups can have.
    # One for each axis: what held-out texts there are decides which rates of false alarms can be known.
    floors = {
        key: min(1 / each[group] for each in found) / 2 for key, group in (("fpr", "non_members"), ("tpr", "members"))
    }
    series: list[Series] = []
    for run, each in zip(audited, found, strict=True):
        attacks = {name: figures for name, figures in each["attacks"].items() if name != "blind"}
        best = max(attacks, key=lambda name: attacks[name]["auc"])
        for i, (name, figures) in enumerate(attacks.items()):
            if len(runs) > 1 and name != best:
                continue
            label = f"{ATTACKS[name]} {figures['auc']:.2f}" if len(runs) == 1 else f"{run.name} {figures['auc']:.2f}"
            roc = {key: np.maximum(values, floors[key]) for key, values in figures["roc"].items()}
            shade = _shade(run, i) if len(runs) == 1 else (run.masked, run.index)
            series.append(Series(roc["fpr"], roc["tpr"], label, *shade, markers=False))
    floor = max(floors.values())
    series.append(Series([floor, 1], [floor, 1], "", masked=None, index=0, dashed=True, markers=False))
    return Panel(
        "membership",
        "Training or held-out text?",
        "false positive rate",
        "true positive rate",
        series,
        "Membership inference"
        + (", the attack that does best on each run" if len(runs) > 1 else "")
        + "; behind each name the area under its curve, 0.5 is guessing (dashed). Both axes are logarithmic: what "
        "counts is how many members are told with few false alarms.",
        log="xy",
    )


def _by_size(runs: Sequence[RunView]) -> Panel | None:
    series, fits = [], []
    for masked in (False, True):
        own = by_size(runs, masked)
        if len({size for size, _ in own}) < 2:
            continue
        label = "with a mask" if masked else "without"
        levels = [run.levels[-1] for _, run in own]
        index = own[0][1].index
        series.append(_series([size for size, _ in own], levels, label, masked, index))
        fits += fitted(size_law(runs, masked), masked, index)
    if not series:
        return None
    return Panel(
        "model_size",
        "Recited, by size of the model",
        "parameters",
        "canaries [%]",
        series + fits,
        "Canaries with the most copies (bars: Wilson 95 % interval" + "; dashed: log-linear fit" * bool(fits) + ").",
        percent=True,
        zero=True,
        top=1.0,
        log="x",
    )


def _by_k(runs: Sequence[RunView]) -> Panel | None:
    """Runs by the k of their mask; one without a mask stands at the right end, one whose sources alone name a k
    nowhere."""
    own = []
    for run in runs:
        if run.levels and run.summary is not None and run.summary["mask"] is not None:
            k = run.summary["mask"]["k"] if run.masked else math.inf
            if k is not None:
                own.append((float(k), run))
    own.sort(key=lambda pair: pair[0])
    ks = sorted({k for k, _ in own})
    if sum(k < math.inf for k in ks) < 2:
        return None
    series = []
    for masked in (True, False):
        pairs = [(ks.index(k), run) for k, run in own if run.masked == masked]
        if pairs:
            levels = [run.levels[-1] for _, run in pairs]
            series.append(_series([place for place, _ in pairs], levels, "", masked, pairs[0][1].index))
    return Panel(
        "k",
        "Recited, by k of the mask",
        "one token in k is dropped",
        "canaries [%]",
        series,
        "Canaries with the most copies (bars: Wilson 95 % interval).",
        ticks=["no mask" if k == math.inf else short_number(k) for k in ks],
        percent=True,
        zero=True,
        top=1.0,
    )
