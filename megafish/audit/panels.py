"""Which plots a report holds: from runs to panels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megafish.audit.laws import copies_law, fitted
from megafish.audit.plots import Panel, Series, record_arrays, smooth, thin
from megafish.audit.view import RunView

_POINTS = 600
_SMOOTH = 40
"""Training curves are means over 1/40 of the run."""
_LEAST_SMOOTHED = 2 * _SMOOTH
"""Records from which on they are smoothed."""
_MOST_MARKERS = 40


def memorization_panels(runs: Sequence[RunView]) -> list[Panel]:
    """Exact match, length recited and ROUGE-L against exposures, and the loss on the canaries."""
    audited = [run for run in runs if run.levels]
    if not audited:
        return []
    levels = sorted({level["exposures"] for run in audited for level in run.levels})
    ticks = [str(e) if e else "0\ncontrol" for e in levels]
    place = {e: i for i, e in enumerate(levels)}
    xlabel = "copies in the training corpus"

    def lines(key: str, low: str | None = None, high: str | None = None) -> list[Series]:
        found = []
        for number, run in enumerate(audited):
            # Runs stand side by side at each level, so that their intervals do not hide each other.
            shift = 0.12 * (number - (len(audited) - 1) / 2)
            found.append(
                Series(
                    x=[place[level["exposures"]] + shift for level in run.levels],
                    y=[level[key] for level in run.levels],
                    label=run.name if len(runs) > 1 else "",
                    masked=run.masked,
                    index=run.index,
                    low=[level[low] for level in run.levels] if low else None,
                    high=[level[high] for level in run.levels] if high else None,
                )
            )
        return found

    # Runs audited with other lengths share the axis of the longest.
    suffix = max(run.summary["settings"]["suffix_tokens"] for run in audited if run.summary)
    count = audited[0].levels[-1]["canaries"]
    exact = lines("exact_rate", "exact_low", "exact_high")
    fits = [line for run in audited for line in _copies_fit(run, place)]
    return [
        Panel(
            "memorization",
            "Recited word for word",
            xlabel,
            "canaries [%]",
            exact + fits,
            f"Canaries whose next {suffix} tokens come out exactly from greedy decoding (canaries a level: {count}; "
            "bars: Wilson 95 % interval" + "; dashed: log-linear fit" * bool(fits) + ").",
            ticks,
            percent=True,
            zero=True,
            top=1.0,
        ),
        Panel(
            "recited_length",
            "Length recited",
            xlabel,
            "tokens before the first error",
            lines("mean_prefix"),
            f"Mean number of suffix tokens reproduced before the first wrong one (at most {suffix}).",
            ticks,
            zero=True,
            top=1.03 * suffix,
        ),
        Panel(
            "rouge_l",
            "Overlap with the true text",
            xlabel,
            "ROUGE-L F1",
            lines("mean_rouge_l"),
            "Longest common subsequence of token ids, true against generated suffix. The level of the control group is "
            "what similar text gives without having been planted.",
            ticks,
            zero=True,
            top=1.03,
        ),
        _canary_loss(audited, len(runs) > 1, ticks, place, xlabel),
        *_over_training(audited, len(runs) > 1),
    ]


def _copies_fit(run: RunView, place: dict[int, int]) -> list[Series]:
    law = copies_law(run)
    return fitted(law, run.masked, run.index, [place[int(copies)] for copies in sorted(set(law.x))])


def _canary_loss(
    audited: Sequence[RunView], several: bool, ticks: list[str], place: dict[int, int], xlabel: str
) -> Panel:
    series = []
    for run in audited:
        split = run.divergence_mask and all(level["loss_dropped"] is not None for level in run.levels)
        keys = [("loss_kept", "kept", False), ("loss_dropped", "dropped", True)] if split else [("loss", "", False)]
        for key, what, dashed in keys:
            name = f"{run.name} {what}".strip() if several else what
            points = [(place[level["exposures"]], level[key]) for level in run.levels if level[key] is not None]
            x, y = zip(*points, strict=True)
            series.append(Series(x, y, name, run.masked, run.index, dashed=dashed))
    return Panel(
        "canary_loss",
        "Loss on the canaries",
        xlabel,
        "nats per token",
        series,
        "Cross-entropy of the suffix given the true text before it. Dropped tokens of the planted "
        "copies were not training targets.",
        ticks,
        zero=True,
    )


def _over_training(audited: Sequence[RunView], several: bool) -> list[Panel]:
    """Exact match of the most exposed canaries by checkpoint, where a run was audited at more than one."""
    series = []
    for run in audited:
        points = [
            (a["step"], a["supervised_tokens"], a["extraction"]["levels"][-1])
            for a in run.audits
            if a["extraction"] and (a["supervised_tokens"] is not None or not several)
        ]
        if len(points) > 1:
            series.append(
                Series(
                    x=[tokens if several else step for step, tokens, _ in points],
                    y=[level["exact_rate"] for *_, level in points],
                    label=run.name if several else "",
                    masked=run.masked,
                    index=run.index,
                    low=[level["exact_low"] for *_, level in points],
                    high=[level["exact_high"] for *_, level in points],
                )
            )
    if not series:
        return []
    return [
        Panel(
            "memorization_over_training",
            "Recited, by checkpoint",
            "supervised tokens" if several else "step",
            "canaries [%]",
            series,
            "Canaries with the most copies that come out exactly (bars: Wilson 95 % interval).",
            percent=True,
            zero=True,
            top=1.0,
        )
    ]


def divergence_panel(run: RunView) -> Panel | None:
    """Where a masked run leaves the text, counted from the last dropped token; None without a mask of its own."""
    divergence = run.extraction["divergence"] if run.extraction else None
    if divergence is None or not run.divergence_mask:
        return None
    farthest = 5
    seen, chance = np.zeros(farthest + 1), np.zeros(farthest + 1)
    for item in run.canaries:
        if item["left_at_drop"] is None or item["exposures"] < divergence["least_exposures"]:
            continue
        distance = _since_drop(item["dropped"], farthest)
        seen[distance[item["longest_common_prefix"]]] += 1
        chance += np.bincount(distance, minlength=farthest + 1) / len(distance)
    return Panel(
        "divergence",
        "Where it leaves the text",
        "tokens since the last dropped token",
        "canaries [%]",
        [Series(range(farthest + 1), chance / chance.sum(), "by chance", masked=None, index=0)],
        f"First wrong token of the canaries with {divergence['least_exposures']} copies or more. 0: it stands where "
        "the mask dropped one. By chance: a uniformly random position of the same suffixes.",
        ticks=[*map(str, range(farthest)), f"{farthest}+"],
        percent=True,
        zero=True,
        bars=Series(range(farthest + 1), seen / seen.sum(), run.name, run.masked, run.index),
    )


def _since_drop(dropped: Sequence[int], farthest: int) -> np.ndarray:
    """Distance of each position to the last dropped one at or before it, at most `farthest` (also where none is)."""
    position = np.arange(len(dropped))
    last = np.maximum.accumulate(np.where(np.asarray(dropped, dtype=bool), position, -farthest))
    return np.minimum(position - last, farthest)


def training_panels(runs: Sequence[RunView]) -> list[Panel]:
    """Training curves: over steps for one run, over supervised tokens (the fair axis) for several."""
    trained = [run for run in runs if run.metrics.get("train")]
    if not trained:
        return []
    curves = _Curves(trained, several=len(runs) > 1)
    panels = [
        curves.panel("loss", "Training loss", "nats per kept token", "train", "loss", "", settled=True),
        curves.panel(
            "valid_loss",
            "Validation loss",
            "nats per token",
            "valid",
            "valid_loss",
            "Held-out text, never masked. The first tenth of the run may lie above the plot.",
            settled=True,
        ),
        curves.dropped_panel(),
        *curves.canary_panels(),
        curves.panel(
            "grad_norm",
            "Gradient norm",
            "global L2 norm",
            "train",
            "grad_norm",
            "Before clipping.",
            zero=True,
        ),
        curves.panel("lr", "Learning rate", "learning rate", "train", "lr", "", zero=True, smoothed=False),
        curves.panel("throughput", "Throughput", "input tokens per second", "train", "tokens_per_s", "", zero=True),
    ]
    if any(run.masked for run in trained):
        panels.append(
            curves.panel(
                "drop_rate",
                "Tokens left out of the loss",
                "share of the targets [%]",
                "train",
                "drop_rate",
                "Expected: 1 in k of the tokens that have enough context.",
                zero=True,
                percent=True,
            )
        )
    # One point is no curve: what was measured once stands in the tables.
    return [panel for panel in panels if panel is not None and any(len(series.x) > 1 for series in panel.series)]


class _Curves:
    """Turns records of metrics.jsonl into panels with one line a run."""

    def __init__(self, runs: Sequence[RunView], several: bool) -> None:
        self.runs = runs
        self.several = several
        self.xlabel = "supervised tokens" if several else "step"

    def panel(
        self,
        name: str,
        title: str,
        ylabel: str,
        kind: str,
        key: str,
        caption: str,
        *,
        smoothed: bool = True,
        **options: Any,
    ) -> Panel | None:
        """One line a run that has the field; None where no run has it. Validation is never smoothed."""
        smoothed = smoothed and kind == "train"
        series = []
        for run in self.runs:
            line = self.line(run, kind, key, run.name if self.several else "", smoothed=smoothed)
            if line is not None:
                series.append(line)
        if not series:
            return None
        if smoothed and any(len(run.metrics[kind]) >= _LEAST_SMOOTHED for run in self.runs):
            caption += f" Mean over 1/{_SMOOTH} of the run"
            caption += "." if self.several else "; single steps lie faintly behind."
        return Panel(name, title, self.xlabel, ylabel, series, caption.strip(), **options)

    def dropped_panel(self) -> Panel | None:
        """Loss on dropped and on kept training tokens of the runs with a mask."""
        series = []
        for run in self.runs:
            for key, what in (("loss_kept", "kept"), ("loss_dropped", "dropped")):
                label = f"{run.name} {what}" if self.several else what
                line = self.line(run, "dropped", key, label, dashed=what == "dropped") if run.masked else None
                if line is not None:
                    series.append(line)
        if not series:
            return None
        return Panel(
            "dropped_loss",
            "Dropped and kept tokens, during training",
            self.xlabel,
            "nats per token",
            series,
            "Loss on training samples, forward pass only. Dropped tokens are predicted but not trained on there. "
            "Only a gap beyond the one that held-out text would show points to memorization of the kept ones.",
            settled=True,
        )

    def canary_panels(self) -> list[Panel]:
        """Loss and recitation of the canaries in the course of training."""
        loss = Panel(
            "canary_loss_in_training",
            "Canaries during training, by their copies",
            self.xlabel,
            "nats per token",
            self._by_copies("loss"),
            "Mean loss of planted passages, read and not recited. What is learned by heart goes to 0; passages of 0 "
            "copies were not planted.",
            zero=True,
        )
        recited = Panel(
            "recited_in_training",
            "Recited during training, by their copies",
            self.xlabel,
            "canaries [%]",
            self._by_copies("recited"),
            "Canaries that greedy decoding would continue word for word.",
            percent=True,
            zero=True,
            top=1.0,
        )
        return [panel for panel in (loss, recited) if panel.series]

    def _by_copies(self, figure: str) -> list[Series]:
        """A figure of the canaries: for one run by their copies, for several of those with the most."""
        series = []
        for run in self.runs:
            records = run.metrics.get("canaries", [])
            keys = [key for key in (records[-1] if records else {}) if key.startswith(f"{figure}_")]
            levels = sorted(int(key.removeprefix(f"{figure}_")) for key in keys)
            for copies in levels[-1:] if self.several else levels:
                label = f"{run.name}, {copies}" if self.several else f"{copies}"
                line = self.line(run, "canaries", f"{figure}_{copies}", label, dashed=copies == 0)
                if line is not None:
                    series.append(line)
        return series

    def line(
        self, run: RunView, kind: str, key: str, label: str, *, smoothed: bool = False, dashed: bool = False
    ) -> Series | None:
        """One field of one run over the x axis; None where the run has no such records."""
        steps, y = record_arrays(run.metrics.get(kind, []), "step", key)
        if not len(steps):
            return None
        x = steps
        if self.several:
            # Validation records know only their step.
            x = np.interp(steps, *record_arrays(run.metrics["train"], "step", "supervised_tokens"))
        raw = None
        if smoothed and len(x) >= _LEAST_SMOOTHED:
            raw = None if self.several else thin(x, y, _POINTS)
            y = smooth(y, max(2, len(y) // _SMOOTH))
        markers = kind != "train" and len(x) <= _MOST_MARKERS
        x, y = thin(x, y, _POINTS)
        return Series(x, y, label, run.masked, run.index, dashed=dashed, markers=markers, raw=raw)
