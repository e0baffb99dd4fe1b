"""The tables of a report's page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megafish.audit.audit_panels import ATTACKS
from megafish.audit.laws import Law
from megafish.audit.plots import short_number
from megafish.audit.view import RunView


@dataclass(frozen=True)
class Cell:
    """One figure of a table, with what stands small below it."""

    value: str
    note: str = ""
    number: float | None = None
    """The figure itself, for machines."""


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    label: str
    cells: list[Cell]
    unit: str = ""


def percent(value: float, digits: int = 0) -> str:
    """0.123 -> "12 %"."""
    return f"{100 * value:.{digits}f} %"


def number(value: float | None, digits: int = 3) -> str:
    return "not known" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _rounded(value: float | None) -> str:
    return "not known" if value is None else short_number(round(value, 1))


def tokens_read(run: RunView, key: str) -> float | None:
    """Tokens that the audited checkpoint had read, since the other figures are its; of the run without an audit."""
    if run.summary is None:
        return run.last("train", key)
    return None if run.summary[key] is None else float(run.summary[key])


_STYLES: dict[str, Callable[[float], str]] = {
    "share": percent,
    "count": short_number,
    "number": number,
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
            cells.append(Cell(text, "; ".join(small), value))
        rows.append(Row(label, cells, unit))

    if any(run.summary for run in runs):
        steps = [run.summary["step"] if run.summary else None for run in runs]
        cells = [Cell("not audited") if step is None else Cell(str(step), number=step) for step in steps]
        rows.append(Row("Audited step", cells))
    row("Supervised tokens", [tokens_read(run, "supervised_tokens") for run in runs], "count")
    row("Input tokens", [tokens_read(run, "tokens") for run in runs], "count")
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
    for key, label in (
        ("approximate_rate", "Within 10 % of edits, most copies"),
        ("bleu_rate", "BLEU above 0.75, most copies"),
        ("sampled_rate", "Drawn at least once, most copies"),
    ):
        notes = [f"of {x['samples']} draws" if x and key == "sampled_rate" and key in x else "" for x in top]
        row(label, [x.get(key) if x else None for x in top], "share", notes=notes)
    for width in sorted({search["beams"] for run in runs for search in _beams(run)}):
        at = [next((search["levels"][-1] for search in _beams(run) if search["beams"] == width), None) for run in runs]
        row(f"Found by {width} beams, most copies", [x["best_rate"] if x else None for x in at], "share")
    best = [_best_attack(run) for run in runs]
    if any(best):
        cells = [Cell(f"{x[1]:.3f}", x[0], x[1]) if x else Cell("not known") for x in best]
        rows.append(Row("Membership inference, best AUC", cells))
    return rows


def _beams(run: RunView) -> list[dict[str, Any]]:
    """Beam searches for the canaries."""
    return [search for search in (run.summary["beams"] if run.summary else []) if search["set"] == "canaries"]


def _best_attack(run: RunView) -> tuple[str, float] | None:
    """Name and AUC of the attack that tells most; the blind one does not look at the model."""
    if run.summary is None or run.summary["membership"] is None:
        return None
    attacks = run.summary["membership"]["attacks"]
    name = max((name for name in attacks if name != "blind"), key=lambda name: attacks[name]["auc"])
    return ATTACKS[name], float(attacks[name]["auc"])


def _train_loss(run: RunView, key: str) -> float | None:
    train = None if run.summary is None else run.summary["losses"]["train"]
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
                        Cell(number(level[key]))
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
            _occurrences(level),
            [
                Cell(_rounded(level["effective_exposures"])),
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


def _occurrences(level: dict[str, Any]) -> str:
    least, mean = level["exposures"], level.get("occurrences")
    if least is None:
        return "not known"
    return str(least) if mean == least else f"{least} and more" + (f", mean {mean:.1f}" if mean else "")


def membership_rows(run: RunView) -> list[Row]:
    """Attacks of one run: AUC and true positive rates with their intervals."""
    assert run.summary is not None

    def rate(found: dict[str, Any]) -> Cell:
        if found["tpr"] is None:
            return Cell("not known")
        return Cell(percent(found["tpr"], 1), f"{percent(found['low'], 1)} to {percent(found['high'], 1)}")

    return [
        Row(
            ATTACKS[name],
            [
                Cell(f"{attack['auc']:.3f}", f"{attack['low']:.3f} to {attack['high']:.3f}"),
                *(rate(found) for found in attack["tpr"].values()),
            ],
        )
        for name, attack in run.summary["membership"]["attacks"].items()
    ]


def membership_reasons(run: RunView) -> list[str]:
    """Why a true positive rate is not known, each reason once."""
    assert run.summary is not None
    attacks = run.summary["membership"]["attacks"].values()
    reasons = {
        f"{100 * float(rate):g} %": found["reason"]
        for attack in attacks
        for rate, found in attack["tpr"].items()
        if found["tpr"] is None
    }
    return [f"true positives at {rate} false ones: {reason}" for rate, reason in reasons.items()]


def law_row(law: Law) -> Row:
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

    def differs(key: str) -> bool:
        return len({str(tree.get(key)) for tree, run in zip(trees, runs, strict=True) if _known(run, key)}) > 1

    keys = list(_MAIN_SETTINGS)
    for key in dict.fromkeys(key for tree in trees for key in tree):
        if key not in keys and key.split(".")[0] not in _UNINTERESTING and differs(key):
            keys.append(key)
    # Settings in which the runs differ come first: they are what a reader compares.
    keys.sort(key=lambda key: not differs(key))
    rows = []
    for key in keys:
        known = [_known(run, key) for run in runs]
        if any(tree.get(key) is not None for tree, yes in zip(trees, known, strict=True) if yes):
            cells = [_setting(tree.get(key)) if yes else "not known" for tree, yes in zip(trees, known, strict=True)]
            rows.append(Row(key, [Cell(text) for text in cells]))
    return rows


def _known(run: RunView, key: str) -> bool:
    """Does the configuration say this of the run? Of a model that was not trained here it says what the model is, and
    what the audit was told of its data."""
    if run.trained_here:
        return True
    told = run.summary is not None and run.summary["mask"] is not None
    return (
        key.startswith("model.") or key == "data.sequence_length" or (told and key.startswith(("data.", "goldfish.")))
    )


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
