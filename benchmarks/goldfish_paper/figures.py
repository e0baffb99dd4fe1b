"""The paper's plots, in the style of the reports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from experiments import EXPOSURES
from tables import MASKS, MOST, Found, pooled, rouge

from megafish.audit.plots import Panel, Series, draw, to_png
from megafish.audit.statistics import wilson_interval

_BINS = 10


def draw_figures(found: Found, folder: Path) -> list[Path]:
    """Write goldfish_paper_*.png."""
    paths = []
    for panel in (_exposures(found), _by_k(found), _rouge(found), _loss(found)):
        path = folder / f"goldfish_paper_{panel.name}.png"
        path.write_bytes(to_png(draw(panel, "light")))
        paths.append(path)
    return paths


def _rates(found: Found, name: str, levels: Sequence[int]) -> tuple[list[float], list[float], list[float]]:
    counts = [pooled(found, name, level) for level in levels]
    intervals = [wilson_interval(*count) for count in counts]
    return [hits / total for hits, total in counts], [low for low, _ in intervals], [high for _, high in intervals]


def _exposures(found: Found) -> Panel:
    series = []
    for name, masked, index in (("plain", False, 0), ("k=128", True, 2), ("k=32", True, 1), ("k=4", True, 0)):
        y, low, high = _rates(found, name, EXPOSURES)
        series.append(Series(range(len(EXPOSURES)), y, name, masked, index, low, high))
    ticks = [str(copies) for copies in EXPOSURES]
    return Panel(
        "exposures", "Recited word for word", "copies in the corpus", "canaries [%]", series, ticks=ticks, percent=True,
        zero=True, top=1.0,
    )  # fmt: skip


def _by_k(found: Found) -> Panel:
    names = [*MASKS, "plain"]
    counts = [pooled(found, name, MOST) for name in names]
    y = [hits / total for hits, total in counts]
    intervals = [wilson_interval(*count) for count in counts]
    low, high = [a for a, _ in intervals], [b for _, b in intervals]
    series = [Series(range(len(names)), y, "", True, 0, low, high)]
    ticks = [name.removeprefix("k=") for name in names]
    return Panel(
        "k", f"Recited, {MOST} copies", "one token in k is dropped", "canaries [%]", series, ticks=ticks, percent=True,
        zero=True, top=1.0,
    )  # fmt: skip


def _rouge(found: Found) -> Panel:
    edges = np.linspace(0, 1, _BINS + 1)
    series = []
    for name, masked, index in (("plain", False, 0), ("k=4", True, 0), ("k=3", True, 1)):
        share = np.histogram(rouge(found, name, MOST), edges)[0] / len(rouge(found, name, MOST))
        series.append(Series(range(_BINS), share, name, masked, index))
    control = rouge(found, "control", 0)
    share = np.histogram(control, edges)[0] / len(control)
    series.append(Series(range(_BINS), share, "control", None, 0, dashed=True))
    ticks = [f"{edge:.1f}" for edge in edges[:-1]]
    return Panel(
        "rouge_l", f"How much of the true text, {MOST} copies", "ROUGE-L F1, from", "canaries [%]", series, ticks=ticks,
        percent=True, zero=True,
    )  # fmt: skip


def _loss(found: Found) -> Panel:
    series = []
    for name, masked in (("plain", False), ("k=4", True)):
        curves = [
            ([r["supervised_tokens"] for r in run.valid], [r["valid_loss"] for r in run.valid]) for run in found[name]
        ]
        shortest = min(len(x) for x, _ in curves)
        x = np.mean([x[:shortest] for x, _ in curves], axis=0)
        y = np.mean([y[:shortest] for _, y in curves], axis=0)
        series.append(Series(x, y, name, masked, 0))
    return Panel("loss", "Validation loss", "supervised tokens", "nats per token", series, settled=True)
