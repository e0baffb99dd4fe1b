"""Plots of the bench: what is forgotten against what is kept, and what brings it back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from megafish.audit.plots import COOL, INK, WARM, blank
from megafish.unlearn.bench.plan import GOLDFISH, RETAIN, START, UTILITY_KEPT, WITHIN

_BASELINES = {START: INK["light"]["text"], RETAIN: COOL["light"][0], GOLDFISH: COOL["light"][1]}
_METHOD = WARM["light"][0]
_SIZE = (7.6, 4.4)

Records = Sequence[dict[str, Any]]


def trade_off(records: Records) -> Figure:
    """Extraction strength of the forget set over the utility that is left, a point a model, means over the seeds."""
    figure, axes = blank("what is forgotten, and what it costs", _SIZE)
    before = _mean(records, START, "utility")
    points = {
        name: (
            100 * _mean(records, name, "utility") / before,
            _mean(records, name, "forget", "extraction_strength"),
        )
        for name in _models(records)
    }
    limit = points[RETAIN][1] + WITHIN
    axes.axhspan(0, limit, color=COOL["light"][0], alpha=0.07, lw=0)
    axes.axvline(100 * UTILITY_KEPT, color=INK["light"]["muted"], lw=0.8, ls="--")
    axes.annotate("95 %", (100 * UTILITY_KEPT, 1.0), xytext=(3, 0), textcoords="offset points", fontsize=8,
                  color=INK["light"]["muted"], va="top")  # fmt: skip
    for name, (x, y) in points.items():
        axes.plot(x, y, "D" if name in _BASELINES else "o", color=_BASELINES.get(name, _METHOD), ms=6, clip_on=False)
    _label(axes, points)
    axes.set_xlabel("utility that is left [%]")
    axes.set_ylabel("extraction strength of the forget set")
    axes.set_ylim(-0.02, 1.05)
    return figure


def relearning(records: Records) -> Figure:
    """Extraction strength over the steps of fine-tuning on the forget set, a line a model."""
    figure, axes = blank("taught the forget set again", _SIZE)
    ends: dict[str, tuple[float, float]] = {}
    for name in _models(records):
        curves = [record["figures"]["relearned"] for record in records if record["model"] == name]
        length = min(map(len, curves))
        mean = np.mean([curve[:length] for curve in curves], axis=0)
        width, alpha = (2.2, 1.0) if name in _BASELINES else (1.0, 0.6)
        axes.plot(range(length), mean, color=_BASELINES.get(name, _METHOD), lw=width, alpha=alpha)
        ends[name] = (length - 1, float(mean[-1]))
    _label(axes, ends)
    axes.set_xlabel("steps of fine-tuning")
    axes.set_ylabel("extraction strength of the forget set")
    axes.set_ylim(-0.02, 1.05)
    axes.margins(x=0.12)
    return figure


def stress(records: Records) -> Figure:
    """Extraction strength of every model as it is and under each stress, a row a model."""
    names = [name for name in _models(records) if name != START]
    figure, axes = blank("what brings it back", (_SIZE[0], 1.2 + 0.26 * len(names)))
    rows = {name: place for place, name in enumerate(reversed(names))}
    kinds: list[tuple[str, str, Any]] = [
        ("as it is", "o", lambda figures: figures["forget"]["extraction_strength"]),
        ("int8", "s", lambda figures: figures["rounded"]["int8"]),
        ("int4", "^", lambda figures: figures["rounded"]["int4"]),
        ("taught again", "P", lambda figures: figures["relearned"][-1]),
        ("without RMU's direction", "v", lambda figures: figures.get("ablated", {}).get("extraction_strength")),
    ]
    colours = [INK["light"]["text"], *COOL["light"][:2], *WARM["light"][:2]]
    for (label, marker, read), colour in zip(kinds, colours, strict=True):
        points = []
        for name, place in rows.items():
            values = [read(record["figures"]) for record in records if record["model"] == name]
            known = [value for value in values if value is not None]
            if known:
                points.append((float(np.mean(known)), place))
        if points:
            axes.plot(*zip(*points, strict=True), marker, color=colour, ms=5.5, label=label, alpha=0.85, clip_on=False)
    axes.axvline(_mean(records, RETAIN, "forget", "extraction_strength"), color=COOL["light"][0], lw=0.8, ls="--")
    axes.set_yticks(list(rows.values()), list(rows))
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("extraction strength of the forget set (dashed: the retain model's)")
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0, 1.08), borderaxespad=0)
    axes.set_title(axes.get_title(loc="left"), loc="left", fontsize=10, fontweight="bold", pad=34)
    return figure


def _label(axes: Any, points: dict[str, tuple[float, float]]) -> None:
    """Names beside their points, moved apart where they would lie on each other."""
    placed: list[tuple[float, float]] = []
    span = max(x for x, _ in points.values()) - min(x for x, _ in points.values()) or 1.0
    for name, (x, y) in sorted(points.items(), key=lambda item: -item[1][1]):
        at = y
        while any(abs(at - other) < 0.042 and abs(x - where) < 0.22 * span for where, other in placed):
            at -= 0.008
        placed.append((x, at))
        axes.annotate(
            name,
            (x, y),
            xytext=(x + 0.015 * span, at),
            fontsize=8,
            va="center",
            color=_BASELINES.get(name, INK["light"]["text"]),
            annotation_clip=False,
        )


def _models(records: Records) -> list[str]:
    return list(dict.fromkeys(record["model"] for record in records))


def _mean(records: Records, name: str, *path: str) -> float:
    found = []
    for record in records:
        if record["model"] == name:
            value: Any = record["figures"]
            for key in path:
                value = value[key]
            found.append(value)
    return float(np.mean(found))
