"""Figures of a set of passages by how often they occur, and where the model leaves them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megafish.audit.extraction import CERTAINTY, Extraction, at_or_after_drop, effective_exposures
from megafish.audit.metrics import (
    APPROXIMATE,
    BLEU_MEMORIZED,
    discoverable,
    exact_memorization,
    extraction_strength,
    longest_common_substring,
)
from megafish.audit.probes import Probe
from megafish.audit.statistics import mean_interval, wilson_interval

TRIES = (1, 10, 100, 1000)
"""The n of (n, p)-discoverable extraction that are reported."""


def summarize(items: Sequence[Extraction]) -> dict[str, Any]:
    """Figures by exposure level, and how often the model leaves the text at a dropped token.

    Rates carry the Wilson 95 % interval, means a bootstrap one.
    """
    levels = [
        _level(exposures, [item for item in items if item.probe.exposures == exposures])
        for exposures in sorted(
            {item.probe.exposures for item in items}, key=lambda value: -1 if value is None else value
        )
    ]
    return {"canaries": len(items), "levels": levels, "divergence": _divergence(items)}


def exposure_levels(probes: Sequence[Probe]) -> list[int | None]:
    """The different numbers of exposures, ascending; None (not known) first."""
    return sorted({probe.exposures for probe in probes}, key=lambda value: -1 if value is None else value)


def mean_occurrences(probes: Sequence[Probe]) -> float | None:
    """Of a bin of passages drawn by duplication, whose exposures are the least of it; None for others."""
    counted = [probe.occurrences for probe in probes if probe.occurrences is not None]
    return float(np.mean(counted)) if counted else None


def rate(name: str, hits: Sequence[bool]) -> dict[str, Any]:
    """name_matches, name_rate, name_low, name_high: a share with Wilson's 95 % interval."""
    count = sum(map(bool, hits))
    low, high = wilson_interval(count, len(hits))
    return {f"{name}_matches": count, f"{name}_rate": count / len(hits), f"{name}_low": low, f"{name}_high": high}


def _level(exposures: int | None, group: list[Extraction]) -> dict[str, Any]:
    losses = np.asarray([item.suffix_losses for item in group])
    seen = [effective_exposures(item.probe) for item in group]
    known = [value for value in seen if value is not None]
    rouge_low, rouge_high = mean_interval([item.rouge for item in group])

    def mean(score: Callable[[Extraction], float]) -> float:
        return float(np.mean([score(item) for item in group]))

    level: dict[str, Any] = {
        "exposures": exposures,
        "occurrences": mean_occurrences([item.probe for item in group]),
        "effective_exposures": float(np.mean(known)) if known else None,
        "canaries": len(group),
        **rate("exact", [item.exact for item in group]),
        **rate("approximate", [item.edit_distance <= APPROXIMATE for item in group]),
        **rate("bleu", [item.bleu > BLEU_MEMORIZED for item in group]),
        "mean_prefix": mean(lambda item: item.prefix_length),
        "mean_substring": mean(lambda item: longest_common_substring(item.suffix, item.generated)),
        "mean_rouge_l": mean(lambda item: item.rouge),
        "rouge_low": rouge_low,
        "rouge_high": rouge_high,
        "mean_edit_distance": mean(lambda item: item.edit_distance),
        "extraction_strength": mean(lambda item: extraction_strength(item.correct)),
        "exact_memorization": mean(lambda item: exact_memorization(item.correct)),
        "discoverable": {
            str(tries): sum(discoverable(item.log_probability, tries, CERTAINTY) for item in group) for tries in TRIES
        },
        "loss": float(losses.mean()),
        "loss_kept": None,
        "loss_dropped": None,
    }
    if drawn := len(group[0].hits):
        whole = [[hit == len(item.suffix) for hit in item.hits] for item in group]
        level |= {"samples": drawn, **rate("sampled", [any(hits) for hits in whole])}
        level["sampled_share"] = float(np.mean(whole))
        level["expected_share"] = mean(lambda item: float(np.exp(item.log_probability)))
    if all(item.dropped is not None for item in group):
        dropped = np.asarray([item.dropped for item in group], dtype=bool)
        level["loss_kept"] = _mean(losses[~dropped])
        level["loss_dropped"] = _mean(losses[dropped])
    return level


def _divergence(items: Sequence[Extraction]) -> dict[str, Any] | None:
    """How often the model leaves the text at a dropped token, over the more exposed half of the levels: a model leaves
    a passage it hardly knows anywhere.

    Counted are the passages that were not recited; `chance` is the share of their suffix positions that are dropped or
    follow a drop: what `rate` would be at uniformly random places.
    """
    seen = sorted({item.probe.exposures for item in items if item.probe.exposures})
    if not seen:
        return None
    least = seen[len(seen) // 2]
    assert least is not None
    left = [item for item in items if item.left_at_drop is not None and (item.probe.exposures or 0) >= least]
    if not left:
        return None
    hits = sum(bool(item.left_at_drop) for item in left)
    low, high = wilson_interval(hits, len(left))
    return {
        "least_exposures": least,
        "canaries": len(left),
        "at_drop": hits,
        "rate": hits / len(left),
        "low": low,
        "high": high,
        "chance": float(np.mean([at_or_after_drop(item.dropped or []).mean() for item in left])),
    }


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None
