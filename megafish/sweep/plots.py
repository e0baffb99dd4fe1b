"""Plots of a sweep: the metric against each parameter, a map of two, the curves of all runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from megafish.audit.plots import blank
from megafish.sweep.expand import short_value

_POINT, _MEAN = "#0072b2", "#d55e00"
_SHADES = "viridis"
_MOST_TICKS = 8
_UNITS = {
    "loss": "training loss [nats/token]",
    "valid_loss": "validation loss [nats/token]",
    "valid_bpb": "validation loss [bits/byte]",
    "loss_dropped": "loss on dropped tokens [nats/token]",
    "loss_kept": "loss on kept tokens [nats/token]",
    "tokens_per_s": "speed [tokens/s]",
}
# Of the largest to the smallest value, from which on an axis is logarithmic.
_SPREAD = 8.0


def metric_by_parameter(values: Sequence[Any], metric: Sequence[float], key: str, name: str) -> Figure:
    """Every run as a point over the value of one parameter, and the mean of each value."""
    figure, axes = blank(f"{name} by {key}")
    place = _place(axes, values, key)
    x, y = np.asarray([place(value) for value in values], float), np.asarray(metric, float)
    axes.plot(x, y, "o", color=_POINT, markersize=4.5, alpha=0.55, label="run", clip_on=False, zorder=3)
    each = np.unique(x)
    if len(each) < len(x):
        means = [float(y[x == position].mean()) for position in each]
        axes.plot(each, means, "-", color=_MEAN, linewidth=1.8, label="mean", zorder=2)
        axes.legend(frameon=False, fontsize=8.5, loc="best")
    axes.set_ylabel(_UNITS.get(name, name))
    return figure


def metric_map(
    first: Sequence[Any], second: Sequence[Any], metric: Sequence[float], keys: tuple[str, str], name: str
) -> Figure:
    """The mean of the metric for each pair of values of two parameters, as a map with its numbers."""
    rows, columns = _ordered(first), _ordered(second)
    sums, counts = np.zeros((len(rows), len(columns))), np.zeros((len(rows), len(columns)))
    for one, two, value in zip(first, second, metric, strict=True):
        place = rows.index(_key(one)), columns.index(_key(two))
        sums[place] += value
        counts[place] += 1
    with np.errstate(invalid="ignore"):
        means = sums / counts
    figure, axes = blank(f"{name} by {keys[0]} and {keys[1]}")
    image = axes.imshow(means, cmap=_SHADES, aspect="auto", origin="lower")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_xticks(range(len(columns)), [label(value) for value in columns])
    axes.set_yticks(range(len(rows)), [label(value) for value in rows])
    axes.set_xlabel(keys[1])
    axes.set_ylabel(keys[0])
    known = means[np.isfinite(means)]
    middle = (known.min() + known.max()) / 2
    if means.size <= 40:
        for (row, column), value in np.ndenumerate(means):
            if math.isfinite(value):
                ink = "white" if value < middle else "black"
                axes.text(column, row, f"{value:.4g}", ha="center", va="center", fontsize=8, color=ink)
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8)
    bar.set_label(_UNITS.get(name, name), fontsize=8.5)
    return figure


def curves(
    series: Sequence[tuple[Sequence[float], Sequence[float]]], values: Sequence[Any], key: str, name: str
) -> Figure:
    """The course of a value over the steps of every run, coloured by a parameter."""
    figure, axes = blank(f"{name} during training, by {key}")
    ordered = _ordered(values)
    numeric = all(_is_number(value) for value in ordered) and len(ordered) > 1
    shades = matplotlib.colormaps[_SHADES]
    norm: Normalize | None = None
    if numeric:
        norm = (LogNorm if _is_spread(ordered) else Normalize)(min(ordered), max(ordered))
    for (x, y), value in zip(series, values, strict=True):
        place = norm(value) if norm is not None else ordered.index(_key(value)) / max(len(ordered) - 1, 1)
        axes.plot(x, y, color=shades(0.92 * float(place)), linewidth=1.1, alpha=0.85)
    if norm is not None:
        scale = matplotlib.cm.ScalarMappable(norm, _SHADES)
        bar = figure.colorbar(scale, ax=axes, pad=0.02)
        bar.outline.set_visible(False)
        ticks = ordered if len(ordered) <= _MOST_TICKS else [ordered[0], ordered[len(ordered) // 2], ordered[-1]]
        bar.ax.yaxis.set_minor_locator(NullLocator())
        bar.set_ticks(ticks, labels=[label(value) for value in ticks])
        bar.ax.tick_params(length=0, labelsize=8)
        bar.set_label(key, fontsize=8.5)
    else:
        for index, value in enumerate(ordered):
            shade = shades(0.92 * index / max(len(ordered) - 1, 1))
            axes.plot([], [], color=shade, label=label(value))
        axes.legend(frameon=False, fontsize=8, loc="upper right")
    axes.set_xlabel("step")
    axes.set_ylabel(_UNITS.get(name, name))
    return figure


def label(value: Any) -> str:
    """A value on an axis."""
    return f"{value:g}" if _is_number(value) else short_value(value).lstrip("-")


def _place(axes: Axes, values: Sequence[Any], key: str) -> Any:
    """Where on the x axis a value lies: numbers to scale, anything else one beside the other."""
    ordered = _ordered(values)
    axes.set_xlabel(key)
    if not all(_is_number(value) for value in ordered):
        axes.set_xticks(range(len(ordered)), [label(value) for value in ordered])
        axes.set_xlim(-0.5, len(ordered) - 0.5)
        return lambda value: ordered.index(_key(value))
    if _is_spread(ordered):
        axes.set_xscale("log")
    if len(ordered) <= _MOST_TICKS:
        axes.set_xticks(ordered, [label(value) for value in ordered])
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return lambda value: value


def _ordered(values: Sequence[Any]) -> list[Any]:
    """The different values, numbers by size, anything else in the order of the runs."""
    different = list(dict.fromkeys(_key(value) for value in values))
    return sorted(different) if all(_is_number(value) for value in different) else different


def _key(value: Any) -> Any:
    return value if isinstance(value, (int, float, str)) or value is None else short_value(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_spread(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) >= _SPREAD
