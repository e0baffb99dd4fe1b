"""Plots of the report: one panel a figure, so that a page can stack them on a phone and a paper can take any of them.

Colours are warm for runs without a mask and cool for runs with one. The first of each kind are, on white paper, those
of Okabe and Ito (2008), who chose them for colour-blind readers; the others are made to stand out on their background.
From the fourth run of a kind on they repeat. So lines are labelled where they end, and those with few points differ by
marker.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

WARM = {"light": ["#d55e00", "#b8860b", "#b0517f"], "dark": ["#ff8a3d", "#e6b422", "#e08fb8"]}
COOL = {"light": ["#0072b2", "#00866a", "#3d8fc4"], "dark": ["#56b4e9", "#2fc59a", "#9ad0f5"]}
MARKERS = "osD^vP"
INK = {
    "light": {"text": "#1f2328", "muted": "#656d76", "grid": "#e3e6ea"},
    "dark": {"text": "#e6edf3", "muted": "#9198a1", "grid": "#30363d"},
}
SIZE = (4.4, 3.0)
"""Width and height of a panel [inches]."""
_LONGEST_NAME = 22
"""Characters of a label."""
_LINE_HEIGHT = 12.0
"""Least distance of two labels [points]."""
_MOST_TICKS = 9
"""Labels that fit below the x axis."""


@dataclass
class Series:
    """One line of a panel."""

    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    label: str
    masked: bool | None
    """Of a run trained with a mask: cool colour; without: warm; None: of no run, grey."""
    index: int
    """Number of the run among those of its kind: picks the colour and the marker."""
    low: Sequence[float] | None = None
    """Lower end of the interval of each point."""
    high: Sequence[float] | None = None
    dashed: bool = False
    markers: bool = True
    raw: tuple[np.ndarray, np.ndarray] | None = None
    """Unsmoothed x and y, drawn faintly below the line."""
    fit: bool = False
    """A fitted line: thin, dashed, without markers, cut where it leaves the axes."""


@dataclass
class Panel:
    """What a figure shows, apart from how: drawn once for each theme."""

    name: str
    """File name of the PNG, without the extension."""
    title: str
    xlabel: str
    ylabel: str
    series: list[Series]
    caption: str = ""
    ticks: list[str] | None = None
    """Labels of the x positions 0, 1, 2, ...; None: a numeric axis."""
    percent: bool = False
    """y is a share, shown in percent."""
    zero: bool = False
    """The y axis begins at 0."""
    top: float | None = None
    """Upper end of the y axis. None: by the data."""
    settled: bool = False
    """Scale the y axis to what follows the first tenth of the x axis: a loss falls so far at first that nothing else
    could be read."""
    log: str = ""
    """Logarithmic axes: "x" (with ticks at the points, where these are few), or "xy"."""
    bars: Series | None = None
    """Drawn as bars, its name in the corner; `series` then holds what they are compared with."""


def draw(panel: Panel, theme: str) -> Figure:
    """The figure of a panel in the "light" or "dark" theme."""
    ink = INK[theme]
    style: Any = {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "text.color": ink["text"],
        "axes.labelcolor": ink["muted"],
        "axes.edgecolor": ink["muted"],
        "axes.linewidth": 0.8,
        "xtick.color": ink["muted"],
        "ytick.color": ink["muted"],
        "grid.color": ink["grid"],
        "svg.fonttype": "path",
        "svg.hashsalt": "megafish",
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=SIZE)
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0.13, 0.17, 0.84, 0.70), facecolor="none")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelsize=8.5)
        axes.set_xlabel(panel.xlabel)
        axes.set_ylabel(panel.ylabel)
        figure.text(0.015, 0.985, panel.title, ha="left", va="top", fontsize=10.5, fontweight="bold")
        _draw_bars(axes, panel, theme)
        for series in panel.series:
            _draw_line(axes, series, theme, clip=panel.settled)
        _scale(axes, panel)
        _fit(figure, axes)
        _label_ends(figure, axes, panel, theme)
    return figure


def blank(title: str, size: tuple[float, float] = (SIZE[0] * 1.25, SIZE[1] * 1.15)) -> tuple[Figure, Axes]:
    """An empty light figure in the house's style, with its axes. size [inches]."""
    ink = INK["light"]
    style: Any = {
        "font.size": 9, "text.color": ink["text"], "axes.labelcolor": ink["muted"], "axes.edgecolor": ink["muted"],
        "xtick.color": ink["muted"], "ytick.color": ink["muted"], "grid.color": ink["grid"], "axes.linewidth": 0.8,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot(facecolor="none")
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelsize=8.5)
    return figure, axes


