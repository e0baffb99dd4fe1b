from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from megafish.audit.plots import (
    INK,
    Panel,
    Series,
    _apart,
    _settled_range,
    _shortened,
    color,
    draw,
    record_arrays,
    short_number,
    smooth,
    thin,
    to_png,
    to_svg,
)


def line(label: str = "run", masked: bool | None = True, index: int = 0, **options: object) -> Series:
    return Series([0.0, 1.0, 2.0], [0.0, 0.5, 1.0], label, masked, index, **options)  # type: ignore[arg-type]


def test_smooth_is_the_mean_of_the_neighbours_and_skips_gaps() -> None:
    values = np.array([1.0, 2.0, np.nan, 4.0, 9.0])
    assert smooth(values, 1)[[0, 1, 3, 4]].tolist() == [1, 2, 4, 9]
    got = smooth(values, 3)
    expected = [np.nanmean(values[max(i - 1, 0) : i + 2]) for i in range(5)]
    assert got.tolist() == pytest.approx(expected)


def test_thin_keeps_the_mean_and_the_length_asked_for() -> None:
    x = np.arange(1003, dtype=np.float64)
    y = np.sin(x)
    few_x, few_y = thin(x, y, 100)
    assert len(few_x) == len(few_y) == 100 and (np.diff(few_x) > 0).all()
    assert few_x[0] == pytest.approx(x[:10].mean()) and few_y[-1] == pytest.approx(y[992:].mean(), abs=0.2)
    assert thin(x[:50], y[:50], 100)[1] is not None and len(thin(x[:50], y[:50], 100)[0]) == 50


def test_labels_are_moved_apart_and_no_further() -> None:
    assert _apart([0.0, 100.0]) == [0.0, 100.0]
    assert _apart([50.0, 50.0]) == [44.0, 56.0]
    placed = _apart([10.0, 11.0, 12.0, 80.0, 13.0])
    assert np.diff(sorted(placed)).min() >= 12.0 - 1e-9 and placed[3] == 80.0
    assert np.argsort(placed).tolist() == [0, 1, 2, 4, 3]


def test_labels_stay_inside_the_figure() -> None:
    assert _apart([100.0, 100.0, 100.0], highest=100.0) == [76.0, 88.0, 100.0]
    assert _apart([5.0, 5.0, 60.0], lowest=6.0) == [6.0, 18.0, 60.0]
    assert _apart([90.0, 100.0, 100.0], highest=100.0) == [76.0, 88.0, 100.0]


def test_ticks_of_a_logarithmic_axis_stand_at_the_points() -> None:
    def labels(x: list[float]) -> list[str]:
        series = Series(x, [0.0] * len(x), "", True, 0)
        axes = draw(Panel("log", "Title", "x", "y", [series], zero=True, top=1.0, log="x"), "light").axes[0]
        return [tick.get_text() for tick in axes.get_xticklabels()]

    assert labels([5.0, 10.0, 40.0]) == ["5", "10", "40"]
    assert labels([1e6, 1.01e6, 1e9]) != ["1M", "1.01M", "1B"], "two of them would touch"


def test_a_fitted_line_ends_at_the_axes() -> None:
    """What leaves the axes is not drawn over the title: the same picture as without the part that is outside."""
    series = line("")
    outside = Series([0.0, 2.0], [0.5, 50.0], "", True, 0, fit=True)
    panel = Panel("fit", "Title", "x", "y", [series, outside], zero=True, top=1.0)
    axes = draw(panel, "light").axes[0]
    fitted = axes.lines[-1]
    assert fitted.get_clip_on() and fitted.get_marker() == "None" and axes.get_ylim() == (0.0, 1.0)


def test_the_name_of_bars_stands_above_the_lower_ones() -> None:
    for heights, place in (([1.0, 0.2, 0.1], 1), ([0.0, 0.0, 1.0], 0)):
        bars = Series(range(3), heights, "run", True, 0)
        axes = draw(Panel("bars", "Title", "x", "y", [], ticks=["0", "1", "2"], bars=bars), "light").axes[0]
        [text] = [text for text in axes.texts if text.get_text() == "run"]
        assert text.xy[0] == place  # type: ignore[attr-defined]


