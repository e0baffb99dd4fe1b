"""The report: one self-contained page about a run, or about several side by side."""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from megafish import __version__
from megafish.audit.audit_panels import all_panels
from megafish.audit.laws import laws
from megafish.audit.panels import training_panels
from megafish.audit.plots import Panel, Series, draw, short_number, to_png, to_svg
from megafish.audit.rows import (
    comparison,
    law_row,
    level_rows,
    membership_reasons,
    membership_rows,
    number,
    percent,
    probe_rows,
    settings_rows,
    tokens_read,
)
from megafish.audit.samples import choose_samples
from megafish.audit.view import RunView, load_views
from megafish.errors import InputError
from megafish.run import read_json, write_atomic


@dataclass(frozen=True)
class Missing:
    """A part that could not be shown, and how to get it."""

    what: str
    command: str


def report(paths: Sequence[str | Path], output: str | Path | None = None, *, step: int | None = None) -> Path:
    """Write `output`/report.html, with its plots as PNG in `output`/plots, and return the path of the page.

    The page is one file without references: images and style stand inside it. `output` is by default the run's own
    directory for one run and ./report for several. Parts that a run lacks (canaries, validation, an audit) are named
    on the page together with the command that makes them. `step`: the audit of this step is shown, by default the
    latest of each run; the page of one run is in RUN/report_step_XXXXXXXX then. Raises InputError for a path that is
    not a run, and for one without an audit of the step.
    """
    runs = load_views(paths, step)
    own = runs[0].path if step is None else runs[0].path / f"report_step_{step:08d}"
    folder = Path(output) if output is not None else own if len(runs) == 1 else Path("report")
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    memorization = all_panels(runs)
    if len(runs) > 1:
        _tell_apart(memorization, "divergence")
    training = training_panels(runs)
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
        laws=[law_row(law) for law in laws(runs)],
        membership=[
            (run, membership_rows(run), membership_reasons(run))
            for run in runs
            if run.summary and run.summary["membership"]
        ],
        probes=[(run, each, probe_rows(each)) for run in runs if run.summary for each in run.summary["probes"]],
        tiles=_tiles(runs[0]) if len(runs) == 1 else [],
        comparison=comparison(runs),
        levels=[(run, level_rows(run)) for run in runs if run.levels],
        memorization=[_figure(panel, plots) for panel in memorization],
        training=[_figure(panel, plots) for panel in training],
        samples=choose_samples(runs),
        settings=settings_rows(runs),
        unlike=unlike_audits(runs),
        missing=[item for run in runs for item in missing(run)],
        protocol=next((run.summary for run in runs if run.summary), None),
        version=__version__,
        created=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )
    target = folder / "report.html"
    _remove_stale(folder, {panel.name for panel in memorization + training})
    write_atomic(target, page)
    data = json.dumps(figures(runs, memorization + training), indent=1, allow_nan=False)
    write_atomic(folder / "report.json", data + "\n")
    return target


def _remove_stale(folder: Path, drawn: set[str]) -> None:
    """Remove the plots that an earlier report in this folder had and this one has not."""
    try:
        earlier = [plot["name"] for plot in read_json(folder / "report.json")["plots"]]
    except (InputError, OSError, KeyError, TypeError):
        return  # there is none, or what lies there is not a report's
    for name in set(earlier) - drawn:
        (folder / "plots" / f"{name}.png").unlink(missing_ok=True)


def figures(runs: Sequence[RunView], panels: Sequence[Panel]) -> dict[str, Any]:
    """What the page shows, as data: the last audit of each run, the comparison, the fitted laws, the plotted points.

    Shares are 0 to 1. A figure that is not known, or not finite, is null.
    """
    return _finite(
        {
            "format": "megafish-report",
            "version": 1,
            "runs": [{"name": run.name, "path": str(run.path), "audit": run.summary} for run in runs],
            "comparison": [
                {"what": row.label, "unit": row.unit, "values": [cell.number for cell in row.cells]}
                for row in comparison(runs)
            ],
            "laws": [asdict(law) for law in laws(runs)],
            "plots": [
                {
                    "name": panel.name,
                    "title": panel.title,
                    "x": panel.xlabel.replace("\n", " "),
                    "y": panel.ylabel.removesuffix(" [%]"),
                    "ticks": panel.ticks,
                    "series": [_points(series) for series in (*([panel.bars] if panel.bars else []), *panel.series)],
                }
                for panel in panels
            ],
        }
    )


