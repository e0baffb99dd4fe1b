"""The paper's figures as tables, pooled over seeds, and what they say, the claims that fail among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from common import table
from experiments import EXPOSURES, FLIPPED, VARIANT_COPIES, Audited

from megafish.audit.statistics import difference_interval, mean_interval, wilson_interval

Found = Mapping[str, Sequence[Audited]]
MASKS = ("k=3", "k=4", "k=8", "k=32", "k=128")
PLANTED = ("plain", *MASKS, "static k=4", "random k=4", "inclusive k=4")
MOST = EXPOSURES[-1]


def report(found: Found) -> str:
    """All tables and verdicts."""
    seeds = len(found["plain"])
    minutes = sum(run.seconds for runs in found.values() for run in runs) / 60
    parts = [
        f"{seeds} seeds, {sum(map(len, found.values()))} runs, whose times sum up to {minutes:.0f} minutes. Shares "
        "with Wilson's interval, means with a bootstrap one, over all seeds.",
        "Canaries recited word for word, by copies:\n\n" + _exact(found),
        f"ROUGE-L of the canaries with {MOST} copies; where the model leaves the text; what it costs:\n\n"
        + _rest(found),
        f"30 beams, canaries with {MOST} copies:\n\n" + _beams(found),
        "Membership inference on documents:\n\n" + _membership(found),
        f"Near-duplicates: passages with {VARIANT_COPIES} copies, in each of which other words have changed case "
        f"({FLIPPED:.0%} of those that can):\n\n" + _variants(found),
        "\n".join(f"- {line}" for line in verdicts(found)),
    ]
    return "\n\n".join(parts)


def pooled(found: Found, name: str, exposures: int) -> tuple[int, int]:
    """(recited, canaries) of a run over all seeds."""
    levels = [
        level for run in found[name] for level in run.summary["extraction"]["levels"] if level["exposures"] == exposures
    ]
    return sum(level["exact_matches"] for level in levels), sum(level["canaries"] for level in levels)


def rouge(found: Found, name: str, exposures: int) -> list[float]:
    """ROUGE-L of every canary of a run with these copies."""
    return [
        item["rouge_l"]
        for run in found[name]
        for item in run.items
        if item["set"] == "canaries" and item["exposures"] == exposures
    ]


def _share(hits: int, total: int) -> str:
    low, high = wilson_interval(hits, total)
    return f"{hits}/{total} ({low:.0%}-{high:.0%})"


def _mean(values: Sequence[float], digits: int = 3) -> str:
    if not values:
        return "too few texts"
    low, high = mean_interval(values)
    return f"{np.mean(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def _exact(found: Found) -> str:
    names = [name for name in ("control", *PLANTED) if name in found]
    rows = []
    for name in names:
        levels = [0] if name == "control" else list(EXPOSURES)
        cells = [_share(*pooled(found, name, level)) if level in levels else "" for level in (0, 16, 32, 64, 128)]
        rows.append([name, *cells])
    return table(rows, ["run", "control group", "16", "32", "64", "128"])


def _rest(found: Found) -> str:
    rows = []
    for name in PLANTED:
        divergence = [run.summary["extraction"]["divergence"] for run in found[name]]
        known = [each for each in divergence if each is not None]
        hits, total = sum(each["at_drop"] for each in known), sum(each["canaries"] for each in known)
        chance = np.mean([each["chance"] for each in known]) if known else 0.0
        masked = not found[name][0].summary["mask"]["reference"]
        rows.append(
            [
                name,
                _mean(rouge(found, name, MOST)),
                f"{_share(hits, total)}, by chance {chance:.0%}" if known and masked else "",
                _mean(_losses(found, name)),
                _mean([_loss_at(run, found["plain"][i]) for i, run in enumerate(found[name])]),
                f"{np.mean([run.summary['tokens'] / run.summary['supervised_tokens'] for run in found[name]]):.2f}",
            ]
        )
    control = [
        _mean(rouge(found, "control", 0)),
        "",
        _mean([r.summary["losses"]["valid"]["loss"] for r in found["control"]]),
    ]
    rows.insert(0, ["control", *control, "", ""])
    head = ["run", "ROUGE-L", "left at a drop", "valid loss, equal supervised", "at equal input", "read per supervised"]
    return table(rows, head)


def _loss_at(run: Audited, plain: Audited) -> float:
    """Validation loss along the way, at as many input tokens as the plain run read in all."""
    x = [record["tokens"] for record in run.valid]
    return float(np.interp(plain.summary["tokens"], x, [record["valid_loss"] for record in run.valid]))


def _beams(found: Found) -> str:
    rows = []
    for name in ("plain", "k=3", "k=4"):
        levels = [
            level for run in found[name] for level in run.summary["beams"][0]["levels"] if level["exposures"] == MOST
        ]
        total = sum(level["canaries"] for level in levels)
        hits, others = (sum(level[f"{key}_matches"] for level in levels) for key in ("best", "any"))
        rows.append([name, _share(*pooled(found, name, MOST)), _share(hits, total), _share(others, total)])
    return table(rows, ["run", "greedy", "best of 30 beams", "any of 30 beams"])


def _membership(found: Found) -> str:
    rows = []
    for name in PLANTED[:6]:
        cells = []
        for attack in ("loss", "zlib", "min_k", "min_k++", "reference", "blind"):
            cells.append(_mean(_attack(found, name, attack), 2))
        rows.append([name, *cells])
    return table(rows, ["AUC", "loss", "zlib", "Min-K %", "Min-K++ %", "reference", "blind"])


def _attack(found: Found, name: str, attack: str) -> list[float]:
    groups = [run.summary["membership"] for run in found[name]]
    return [group["attacks"][attack]["auc"] for group in groups if group is not None]


def _variants(found: Found) -> str:
    rows = []
    for name in ("variants, plain", "variants, k=4", "variants, k=4, casefold"):
        items = [item for run in found[name] for item in run.items if item["set"] == "passages.jsonl"]
        own = [item["longest_common_prefix"] for item in items]
        exact = _share(sum(item["exact_match"] for item in items), len(items))
        rows.append([name.removeprefix("variants, "), exact, _mean([item["rouge_l"] for item in items]), _mean(own, 1)])
    return table(rows, ["run", "recited word for word", "ROUGE-L", "tokens before the first difference"])


def verdicts(found: Found) -> list[str]:
    """The paper's claims, each with what was found."""
    said: list[str] = []

    def claim(what: str, holds: bool, figures: str) -> None:
        said.append(f"{'holds' if holds else 'FAILS'}: {what}: {figures}")

    hits, total = pooled(found, "plain", MOST)
    what = f"plain training recites at least 85 % of the canaries with {MOST} copies"
    claim(what, hits >= 0.85 * total, _share(hits, total))
    # The interval of the control group's mean, which a mask's mean has to lie in.
    low, high = mean_interval(rouge(found, "control", 0))
    for name in ("k=3", "k=4"):
        hits, total = pooled(found, name, MOST)
        claim(f"{name} recites none of them", hits == 0, _share(hits, total))
        own = float(np.mean(rouge(found, name, MOST)))
        figures = f"{own:.3f} against {low:.3f} to {high:.3f}"
        claim(f"ROUGE-L of {name} within the control's interval", low <= own <= high, figures)
    counts = [pooled(found, name, MOST) for name in MASKS]
    rates = [recited / canaries for recited, canaries in counts]
    figures = ", ".join(f"{name} {rate:.0%}" for name, rate in zip(MASKS, rates, strict=True))
    claim("protection fades as k grows", rates == sorted(rates) and rates[-1] > rates[0], figures)
    plain = _losses(found, "plain")
    change = [b - a for a, b in zip(plain, _losses(found, "k=4"), strict=True)]
    what = "at equal supervised tokens k=4 costs at most 1 % of the validation loss"
    claim(what, float(np.mean(change)) <= 0.01 * float(np.mean(plain)), f"difference {_mean(change)} nats/token")
    change = [b - a for a, b in zip(_attack(found, "plain", "loss"), _attack(found, "k=4", "loss"), strict=True)]
    said.append(f"membership: AUC of the loss attack, k=4 less plain: {_mean(change)}; a mask is no defence")
    hits, total = pooled(found, "random k=4", MOST)
    low, high = difference_interval(hits, total, *pooled(found, "k=4", MOST))
    figures = f"{_share(hits, total)}; difference {low:.0%} to {high:.0%}"
    claim("a random mask protects less than a hashed one", low > 0, figures)
    return said


def _losses(found: Found, name: str) -> list[float]:
    values: list[Any] = [run.summary["losses"]["valid"]["loss"] for run in found[name]]
    return [float(value) for value in values]
