"""The report: one self-contained page about a run, or about several side by side."""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from megafish import __version__
from megafish.audit.audit_panels import audit_panels
from megafish.audit.laws import Law, laws
from megafish.audit.panels import divergence_panel, memorization_panels, training_panels
from megafish.audit.plots import Panel, draw, short_number, to_png, to_svg
from megafish.audit.samples import choose_samples
from megafish.audit.view import RunView, load_views
from megafish.run import write_atomic


@dataclass(frozen=True)
class Cell:
    """One figure of a table, with what stands small below it."""

    value: str
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    label: str
    cells: list[Cell]
    unit: str = ""


@dataclass(frozen=True)
class Missing:
    """A part that could not be shown, and how to get it."""

    what: str
    command: str


def report(paths: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write `output`/report.html, with its plots as PNG in `output`/plots, and return the path of the page.

    The page is one file without references: images and style stand inside it. `output` is by default the run's own
    directory for one run and ./report for several. Parts that a run lacks (canaries, validation, an audit) are named
    on the page together with the command that makes them. Raises InputError for a path that is not a run.
    """
    runs = load_views(paths)
    folder = Path(output) if output is not None else runs[0].path if len(runs) == 1 else Path("report")
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    memorization = memorization_panels(runs) + audit_panels(runs)
    memorization += [panel for run in runs if (panel := divergence_panel(run)) is not None]
    if len(runs) > 1:
        _tell_apart(memorization, "divergence")
    environment = Environment(
        loader=PackageLoader("megafish.audit"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(
        title=" vs. ".join(run.name for run in runs),
        runs=runs,
        several=len(runs) > 1,
        verdicts=[(run, run.summary["verdict"]) for run in runs if run.summary],
        findings=[text for run in runs for text in findings(run)],
        notes=[f"{run.name}: {note}" for run in runs if run.summary for note in run.summary["notes"]],
        laws=[_law_row(law) for law in laws(runs)],
        membership=[(run, membership_rows(run)) for run in runs if run.summary and run.summary["membership"]],
        probes=[(run, each, probe_rows(each)) for run in runs if run.summary for each in run.summary["probes"]],
        tiles=_tiles(runs[0]) if len(runs) == 1 else [],
        comparison=comparison(runs),
        levels=[(run, level_rows(run)) for run in runs if run.levels],
        memorization=[_figure(panel, plots) for panel in memorization],
        training=[_figure(panel, plots) for panel in training_panels(runs)],
        samples=choose_samples(runs),
        settings=settings_rows(runs),
        unlike=unlike_audits(runs),
        missing=[item for run in runs for item in missing(run)],
        protocol=next((run.summary for run in runs if run.summary), None),
        version=__version__,
        created=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )
    target = folder / "report.html"
    write_atomic(target, page)
    write_atomic(folder / "report.json", json.dumps(figures(runs), indent=1) + "\n")
    return target


def figures(runs: Sequence[RunView]) -> dict[str, Any]:
    """What the page shows, as data: the last audit of each run, the comparison, the fitted laws."""
    return {
        "format": "megafish-report",
        "version": 1,
        "runs": [{"name": run.name, "path": str(run.path), "audit": run.summary} for run in runs],
        "comparison": [
            {"what": row.label, "unit": row.unit, "values": [cell.value for cell in row.cells]}
            for row in comparison(runs)
        ],
        "laws": [asdict(law) for law in laws(runs)],
    }


def _tell_apart(panels: list[Panel], name: str) -> None:
    """Number panels that exist once a run, so that their files do not overwrite each other."""
    same = [panel for panel in panels if panel.name == name]
    for number, panel in enumerate(same, 1):
        if len(same) > 1:
            panel.name = f"{name}_{number}"


def _figure(panel: Panel, folder: Path) -> dict[str, str]:
    """Write the PNG; return the title, the caption and both themes as data addresses."""
    figures = {theme: draw(panel, theme) for theme in ("light", "dark")}
    file = folder / f"{panel.name}.png"
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_bytes(to_png(figures["light"]))
    os.replace(temporary, file)
    images = {
        theme: "data:image/svg+xml;base64," + base64.b64encode(to_svg(figure)).decode("ascii")
        for theme, figure in figures.items()
    }
    return {"title": panel.title, "caption": panel.caption, **images}


# ---------------------------------------------------------------------------------------------------------------- words


def percent(value: float, digits: int = 0) -> str:
    """0.123 -> "12 %"."""
    return f"{100 * value:.{digits}f} %"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _were(number: int) -> str:
    return "was" if number == 1 else "were"


def findings(run: RunView) -> list[str]:
    """What the audit found, in plain sentences."""
    if not run.levels or run.summary is None or run.extraction is None:
        return []
    top = run.levels[-1]
    suffix = run.summary["settings"]["suffix_tokens"]
    if top["exposures"]:
        passages = f"{_count(top['canaries'], 'passage')} that stood {_count(top['exposures'], 'time')} in the corpus"
        if top["effective_exposures"] is not None:
            passages += f" (about {top['effective_exposures']:.3g} times in what it read)"
    else:
        passages = f"{_count(top['canaries'], 'control passage')} that {_were(top['canaries'])} not planted"
    text = (
        f"{run.name}: of {passages}, {top['exact_matches']} {_were(top['exact_matches'])} continued word "
        f"for word for {suffix} tokens ({percent(top['exact_rate'])}, 95 % interval {percent(top['exact_low'])} to "
        f"{percent(top['exact_high'])})"
    )
    control = run.levels[0]
    if top["exposures"] and not control["exposures"]:
        text += f"; of {_count(control['canaries'], 'control passage')}, not planted, {control['exact_matches']}"
    elif not top["exposures"]:
        text += "; no passage was planted, so this says nothing about memorization"
    sentences = [text + "."]
    divergence = run.extraction["divergence"]
    if divergence is not None and run.divergence_mask:
        sentences.append(
            f"{run.name}: of the {_count(divergence['canaries'], 'passage')} with {divergence['least_exposures']} or "
            f"more copies that it did not recite, it left {divergence['at_drop']} at a dropped token or right after "
            f"one ({percent(divergence['rate'])}, 95 % interval {percent(divergence['low'])} to "
            f"{percent(divergence['high'])}; by chance {percent(divergence['chance'])})."
        )
    return sentences


def unlike_audits(runs: Sequence[RunView]) -> list[str]:
    """The prompt and suffix lengths of each audit where they are not all the same; else nothing."""
    lines: list[str] = []
    lengths: set[tuple[int, int]] = set()
    for run in runs:
        steps: dict[tuple[int, int], list[int]] = {}
        for audit in run.audits:
            if audit["extraction"]:
                settings = audit["settings"]
                steps.setdefault((settings["prompt_tokens"], settings["suffix_tokens"]), []).append(audit["step"])
        lengths |= steps.keys()
        for (prompt, suffix), at in steps.items():
            which = f"{'step' if len(at) == 1 else 'steps'} {', '.join(map(str, at))}"
            lines.append(f"{run.name}, {which}: {prompt} tokens given, {suffix} asked for")
    return lines if len(lengths) > 1 else []


def missing(run: RunView) -> list[Missing]:
    """What the page cannot show of a run, and the command that makes it."""
    found = []
    corpora = " ".join(source.path for source in run.config.data.train) or "CORPUS"
    if not run.metrics.get("train") and run.summary is None:
        found.append(Missing(f"{run.name} has not been trained yet.", f"megafish train {run.path}"))
    elif run.summary is None:
        found.append(Missing(f"{run.name} has not been audited yet.", f"megafish audit {run.path}"))
    elif run.extraction is None and not run.summary["probes"]:
        found.append(
            Missing(
                f"{run.name} was trained on a corpus without canaries ({corpora}): nothing can be said about what it "
                "recites. Prepare the corpus with canaries and train again.",
                "megafish prepare INPUTS --tokenizer TOKENIZER --output CORPUS --canaries 16",
            )
        )
    if run.metrics.get("train") and run.valid("loss") is None:
        found.append(
            Missing(
                f"{run.name} has no validation loss: its corpus ({corpora}) has no validation split, or none was "
                "read yet.",
                "megafish prepare INPUTS --tokenizer TOKENIZER --output CORPUS --valid-fraction 0.01",
            )
        )
    return found


# --------------------------------------------------------------------------------------------------------------- tables


def _number(value: float | None, digits: int = 3) -> str:
    return "not known" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _rounded(value: float | None) -> str:
    return "not known" if value is None else short_number(round(value, 1))


def _tiles(run: RunView) -> list[tuple[str, str, str]]:
    """The figures at the head of a page about one run: value, what it is, details."""
    tiles = []
    if run.levels:
        top = run.levels[-1]
        tiles.append(
            (
                percent(top["exact_rate"]),
                "recited word for word",
                f"{top['exact_matches']} of {top['canaries']} canaries with {top['exposures']} copies",
            )
        )
        tiles.append((f"{top['mean_prefix']:.1f}", "tokens recited", "mean, same canaries"))
    if (loss := run.valid("loss")) is not None:
        tiles.append((_number(loss), "validation loss", "nats per token, never masked"))
    if (bits := run.valid("bits_per_byte")) is not None:
        tiles.append((_number(bits), "bits per byte", "validation"))
    if (tokens := _tokens(run, "supervised_tokens")) is not None:
        tiles.append((short_number(tokens), "supervised tokens", f"{short_number(_tokens(run, 'tokens') or 0)} read"))
    return tiles


def _tokens(run: RunView, key: str) -> float | None:
    """Tokens that the audited checkpoint had read, since the other figures are its; of the run without an audit."""
    if run.summary is None:
        return run.last("train", key)
    return None if run.summary[key] is None else float(run.summary[key])


_STYLES: dict[str, Callable[[float], str]] = {
    "share": percent,
    "count": short_number,
    "number": _number,
    "length": "{:.1f}".format,
}


def comparison(runs: Sequence[RunView]) -> list[Row]:
    """The runs side by side; from the second on each figure comes with its difference from the first."""
    rows = []

    def row(label: str, values: list[float | None], style: str, unit: str = "", notes: list[str] | None = None) -> None:
        if all(value is None for value in values):
            return
        cells = []
        for i, value in enumerate(values):
            text = "not known" if value is None else _STYLES[style](value)
            small = [notes[i]] if notes and notes[i] else []
            if i and value is not None and values[0] is not None and (change := _difference(value, values[0], style)):
                small.append(change)
            cells.append(Cell(text, "; ".join(small)))
        rows.append(Row(label, cells, unit))

    if any(run.summary for run in runs):
        steps = [str(run.summary["step"]) if run.summary else "not audited" for run in runs]
        rows.append(Row("Audited step", [Cell(step) for step in steps]))
    row("Supervised tokens", [_tokens(run, "supervised_tokens") for run in runs], "count")
    row("Input tokens", [_tokens(run, "tokens") for run in runs], "count")
    row("Validation loss", [run.valid("loss") for run in runs], "number", "nats/token")
    row("Validation", [run.valid("bits_per_byte") for run in runs], "number", "bits/byte")
    for key, label in (("loss_kept", "Loss, kept tokens"), ("loss_dropped", "Loss, dropped tokens")):
        notes = ["" if run.masked or not run.summary else "mask not used in training" for run in runs]
        row(label, [_train_loss(run, key) for run in runs], "number", "nats/token", notes)
    for exposures in sorted({level["exposures"] for run in runs for level in run.levels}):
        at = [next((x for x in run.levels if x["exposures"] == exposures), None) for run in runs]
        label = f"Recited, {exposures} {'copy' if exposures == 1 else 'copies'}" if exposures else "Recited, control"
        notes = [f"{x['exact_matches']} of {x['canaries']}" if x else "" for x in at]
        row(label, [x["exact_rate"] if x else None for x in at], "share", notes=notes)
    top = [run.levels[-1] if run.levels else None for run in runs]
    row("Length recited, most copies", [x["mean_prefix"] if x else None for x in top], "length", "tokens")
    row("ROUGE-L, most copies", [x["mean_rouge_l"] if x else None for x in top], "number")
    return rows


def _train_loss(run: RunView, key: str) -> float | None:
    if run.summary is None:
        return run.last("dropped", key)
    train = run.summary["losses"]["train"]
    return None if train is None else train[key]


def _difference(value: float, base: float, style: str) -> str:
    if style == "share":
        return f"{100 * (value - base):+.0f} points"
    return f"{100 * (value / base - 1):+.1f} %" if base else ""


def level_rows(run: RunView) -> list[Row]:
    """Extraction of one run by exposure level."""
    return [
        Row(
            f"{level['exposures']}" if level["exposures"] else "0 (control)",
            [
                Cell(_rounded(level["effective_exposures"])),
                Cell(str(level["canaries"])),
                Cell(f"{level['exact_matches']} ({percent(level['exact_rate'])})"),
                Cell(f"{percent(level['exact_low'])} to {percent(level['exact_high'])}"),
                Cell(f"{level['mean_prefix']:.1f}"),
                Cell(f"{level['mean_rouge_l']:.3f}"),
                *(
                    [
                        Cell(_number(level[key]))
                        for key in (["loss_kept", "loss_dropped"] if run.divergence_mask else ["loss"])
                    ]
                ),
            ],
        )
        for level in run.levels
    ]


def probe_rows(extraction: dict[str, Any]) -> list[Row]:
    """Extraction of passages other than canaries, by occurrences."""
    return [
        Row(
            "not known" if level["exposures"] is None else f"{level['exposures']} and more",
            [
                Cell(str(level["canaries"])),
                Cell(f"{level['exact_matches']} ({percent(level['exact_rate'])})"),
                Cell(f"{percent(level['exact_low'])} to {percent(level['exact_high'])}"),
                Cell(percent(level["approximate_rate"])),
                Cell(f"{level['mean_prefix']:.1f}"),
                Cell(f"{level['mean_rouge_l']:.3f}"),
            ],
        )
        for level in extraction["levels"]
    ]


def membership_rows(run: RunView) -> list[Row]:
    """Attacks of one run: AUC and true positive rates with their intervals."""
    assert run.summary is not None

    def rate(found: dict[str, Any]) -> Cell:
        if found["tpr"] is None:
            return Cell("not known", found["reason"])
        return Cell(percent(found["tpr"], 1), f"{percent(found['low'], 1)} to {percent(found['high'], 1)}")

    return [
        Row(
            name,
            [
                Cell(f"{attack['auc']:.3f}", f"{attack['low']:.3f} to {attack['high']:.3f}"),
                *(rate(found) for found in attack["tpr"].values()),
            ],
        )
        for name, attack in run.summary["membership"]["attacks"].items()
    ]


def _law_row(law: Law) -> Row:
    if law.fit is None:
        return Row(f"{law.run}, {law.against}", [Cell(f"not fitted: {law.reason}"), Cell(""), Cell(str(len(law.x)))])
    fit = law.fit
    slope = Cell(f"{100 * fit.slope:+.1f} points", f"{100 * fit.low:+.1f} to {100 * fit.high:+.1f}")
    return Row(f"{law.run}, {law.against}", [slope, Cell(f"{fit.r_squared:.3f}"), Cell(str(fit.points))])


_MAIN_SETTINGS = (
    "data.train", "data.sequence_length", "model.num_layers", "model.hidden_size", "model.num_heads", "goldfish.k",
    "goldfish.h", "goldfish.window", "goldfish.scheme", "goldfish.seed", "goldfish.canonical", "train.steps",
    "train.tokens", "train.supervised_tokens", "train.global_batch_size", "train.precision", "train.seed",
    "optimizer.lr", "optimizer.weight_decay", "schedule.name",
)  # fmt: skip
_UNINTERESTING = ("name", "run_dir", "track", "checkpoint", "eval", "audit")


def settings_rows(runs: Sequence[RunView]) -> list[Row]:
    """The settings that matter, and all others in which the runs differ."""
    trees = [_flatten(run.config.model_dump(mode="json")) for run in runs]
    for tree, run in zip(trees, runs, strict=True):
        tree["data.train"] = ", ".join(source.path for source in run.config.data.train) or None
    keys = list(_MAIN_SETTINGS)
    for tree in trees:
        for key in tree:
            differs = len({str(other.get(key)) for other in trees}) > 1
            if differs and key not in keys and key.split(".")[0] not in _UNINTERESTING:
                keys.append(key)
    rows = []
    for key in keys:
        values = [tree.get(key) for tree in trees]
        if any(value is not None for value in values):
            rows.append(Row(key, [Cell(_setting(value)) for value in values]))
    # Settings in which the runs differ come first: they are what a reader compares.
    return sorted(rows, key=lambda row: len({cell.value for cell in row.cells}) == 1)


def _setting(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
