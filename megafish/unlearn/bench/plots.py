"""Plots of the bench: what is forgotten against what is kept, and what brings it back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from megafish.audit.plots import COOL, INK, WARM, blank
from megafish.unlearn.bench.plan import GOLDFISH, RETAIN, START, UTILITY_KEPT, WITHIN
from megafish.unlearn.bench.table import mean_figure

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
    axes.set_xlabel("utility that is left [%]")
    axes.set_ylabel("extraction strength of the forget set")
    axes.set_ylim(-0.02, 1.05)
    axes.margins(x=0.1)
    _label_points(axes, points)
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
    axes.set_xlabel("steps of fine-tuning")
    axes.set_ylabel("extraction strength of the forget set")
    axes.set_ylim(-0.02, 1.05)
    axes.set_xlim(0, 1.14 * max(step for step, _ in ends.values()))
    _label_ends(axes, ends)
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
    figure.legend(frameon=False, fontsize=8, ncols=5, loc="outside lower center")
    return figure


def _label_points(axes: Any, points: dict[str, tuple[float, float]]) -> None:
    """Names beside their points, each on the side where it lies on no other name and on no point; a line leads to one
    that is not at the height of its point."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    right += 0.12 * (right - left)  # room for the names of the points on the right
    axes.set_xlim(left, right)
    wide, high = (right - left) * 0.0115, (top - bottom) * 0.045  # of a character, of a line
    gap = 1.2 * wide
    taken = [(x - gap / 2, x + gap / 2, y) for x, y in points.values()]
    heights = sorted((high * n for n in range(-6, 7)), key=lambda shift: (abs(shift), -shift))
    for name, (x, y) in sorted(points.items(), key=lambda item: -item[1][1]):
        width = wide * len(name)
        places = [
            (x + gap if to_the_right else x - gap - width, y + shift, to_the_right)
            for shift in heights
            for to_the_right in (True, False)
        ]
        free = [
            (at, line, to_the_right)
            for at, line, to_the_right in places
            if line > bottom and at > left and at + width < right
            if not any(at < end and begin < at + width and abs(line - other) < high for begin, end, other in taken)
        ]
        at, line, to_the_right = (free or places)[0]
        taken.append((at, at + width, line))
        near = at if to_the_right else at + width
        _write(axes, name, near, line, "left" if to_the_right else "right")
        if line != y:
            axes.plot([x, near], [y, line], color=INK["light"]["muted"], lw=0.6, zorder=0)


def _label_ends(axes: Any, ends: dict[str, tuple[float, float]]) -> None:
    """Names where the lines end, at least a line apart and none below the axis."""
    high = (axes.get_ylim()[1] - axes.get_ylim()[0]) * 0.042
    names = sorted(ends, key=lambda name: -ends[name][1])
    lines = [ends[name][1] for name in names]
    for i in range(1, len(lines)):
        lines[i] = min(lines[i], lines[i - 1] - high)
    lowest = 0.0
    for i in reversed(range(len(lines))):
        lines[i] = max(lines[i], lowest)
        lowest = lines[i] + high
    for name, line in zip(names, lines, strict=True):
        _write(axes, name, ends[name][0] * 1.01, line)


def _write(axes: Any, name: str, x: float, y: float, side: str = "left") -> None:
    colour = _BASELINES.get(name, INK["light"]["text"])
    axes.annotate(name, (x, y), fontsize=8, va="center", ha=side, color=colour, annotation_clip=False)


def _models(records: Records) -> list[str]:
    return list(dict.fromkeys(record["model"] for record in records))


def _mean(records: Records, name: str, *path: str) -> float:
    return mean_figure([record for record in records if record["model"] == name], *path)