def to_svg(figure: Figure) -> bytes:
    """The figure as SVG, with text as outlines so that it looks the same everywhere."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "megafish"}):
        figure.savefig(buffer, format="svg", facecolor="none", metadata={"Date": None})
    return buffer.getvalue()


def to_png(figure: Figure) -> bytes:
    """The figure as PNG on white, 250 dots an inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=250, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over `width` neighbours (fewer at the ends), same length; gaps (nan) are left out of the means."""
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    centre = np.arange(len(values))
    start = np.maximum(centre - width // 2, 0)
    end = np.minimum(centre + (width + 1) // 2, len(values))
    with np.errstate(invalid="ignore"):
        return (sums[end] - sums[start]) / (counts[end] - counts[start])


def thin(x: np.ndarray, y: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `points` points, each the mean of a block, so that a long run does not make a heavy page."""
    if len(x) <= points:
        return x, y
    edges = np.linspace(0, len(x), points + 1).astype(int)[:-1]
    counts = np.diff(np.append(edges, len(x)))
    return np.add.reduceat(x, edges) / counts, np.add.reduceat(y, edges) / counts


def color(series: Series, theme: str) -> str:
    """Colour of a series."""
    if series.masked is None:
        return INK[theme]["muted"]
    shades = (COOL if series.masked else WARM)[theme]
    return shades[series.index % len(shades)]


def _draw_line(axes: Axes, series: Series, theme: str, clip: bool) -> None:
    shade = color(series, theme)
    if series.fit:
        axes.plot(series.x, series.y, color=shade, linewidth=1.1, linestyle=(0, (2, 2)), alpha=0.8, zorder=2)
        return
    if series.raw is not None:
        axes.plot(*series.raw, color=shade, alpha=0.25, linewidth=0.6)
    if series.low is not None and series.high is not None:
        # The text of an interval's end can lie on the line by rounding: never a negative length.
        below = np.maximum(np.subtract(series.y, series.low), 0)
        above = np.maximum(np.subtract(series.high, series.y), 0)
        axes.errorbar(series.x, series.y, yerr=[below, above], fmt="none", ecolor=shade, elinewidth=1.1, capsize=2.5)
    axes.plot(
        series.x,
        series.y,
        color=shade,
        linewidth=1.8,
        linestyle=(0, (4, 2)) if series.dashed else "-",
        marker=MARKERS[(series.index + 3 * series.dashed) % len(MARKERS)] if series.markers else None,
        markersize=4.5,
        clip_on=clip,
        zorder=3,
    )


def _draw_bars(axes: Axes, panel: Panel, theme: str) -> None:
    if panel.bars is not None:
        shade = color(panel.bars, theme)
        axes.bar(panel.bars.x, panel.bars.y, width=0.62, color=shade, zorder=2)
        # The name stands above the half with the lower bars.
        half = len(panel.bars.y) // 2
        right = max(panel.bars.y[half:]) <= max(panel.bars.y[:half], default=0)
        axes.annotate(
            panel.bars.label,
            (1 if right else 0, 1),
            xycoords="axes fraction",
            xytext=(0 if right else 6, -4),
            textcoords="offset points",
            ha="right" if right else "left",
            va="top",
            color=shade,
            fontweight="bold",
        )


def _scale(axes: Axes, panel: Panel) -> None:
    if panel.log:
        axes.set_xscale("log")
        axes.margins(x=0.05)
        if "y" in panel.log:
            axes.set_yscale("log")
            return
        _tick_points(axes, panel)
    elif panel.ticks is not None:
        axes.set_xticks(range(len(panel.ticks)), panel.ticks)
        axes.set_xlim(-0.4, len(panel.ticks) - 0.6)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.margins(x=0.01)
        axes.xaxis.set_major_formatter(_formatter(axes.get_xlim()))
    if panel.settled:
        axes.set_ylim(*_settled_range(panel.series))
    if panel.zero:
        axes.set_ylim(bottom=0)
    if panel.top is not None:
        axes.set_ylim(top=panel.top)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    if panel.percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
    else:
        axes.yaxis.set_major_formatter(_formatter(axes.get_ylim()))


def _tick_points(axes: Axes, panel: Panel) -> None:
    """Ticks of a logarithmic axis at the points themselves, unless their labels would touch."""
    points = sorted({float(x) for series in panel.series for x in series.x})
    gaps = np.diff(np.log(points))
    if len(points) > 1 and gaps.min() >= gaps.sum() / _MOST_TICKS:
        axes.set_xticks(points, [short_number(x) for x in points])
        axes.minorticks_off()


def _settled_range(lines: Sequence[Series]) -> tuple[float, float]:
    """y range of all series without the first tenth of the x axis, but with where each of them ends; with a margin."""
    xs = np.concatenate([np.asarray(line.x, dtype=np.float64) for line in lines])
    ys = np.concatenate([np.asarray(line.y, dtype=np.float64) for line in lines])
    ends = np.concatenate([np.arange(len(line.x)) == len(line.x) - 1 for line in lines])
    late = ys[((xs >= xs.min() + 0.1 * (xs.max() - xs.min())) | ends) & np.isfinite(ys)]
    if not late.size:
        late = np.zeros(1)
    margin = 0.06 * (late.max() - late.min()) or 0.05 * abs(float(late.max())) or 1.0
    return float(late.min() - margin), float(late.max() + margin)


