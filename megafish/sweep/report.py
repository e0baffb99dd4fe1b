"""`megafish sweep report`: a table, a CSV, plots, and a page that holds them all."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from megafish.audit.plots import to_png
from megafish.errors import InputError
from megafish.run import RunDir, write_atomic
from megafish.sweep.expand import short_labels
from megafish.sweep.folder import Entry, folder_of, ranked
from megafish.sweep.plots import curves, label, metric_by_parameter, metric_map
from megafish.sweep.spec import Sweep

_CURVE_POINTS = 400
_TEMPLATES = Path(__file__).parent / "templates"


def write_report(sweep: Sweep, entries: list[Entry]) -> Path:
    """Write runs.csv, PNGs and index.html into the sweep's report/; the page. InputError where nothing is measured."""
    measured = [entry for entry in entries if entry.metric is not None]
    if not measured:
        raise InputError(
            f"{folder_of(sweep)}: no run has a value of {sweep.metric.name} yet: wait for the runs, or rank by another "
            "metric: in the file"
        )
    folder = folder_of(sweep) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "runs.csv", csv_text(sweep, entries))
    plots = {}
    for name, figure in _figures(sweep, measured).items():
        image = to_png(figure)
        (folder / f"{name}.png").write_bytes(image)
        plots[name] = base64.b64encode(image).decode()
    environment = Environment(loader=FileSystemLoader(_TEMPLATES), undefined=StrictUndefined, autoescape=True)
    page = environment.get_template("sweep.html").render(
        sweep=sweep,
        header=[*varying_keys(sweep, entries), sweep.metric.name, "loss", "step", "state"],
        rows=[_row(sweep, entries, entry) for entry in ranked(entries, sweep.metric)],
        plots=plots,
        done=len(measured),
        total=len(entries),
    )
    write_atomic(folder / "index.html", page)
    return folder / "index.html"


def varying_keys(sweep: Sweep, entries: list[Entry]) -> list[str]:
    """Parameters with more than one value among the runs."""
    return [key for key in sweep.keys if len({json.dumps(entry.run.point[key]) for entry in entries}) > 1]


def csv_text(sweep: Sweep, entries: list[Entry]) -> str:
    """One line a run, the best first: its settings, state and figures."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    figures = ["step", "loss", "valid_loss", "tokens_per_s"]
    metric = [] if sweep.metric.name in figures else [sweep.metric.name]
    writer.writerow(["run", *sweep.keys, "state", *metric, *figures, "reason"])
    for entry in ranked(entries, sweep.metric):
        status = entry.status
        own = [entry.metric] if metric else []
        point = [_plain(entry.run.point[key]) for key in sweep.keys]
        numbers = [status.step, status.loss, status.valid_loss, status.tokens_per_s]
        writer.writerow([entry.run.path, *point, status.state, *own, *numbers, status.reason])
    return text.getvalue()


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, str)) else json.dumps(value)


def _row(sweep: Sweep, entries: list[Entry], entry: Entry) -> tuple[str, list[str]]:
    status = entry.status
    numbers = [f"{value:.4f}" if value is not None else "" for value in (entry.metric, status.loss)]
    cells = [label(entry.run.point[key]) for key in varying_keys(sweep, entries)]
    return entry.run.name, [*cells, *numbers, f"{status.step:,}", status.state]


def _figures(sweep: Sweep, measured: list[Entry]) -> dict[str, Figure]:
    """The plots by file name. Parameters that always move together are shown once, seeds not at all."""
    seeds = set(sweep.repeat_keys) if sweep.repeats > 1 else set()
    followers = {key for group in sweep.zip for key in list(group)[1:]}
    keys = [key for key in varying_keys(sweep, measured) if key not in seeds | followers]
    labels = short_labels(sweep.keys)
    metric = [entry.metric for entry in measured if entry.metric is not None]
    columns = {key: [entry.run.point[key] for entry in measured] for key in keys}
    name = sweep.metric.name
    found = {f"by_{labels[key]}": metric_by_parameter(columns[key], metric, key, name) for key in keys}
    for index, first in enumerate(keys):
        for second in keys[index + 1 :]:
            if _is_grid(columns[first], columns[second]):
                figure = metric_map(columns[first], columns[second], metric, (first, second), name)
                found[f"map_{labels[first]}_{labels[second]}"] = figure
    for key in keys[:2]:
        found[f"curves_{labels[key]}"] = curves([_curve(entry) for entry in measured], columns[key], key, "loss")
    return found


def _is_grid(first: list[Any], second: list[Any]) -> bool:
    """Whether most pairs of their values occur: a map of random draws would be empty."""
    pairs = {(json.dumps(one), json.dumps(two)) for one, two in zip(first, second, strict=True)}
    sizes = len({one for one, _ in pairs}), len({two for _, two in pairs})
    return min(sizes) > 1 and len(pairs) >= 0.5 * sizes[0] * sizes[1]


def _curve(entry: Entry) -> tuple[list[float], list[float]]:
    """Steps and losses of a run, thinned by means of blocks."""
    steps, losses = [], []
    for line in RunDir(entry.run.path).metrics_file.read_text(encoding="utf-8").splitlines():
        if '"kind": "train"' not in line:
            continue
        try:
            record = json.loads(line)
        except ValueError:
            continue  # cut off by a kill
        steps.append(float(record["step"]))
        losses.append(float(record["loss"]))
    block = max(-(-len(steps) // _CURVE_POINTS), 1)
    parts = [slice(start, start + block) for start in range(0, len(steps), block)]
    return [sum(steps[p]) / len(steps[p]) for p in parts], [sum(losses[p]) / len(losses[p]) for p in parts]
