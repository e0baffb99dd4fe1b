"""What is said of a whole model: means over its sets, and what takes a second model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megafish.unlearn import metrics, slots
from megafish.unlearn.items import ATTACKS, KEPT_SETS, ItemScore

_MEANS = (
    "probability", "exact_memorization", "extraction_strength", "rouge", "rouge_f1", "truth_ratio", "leaked",
    "harmful", "similarity", "fluent", "distinct_2", "repetition", "brunet", "honore",
)  # fmt: skip


def set_figures(items: Sequence[ItemScore]) -> dict[str, float | None]:
    """Means over a set; of what none of its rows has, None."""
    found: dict[str, float | None] = {name: _mean(getattr(item, name) for item in items) for name in _MEANS}
    perplexities = [item.perplexity for item in items if item.perplexity is not None]
    found["perplexity"] = float(np.median(perplexities)) if perplexities else None
    found["empty"] = _mean(not item.generated for item in items)
    found["linguistic_score"] = None
    if perplexities and found["brunet"] is not None and found["honore"] is not None:
        found["linguistic_score"] = metrics.linguistic_score(
            float(np.mean(perplexities)), found["brunet"], found["honore"]
        )
    rows = [(item, item.told, bool(item.contradicts)) for item in items if item.told is not None]
    gone = [slots.forgotten(share, wrong) for _, share, wrong in rows]
    found["kfr"] = _mean(gone)
    # Nothing that cannot be read counts as forgotten.
    judged = [(lost, item.fluent) for lost, (item, _, _) in zip(gone, rows, strict=True) if item.fluent is not None]
    found["kfr_fluent"] = _mean(lost and bool(fluent) for lost, fluent in judged)
    found["krr"] = _mean(slots.kept(share, wrong) for _, share, wrong in rows)
    found["hallucinated"] = _mean(wrong for _, _, wrong in rows)
    relations = [item.entailment for item in items if item.entailment is not None]
    found["entailed"] = _mean(relation == "entailment" for relation in relations)
    found["contradicted"] = _mean(relation == "contradiction" for relation in relations)
    found["utility"] = metrics.harmonic_mean(_parts(found, items))
    return found


def utility(sets: Mapping[str, Sequence[ItemScore]]) -> float | None:
    """TOFU's model utility: the harmonic mean of probability, ROUGE-L recall and truth of every set that is kept."""
    parts = [part for name in KEPT_SETS if name in sets for part in _parts(set_figures(sets[name]), sets[name])]
    return metrics.harmonic_mean(parts) if parts else None


def compare(models: Mapping[str, Mapping[str, Any]], items: Mapping[str, Sequence[ItemScore]]) -> dict[str, Any]:
    """Forget quality and PrivLeak of "model" against "retain model". items: of the forget set, by model."""
    found: dict[str, Any] = {}
    ratios = {
        title: [item.truth_ratio for item in items[title] if item.truth_ratio is not None]
        for title in ("model", "retain model")
    }
    if ratios["model"]:
        found["forget_quality"] = metrics.forget_quality(ratios["model"], ratios["retain model"])._asdict()
    if "membership" in models["model"]:
        areas = [models[title]["membership"] for title in ("model", "retain model")]
        found["privacy_leak"] = {name: metrics.privacy_leak(areas[0][name], areas[1][name]) for name in ATTACKS}
    return found


def _parts(found: Mapping[str, float | None], items: Sequence[ItemScore]) -> list[float]:
    parts = [found["probability"] or 0.0, found["rouge"] or 0.0]
    truths = [max(0.0, 1 - item.truth_ratio) for item in items if item.truth_ratio is not None]
    return [*parts, float(np.mean(truths))] if truths else parts


def _mean(values: Any) -> float | None:
    known = [float(value) for value in values if value is not None]
    return float(np.mean(known)) if known else None