def _formatter(limits: tuple[float, float]) -> FuncFormatter:
    """One unit for all ticks of an axis."""
    largest = max(map(abs, limits))
    for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if largest >= scale:
            return _unit_formatter(1e3 if letter == "k" else scale, letter)
    if largest < 1e-2:
        exponent = math.floor(math.log10(largest)) if largest > 0 else 0
        return FuncFormatter(lambda value, _: f"{value / 10**exponent:.3g}e{exponent}" if value else "0")
    return FuncFormatter(lambda value, _: f"{value:g}")


def _unit_formatter(unit: float, letter: str) -> FuncFormatter:
    return FuncFormatter(lambda value, _: f"{value / unit:g}{letter}" if value else "0")


def _fit(figure: Figure, axes: Axes) -> None:
    """Give tick labels and axis titles the room they take, whatever their length."""
    box = axes.get_tightbbox()
    inner = axes.get_window_extent()
    if box is None:
        return
    left = (inner.x0 - box.x0 + 4) / figure.bbox.width
    bottom = (inner.y0 - box.y0 + 4) / figure.bbox.height
    axes.set_position((left, bottom, 0.975 - left, 0.875 - bottom))


def _label_ends(figure: Figure, axes: Axes, panel: Panel, theme: str) -> None:
    """Write each series' name where its line ends, moved apart where two would overlap."""
    labelled = [s for s in panel.series if s.label and len(s.x)]
    if not labelled:
        return
    names = [_shortened(s.label) for s in labelled]
    # Room on the right for the widest name.
    probes = [figure.text(0, 0, name, fontsize=8.5, fontweight="bold") for name in names]
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    widest = max(probe.get_window_extent(renderer).width for probe in probes) / figure.bbox.width
    for probe in probes:
        probe.remove()
    left, bottom, _, height = axes.get_position().bounds
    axes.set_position((left, bottom, 0.97 - left - widest, height))
    points = 72.0 / figure.dpi
    wanted = [float(axes.transData.transform((s.x[-1], s.y[-1]))[1]) * points for s in labelled]
    lowest, highest = _LINE_HEIGHT / 2, float(axes.transAxes.transform((0, 1))[1]) * points
    for series, name, y in zip(labelled, names, _apart(wanted, lowest, highest), strict=True):
        axes.annotate(
            name,
            xy=(1, 0),
            xycoords=("axes fraction", "figure points"),
            xytext=(1.015, y),
            textcoords=("axes fraction", "figure points"),
            va="center",
            ha="left",
            fontsize=8.5,
            fontweight="bold",
            color=color(series, theme),
            annotation_clip=False,
        )


def _shortened(name: str) -> str:
    """A name with its middle left out where it would take the plot's room; the ends are what tells runs apart."""
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[: _LONGEST_NAME // 2 - 1]}...{name[2 - _LONGEST_NAME // 2 :]}"


def _apart(wanted: list[float], lowest: float = -math.inf, highest: float = math.inf) -> list[float]:
    """Positions at least a line apart, as near to the wanted ones as moving whole clusters allows, from `lowest` to
    `highest` as far as they have room there."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    clusters: list[tuple[float, list[int]]] = []
    for i in order:
        centre, members = wanted[i], [i]
        while clusters and clusters[-1][0] + _LINE_HEIGHT * (len(clusters[-1][1]) + len(members)) / 2 > centre:
            members = clusters.pop()[1] + members
            centre = sum(wanted[m] for m in members) / len(members)
        clusters.append((centre, members))
    placed = [0.0] * len(wanted)
    for centre, members in clusters:
        for rank, i in enumerate(members):
            placed[i] = centre + _LINE_HEIGHT * (rank - (len(members) - 1) / 2)
    upwards = sorted(range(len(placed)), key=lambda i: placed[i])
    for rank, i in enumerate(reversed(upwards)):
        placed[i] = min(placed[i], highest - _LINE_HEIGHT * rank)
    for rank, i in enumerate(upwards):
        placed[i] = max(placed[i], lowest + _LINE_HEIGHT * rank)
    return placed


def short_number(value: float) -> str:
    """1234567 -> "1.23M": three significant digits with a metric letter; small ones in scientific notation."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= scale:
            # Thousands get their letter only from 10,000 on: 2048 is a number people know.
            return f"{value / (1e3 if letter == 'k' else scale):.3g}{letter}"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def record_arrays(records: list[dict[str, Any]], x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """Two columns of metrics records as float64 arrays, without the records that lack either."""
    pairs = [(r[x], r[y]) for r in records if r.get(x) is not None and r.get(y) is not None]
    if not pairs:
        return np.empty(0), np.empty(0)
    first, second = zip(*pairs, strict=True)
    return np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
