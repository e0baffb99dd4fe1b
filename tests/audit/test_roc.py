from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import mannwhitneyu, norm

from megafish.audit.roc import auc, delong_interval, roc_curve, tpr_at_fpr
from megafish.audit.statistics import wilson_interval


def groups(seed: int, m: int = 40, n: int = 60, shift: float = 0.7, digits: int = 1) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.Generator(np.random.Philox(seed))
    return random.normal(shift, 1, m).round(digits), random.normal(0, 1, n).round(digits)


def test_auc_by_hand() -> None:
    assert auc(np.array([3.0, 1.0]), np.array([2.0, 0.0])) == 0.75
    assert auc(np.array([1.0, 1.0]), np.array([1.0])) == 0.5, "a tie counts half"
    assert auc(np.array([2.0]), np.array([1.0])) == 1.0 and auc(np.array([1.0]), np.array([2.0])) == 0.0


@pytest.mark.parametrize("seed", range(3))
def test_auc_against_mann_whitney(seed: int) -> None:
    positive, negative = groups(seed)
    expected = mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative))
    assert auc(positive, negative) == pytest.approx(expected)


def test_delong_against_the_double_sum() -> None:
    positive, negative = groups(5)
    kernel = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    area = kernel.mean()
    variance = kernel.mean(1).var(ddof=1) / len(positive) + kernel.mean(0).var(ddof=1) / len(negative)
    logit, spread = np.log(area / (1 - area)), np.sqrt(variance) / (area * (1 - area))
    ends = 1 / (1 + np.exp(-(logit + np.array([-1, 1]) * 1.959963984540054 * spread)))
    assert delong_interval(positive, negative) == pytest.approx(tuple(ends))


def test_delong_covers_the_truth() -> None:
    """Two normals a distance d apart have an AUC of Phi(d / sqrt 2)."""
    truth = norm.cdf(0.7 / np.sqrt(2))
    ends = [delong_interval(*groups(seed, digits=9)) for seed in range(300)]
    covered = np.mean([low <= truth <= high for low, high in ends])
    assert 0.91 <= covered <= 0.985


def test_interval_of_groups_that_do_not_overlap() -> None:
    low, high = delong_interval(np.arange(10, 30.0), np.arange(5.0))
    assert (low, high) == (0.95, 1.0)
    assert delong_interval(np.arange(5.0), np.arange(10, 30.0)) == (0.0, 0.05)


def test_tpr_at_fpr() -> None:
    negative = np.arange(100.0)
    found = tpr_at_fpr(np.array([98.5, 99.5, 97.0, 200.0]), negative, 0.01)
    # One negative, 99, may lie above the threshold: it is 98.
    assert found["threshold"] == 98.0 and found["fpr"] == 0.01 and found["tpr"] == 0.75
    assert (found["low"], found["high"]) == wilson_interval(3, 4)
    ties = tpr_at_fpr(np.array([1.0, 2.0]), np.ones(100), 0.01)
    assert ties["fpr"] == 0.0 and ties["tpr"] == 0.5, "ties never exceed the rate asked for"


def test_too_few_negatives_are_told() -> None:
    found = tpr_at_fpr(np.ones(5), np.zeros(999), 0.001)
    assert found == {"tpr": None, "reason": "needs at least 1000 non-members, there are 999"}
    assert tpr_at_fpr(np.ones(5), np.zeros(1000), 0.001)["tpr"] == 1.0


def test_roc_curve() -> None:
    curve = roc_curve(np.array([3.0, 1.0]), np.array([2.0, 0.0]))
    assert curve == {"fpr": [0.0, 0.0, 0.5, 0.5, 1.0], "tpr": [0.0, 0.5, 0.5, 1.0, 1.0]}


@pytest.mark.parametrize("points", [200, 10_000])
def test_area_below_the_curve_is_the_auc(points: int) -> None:
    positive, negative = groups(8, 700, 900, digits=3)
    curve = roc_curve(positive, negative, points)
    fpr, tpr = np.array(curve["fpr"]), np.array(curve["tpr"])
    assert fpr[0] == tpr[0] == 0.0 and fpr[-1] == tpr[-1] == 1.0
    assert (np.diff(fpr) >= 0).all() and (np.diff(tpr) >= 0).all() and len(fpr) <= max(points + 2, 3)
    tolerance = 1e-9 if points > 1600 else 0.01
    assert np.trapezoid(tpr, fpr) == pytest.approx(auc(positive, negative), abs=tolerance)
    # A low false positive rate has points of its own.
    assert (fpr < 0.01).sum() >= 5