def test_long_names_keep_their_ends() -> None:
    assert _shortened("goldfish-k4 dropped") == "goldfish-k4 dropped"
    short = _shortened("a-very-long-name-of-a-run-with-k-4 dropped")
    assert len(short) <= 22 and short.startswith("a-very-lon") and short.endswith("4 dropped")


def test_settled_range_leaves_out_the_first_tenth() -> None:
    x = np.arange(101.0)
    y = np.where(x < 10, 100.0, 2.0 + x / 100)
    low, high = _settled_range([Series(x, y, "", True, 0)])
    assert 2.0 < low < 2.1 and 3.0 < high < 3.1
    # A run that ends early is seen all the same.
    short = Series(np.linspace(0, 5, 3), np.linspace(90, 80, 3), "", True, 1)
    assert _settled_range([Series(x, y, "", True, 0), short])[1] > 80
    assert _settled_range([Series(np.zeros(1), np.full(1, np.nan), "", True, 0)])[0] < 0


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7, "7"), (2048, "2048"), (12345, "12.3k"), (4_915_200, "4.92M"), (15e12, "15T"), (3e-4, "3e-4"),
     (0.25, "0.25"), (float("inf"), "inf")],
)  # fmt: skip
def test_short_number(value: float, text: str) -> None:
    assert short_number(value) == text


def test_record_arrays_leave_out_incomplete_records() -> None:
    x, y = record_arrays(
        [{"step": 1, "loss": 2.0}, {"step": 2}, {"loss": 3.0}, {"step": 4, "loss": None}], "step", "loss"
    )
    assert x.tolist() == [1.0] and y.tolist() == [2.0]
    assert record_arrays([], "step", "loss")[0].size == 0


def test_colours_tell_masked_runs_from_plain_ones() -> None:
    assert (
        len({color(line(masked=m, index=i), t) for m in (True, False) for i in range(3) for t in ("light", "dark")})
        == 12
    )
    assert color(line(masked=None), "dark") == INK["dark"]["muted"]


PANELS = [
    Panel(
        "rate",
        "Title",
        "copies",
        "%",
        [line("a", True), line("b", False)],
        ticks=["0", "1", "2"],
        percent=True,
        top=1.0,
    ),
    Panel("ends", "Title", "x", "y", [line("a" * 60), line("b", dashed=True)], settled=True),
    Panel("interval", "Title", "x", "y", [line("", low=[0, 0.4, 0.9], high=[0.1, 0.6, 1.0])], zero=True),
    Panel("bars", "Title", "x", "y", [line("chance", None)], ticks=["0", "1", "2"], bars=line("run"), percent=True),
    Panel("single", "Title", "x", "y", [Series([3.0], [2.0], "one", True, 0)], settled=True),
    Panel("huge", "Title", "tokens", "y", [Series([0.0, 3e12], [1e-5, 3e-5], "", True, 0)]),
    Panel("constant", "Title", "x", "y", [Series([0.0, 1.0], [0.0, 0.0], "", True, 0)], zero=True),
]


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.name)
def test_draw(panel: Panel) -> None:
    light = draw(panel, "light")
    image = Image.open(io.BytesIO(to_png(light)))
    assert image.size == (1100, 750)
    pixels = np.asarray(image.convert("RGB"))
    assert (pixels[0, 0] == 255).all() and (pixels != 255).any(), "opaque white paper, with something on it"
    if panel.series[0].label:
        # Labels end inside the picture: nothing is cut at the right edge.
        assert (pixels[:, -3:] == 255).all()
    svg = to_svg(draw(panel, "dark"))
    assert svg.startswith(b"<?xml") and b"<text" not in svg, "text as outlines: no font is needed"
    assert to_svg(draw(panel, "dark")) == svg, "the same figures give the same file"
