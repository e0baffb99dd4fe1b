"""How well a score tells two groups apart: area under the ROC curve and true positive rates, with intervals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from megafish.audit.statistics import wilson_interval

Floats = npt.NDArray[np.float64]
_Z = 1.959963984540054
_POINTS = 200


def auc(positive: Floats, negative: Floats) -> float:
    """Probability that a positive scores above a negative, ties counting half (Mann and Whitney 1947)."""
    return float(_placements(positive, negative).mean())


def delong_interval(positive: Floats, negative: Floats) -> tuple[float, float]:
    """95 % interval of the AUC (DeLong, DeLong and Clarke-Pearson 1988), on the logit scale: it stays in [0, 1].

    Where the groups do not overlap the variance is 0 and says nothing; the interval then ends where it would with one
    inversion: at the AUC at which all of the larger group but one stand on the right side.
    """
    area = auc(positive, negative)
    m, n = len(positive), len(negative)
    if area in (0.0, 1.0):
        edge = 1.0 / max(m, n) if min(m, n) > 1 else 1.0
        return (1 - edge, 1.0) if area else (0.0, edge)
    variance = np.var(_placements(positive, negative), ddof=1) / m if m > 1 else 0.25
    variance += np.var(1 - _placements(negative, positive), ddof=1) / n if n > 1 else 0.25
    logit, half = math.log(area / (1 - area)), _Z * math.sqrt(float(variance)) / (area * (1 - area))
    return _expit(logit - half), _expit(logit + half)


def tpr_at_fpr(positive: Floats, negative: Floats, rate: float) -> dict[str, Any]:
    """True positive rate where at most a share `rate` of the negatives is above the threshold.

    tpr with Wilson's interval (low, high), the threshold (above it is positive) and the fpr that was realized. tpr is
    None, and reason says why, where fewer than 1 / rate negatives are there: no threshold realizes such a rate.
    """
    needed = math.ceil(1 / rate - 1e-9)
    if len(negative) < needed:
        return {"tpr": None, "reason": f"needs at least {needed} non-members, there are {len(negative)}"}
    allowed = int(rate * len(negative) + 1e-9)
    threshold = float(np.sort(negative)[::-1][allowed])
    hits, false = int((positive > threshold).sum()), int((negative > threshold).sum())
    low, high = wilson_interval(hits, len(positive))
    return {
        "tpr": hits / len(positive),
        "low": low,
        "high": high,
        "threshold": threshold,
        "fpr": false / len(negative),
    }


def roc_curve(positive: Floats, negative: Floats, points: int = _POINTS) -> dict[str, list[float]]:
    """fpr and tpr at every threshold, from (0, 0) to (1, 1); of a long curve about `points` of them, spaced evenly on
    the axis and its logarithm, so that the low rates, which matter, are kept."""
    thresholds = np.unique(np.concatenate([positive, negative]))[::-1]
    above = [np.searchsorted(np.sort(group), thresholds, side="left") for group in (positive, negative)]
    tpr = np.concatenate([[0.0], 1 - above[0] / len(positive)])
    fpr = np.concatenate([[0.0], 1 - above[1] / len(negative)])
    if len(fpr) > points:
        half = points // 2
        wanted = np.concatenate([np.linspace(0, 1, half), np.geomspace(1 / len(negative), 1, points - half)])
        # The highest point of each step of the curve.
        kept = np.unique(np.searchsorted(fpr, wanted, side="right") - 1)
        kept = np.unique(np.concatenate([[0], kept, [len(fpr) - 1]]))
        fpr, tpr = fpr[kept], tpr[kept]
    return {"fpr": fpr.tolist(), "tpr": tpr.tolist()}


def _placements(group: Floats, other: Floats) -> Floats:
    """For each value the share of the other group below it, ties counting half."""
    ordered = np.sort(other)
    below = np.searchsorted(ordered, group, side="left")
    upto = np.searchsorted(ordered, group, side="right")
    return np.asarray((below + upto) / (2 * len(other)), dtype=np.float64)


def _expit(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0