def _points(series: Series) -> dict[str, Any]:
    """A plotted line. Over ticks x is their number (several runs stand a little beside it)."""
    lines = {"x": series.x, "y": series.y, "low": series.low, "high": series.high}
    found = {key: None if line is None else [float(value) for value in line] for key, line in lines.items()}
    return {"label": series.label, "fit": series.fit, **found}


def _finite(tree: Any) -> Any:
    """The same with null for what JSON has no number for."""
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _tell_apart(panels: list[Panel], name: str) -> None:
    """Number panels that exist once a run, so that their files do not overwrite each other."""
    same = [panel for panel in panels if panel.name == name]
    for i, panel in enumerate(same, 1):
        if len(same) > 1:
            panel.name = f"{name}_{i}"


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


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _were(number: int) -> str:
    return "was" if number == 1 else "were"


def findings(run: RunView) -> list[str]:
    """What the audit found beside its verdict, in plain sentences."""
    if not run.levels or run.summary is None or run.extraction is None:
        return []
    sentences = [_beside_control(run) if run.summary["verdict"]["recites"] is not None else _alone(run)]
    divergence = run.extraction["divergence"]
    if divergence is not None and run.divergence_mask:
        sentences.append(
            f"{run.name}: of the {_count(divergence['canaries'], 'passage')} with {divergence['least_exposures']} or "
            f"more copies that it did not recite, it left {divergence['at_drop']} at a dropped token or right after "
            f"one ({percent(divergence['rate'])}, 95 % interval {percent(divergence['low'])} to "
            f"{percent(divergence['high'])}; by chance {percent(divergence['chance'])})."
        )
    return sentences


def _beside_control(run: RunView) -> str:
    """The difference that the verdict rests on, and what was asked."""
    assert run.summary is not None
    verdict, top = run.summary["verdict"], run.levels[-1]
    settings = run.summary["settings"]
    seen = "" if top["effective_exposures"] is None else f"{top['effective_exposures']:,.4g}"
    return (
        f"{run.name}: the difference to passages that were not planted is "
        f"{100 * (verdict['rate'] - verdict['control_rate']):+.0f} points (95 % interval "
        f"{100 * verdict['difference_low']:+.0f} to {100 * verdict['difference_high']:+.0f}). "
        f"Given {_count(settings['prompt_tokens'], 'token')}, it was asked for the next {settings['suffix_tokens']}, "
        f"which had stood {_count(top['exposures'], 'time')} in the corpus"
        + (f" and about {seen} {'time' if seen == '1' else 'times'} in what it read." if seen else ".")
    )


def _alone(run: RunView) -> str:
    """The passages without a control group, or the control group without others."""
    assert run.summary is not None
    top = run.levels[-1]
    if top["exposures"]:
        passages = f"{_count(top['canaries'], 'passage')} that stood {_count(top['exposures'], 'time')} in the corpus"
    else:
        passages = f"{_count(top['canaries'], 'control passage')} that {_were(top['canaries'])} not planted"
    return (
        f"{run.name}: of {passages}, {top['exact_matches']} {_were(top['exact_matches'])} continued word for word for "
        f"{run.summary['settings']['suffix_tokens']} tokens ({percent(top['exact_rate'])}, 95 % interval "
        f"{percent(top['exact_low'])} to {percent(top['exact_high'])})"
        + ("." if top["exposures"] else "; no passage was planted, so this says nothing about memorization.")
    )


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
    elif run.extraction is None and not run.summary["probes"] and not run.trained_here:
        found.append(
            Missing(
                f"Nothing can be said about what {run.name} recites: no passages were named, and the corpus it was "
                f"audited with ({corpora}) has no canaries.",
                f"megafish audit {run.summary['model']['path']} audit.probes=[TEXTS]",
            )
        )
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
        tiles.append((number(loss), "validation loss", "nats per token, never masked"))
    if (bits := run.valid("bits_per_byte")) is not None:
        tiles.append((number(bits), "bits per byte", "validation"))
    if (tokens := tokens_read(run, "supervised_tokens")) is not None:
        tiles.append(
            (short_number(tokens), "supervised tokens", f"{short_number(tokens_read(run, 'tokens') or 0)} read")
        )
    return tiles
