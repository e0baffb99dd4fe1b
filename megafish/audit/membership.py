"""Membership inference: was a text in the training data? Attacks that look at the model's predictions.

Every score is higher the likelier the text is a member. (Yeom et al. 2018: loss; Carlini et al. 2021: zlib, reference;
Shi et al. 2024, arXiv 2310.16789: Min-K %; Zhang et al. 2025, arXiv 2404.02936: Min-K++ %.)
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megafish.audit.roc import auc, delong_interval, roc_curve, tpr_at_fpr
from megafish.audit.scores import TokenScores
from megafish.errors import InputError

LOWEST = 0.2
"""Share of a text's tokens that Min-K % and Min-K++ % look at."""
RATES = (0.01, 0.001)
"""False positive rates at which the true positive rate is reported."""
FEWEST = 2
"""Texts of a group, without which there is no interval."""

Floats = npt.NDArray[np.float64]


def membership_scores(
    scores: Sequence[TokenScores], texts: Sequence[str], reference: Sequence[TokenScores] | None = None
) -> dict[str, Floats]:
    """Scores by attack, [texts] each, higher for members.

    scores: with their moments. texts: the same texts, for their compressed size [bytes]. reference: scores by a model
    that did not see the members. The attack "blind" takes the text alone (bytes that zlib makes of a token): where it
    tells the groups apart, they differ without any model, and so may what the attacks find (Das et al. 2024,
    arXiv 2406.16201).
    """
    losses = np.array([-score.log_prob.mean() for score in scores])
    sizes = np.array([len(zlib.compress(text.encode())) for text in texts], dtype=np.float64)
    tokens = np.array([len(score.log_prob) for score in scores], dtype=np.float64)
    found: dict[str, Floats] = {
        "loss": -losses,
        "zlib": -losses / sizes,
        "min_k": np.array([_lowest(score.log_prob) for score in scores]),
        "min_k++": np.array([_lowest(_normalized(score)) for score in scores]),
    }
    if reference is not None:
        found["reference"] = np.array([-score.log_prob.mean() for score in reference]) - losses
    return {**found, "blind": -sizes / tokens}


def attack(members: Mapping[str, Floats], non_members: Mapping[str, Floats]) -> dict[str, Any]:
    """AUC with DeLong's interval, true positive rates and the ROC curve of every attack.

    Keys: members and non_members (counts), attacks: by name {auc, low, high, tpr: {rate: tpr_at_fpr}, roc}. Raises
    InputError for groups too small to say anything of.
    """
    sizes = [len(next(iter(group.values()))) for group in (members, non_members)]
    for size, what in zip(sizes, ("members", "non-members"), strict=True):
        if size < FEWEST:
            raise InputError(f"membership inference: {size} {what}, at least {FEWEST} are needed: name longer corpora")
    return {
        "members": sizes[0],
        "non_members": sizes[1],
        "attacks": {name: _figures(members[name], non_members[name]) for name in members},
    }


def _figures(positive: Floats, negative: Floats) -> dict[str, Any]:
    low, high = delong_interval(positive, negative)
    return {
        "auc": auc(positive, negative),
        "low": low,
        "high": high,
        "tpr": {str(rate): tpr_at_fpr(positive, negative, rate) for rate in RATES},
        "roc": roc_curve(positive, negative),
    }


def _normalized(score: TokenScores) -> Floats:
    """(log p - mu) / sigma of every token."""
    assert score.mean is not None and score.std is not None, "Min-K++ needs the moments"
    return np.asarray((score.log_prob - score.mean) / score.std, dtype=np.float64)


def _lowest(values: Floats) -> float:
    """Mean of the lowest LOWEST of the values, of at least one."""
    return float(np.sort(values)[: max(1, int(LOWEST * len(values)))].mean())
