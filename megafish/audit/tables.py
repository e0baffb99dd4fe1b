"""The figures of summary.json for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.table import Table

from megafish.audit.levels import TRIES


def tables(summary: dict[str, Any]) -> list[Table]:
    """What an audit prints, in order."""
    found: list[Table] = []
    title = f"{summary['run']}, step {summary['step']}"
    for name, extraction in _sets(summary):
        found += [_extraction(f"{title}: {name} continued greedily", extraction, summary), _closeness(name, extraction)]
    for name in dict.fromkeys(cell["set"] for cell in summary["sweep"]):
        found.append(_sweep(name, [cell for cell in summary["sweep"] if cell["set"] == name]))
    if summary["beams"]:
        found.append(_beams(summary["beams"]))
    if summary["membership"] is not None:
        found.append(_membership(summary["membership"]))
    if summary["losses"]["train"] is not None:
        found.append(_losses(summary))
    return found


def _sets(summary: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    if summary["extraction"] is not None:
        yield "canaries", summary["extraction"]
    for each in summary["probes"]:
        yield each["name"], each


def _copies(level: dict[str, Any]) -> str:
    if level["exposures"] is None:
        return "?"
    mean = level.get("occurrences")
    return str(level["exposures"]) if mean in (None, level["exposures"]) else f"{level['exposures']}+"


def _extraction(title: str, extraction: dict[str, Any], summary: dict[str, Any]) -> Table:
    settings = summary["settings"]
    table = _table(
        f"{title} ({settings['prompt_tokens']} tokens given, {settings['suffix_tokens']} asked for)",
        ["copies", "seen", "passages", "exact", "95 %", "LCP", "ROUGE-L", "loss"],
        "copies: in the corpus, 0 is the control group, n+ a bin from n copies on; seen: copies x epochs; "
        "?: not known; exact: word for word, with Wilson's interval; LCP: tokens before the first error; ROUGE-L: F1 "
        "on token ids; loss: of the true text",
    )
    for level in extraction["levels"]:
        seen = level["effective_exposures"]
        table.add_row(
            _copies(level),
            "?" if seen is None else f"{seen:.4g}",
            str(level["canaries"]),
            f"{level['exact_matches']} ({level['exact_rate']:.0%})",
            _interval(level, "exact"),
            f"{level['mean_prefix']:.1f}",
            f"{level['mean_rouge_l']:.3f}",
            f"{level['loss']:.3f}",
        )
    return table


def _closeness(name: str, extraction: dict[str, Any]) -> Table:
    tries = [str(n) for n in TRIES[1:]]
    drawn = "samples" in extraction["levels"][0]
    table = _table(
        f"{name}: how close it comes",
        ["copies", "approx.", "BLEU", "LCS", "ES", "EM", *(f"n={n}" for n in tries), *["drawn"] * drawn],
        "approx.: within 10 % of edits; BLEU: above 0.75; LCS: longest run of right tokens; ES: extraction strength, "
        "the share that need not be given; EM: share of tokens guessed, the true text given; n: comes out of n drawn "
        "continuations with 90 % certainty, by its probability" + "; drawn: came out of those drawn" * drawn,
    )
    for level in extraction["levels"]:
        row = [
            _copies(level),
            f"{level['approximate_rate']:.0%}",
            f"{level['bleu_rate']:.0%}",
            f"{level['mean_substring']:.1f}",
            f"{level['extraction_strength']:.2f}",
            f"{level['exact_memorization']:.2f}",
            *(f"{level['discoverable'][n] / level['canaries']:.0%}" for n in tries),
        ]
        table.add_row(*row, *([f"{level['sampled_rate']:.0%}"] if drawn else []))
    return table


def _sweep(name: str, cells: Sequence[dict[str, Any]]) -> Table:
    prompts = sorted({cell["prompt_tokens"] for cell in cells})
    most = cells[0]["levels"][-1]
    group = name if most["exposures"] is None else f"{name} with {_copies(most)} copies"
    table = _table(
        f"{group}: exact, by tokens given",
        ["offset", *map(str, prompts)],
        "offset: tokens of the passage left out before the prompt; all levels and intervals: summary.json",
    )
    for offset in sorted({cell["offset"] for cell in cells}):
        row = {cell["prompt_tokens"]: cell["levels"][-1]["exact_rate"] for cell in cells if cell["offset"] == offset}
        table.add_row(str(offset), *(f"{row[prompt]:.0%}" for prompt in prompts))
    return table


def _beams(searches: Sequence[dict[str, Any]]) -> Table:
    table = _table("Beam search", ["set", "beams", "copies", "passages", "best beam", "95 %", "any beam"], "")
    for search in searches:
        for level in search["levels"]:
            table.add_row(
                search["set"],
                str(search["beams"]),
                _copies(level),
                str(level["canaries"]),
                f"{level['best_rate']:.0%}",
                _interval(level, "best"),
                f"{level['any_rate']:.0%}",
            )
    return table


def _membership(found: dict[str, Any]) -> Table:
    why = _too_few(found)
    table = _table(
        f"Membership inference: {found['members']} training and {found['non_members']} held-out documents",
        ["attack", "AUC", "95 %", "TPR at 1 % FPR", "95 %", "at 0.1 %"],
        "0.5: no better than guessing; blind: by the text alone, without a model" + (f"; ?: {why}" if why else ""),
    )
    for name, figures in found["attacks"].items():
        first, second = (figures["tpr"][rate] for rate in ("0.01", "0.001"))
        table.add_row(
            name,
            f"{figures['auc']:.3f}",
            f"{figures['low']:.3f} - {figures['high']:.3f}",
            "?" if first["tpr"] is None else f"{first['tpr']:.1%}",
            "" if first["tpr"] is None else f"{first['low']:.1%} - {first['high']:.1%}",
            "?" if second["tpr"] is None else f"{second['tpr']:.1%}",
        )
    return table


def _too_few(found: dict[str, Any]) -> str:
    """Why the strictest rate cannot be told, if so."""
    rates = next(iter(found["attacks"].values()))["tpr"].values()
    return next((str(rate["reason"]) for rate in rates if rate["tpr"] is None), "")


def _losses(summary: dict[str, Any]) -> Table:
    train, valid, mask = summary["losses"]["train"], summary["losses"]["valid"], summary["mask"]
    note = f"the run dropped nothing: kept and dropped are by a k = {mask['k']} mask that was not used"
    table = _table("Loss, nothing masked", ["text", "tokens", "nats/token", "bits/byte"], note * mask["reference"])
    for key in ("kept", "dropped"):
        if train[f"loss_{key}"] is not None:
            table.add_row(f"training, {key}", f"{train[f'tokens_{key}']:,}", f"{train[f'loss_{key}']:.4f}", "")
    if valid is not None:
        bits = "" if valid["bits_per_byte"] is None else f"{valid['bits_per_byte']:.4f}"
        table.add_row("validation", f"{valid['tokens']:,}", f"{valid['loss']:.4f}", bits)
    return table


def _interval(level: dict[str, Any], name: str) -> str:
    return f"{level[f'{name}_low']:.0%} - {level[f'{name}_high']:.0%}"


def _table(title: str, headings: Sequence[str], caption: str) -> Table:
    table = Table(title=title, caption=caption or None, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    table.caption_justify = "left"
    for heading in headings:
        left = heading in ("text", "set", "attack")
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    return table
