from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap, linregress

from megafish.audit.statistics import difference_interval, log_linear_fit, mean_interval, wilson_interval
from megafish.errors import InputError


@pytest.mark.parametrize("trials", [1, 7, 20, 1000])
def test_wilson_interval_against_scipy(trials: int) -> None:
    for successes in {0, 1, trials // 2, trials - 1, trials}:
        expected = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
        assert wilson_interval(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_interval_at_the_ends() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    low, high = wilson_interval(0, 20)
    z2 = 1.959963984540054**2
    assert low == 0.0 and high == pytest.approx(z2 / (20 + z2))
    assert wilson_interval(20, 20)[1] == 1.0
    with pytest.raises(ValueError, match="successes=3"):
        wilson_interval(3, 2)


def test_difference_interval_as_published() -> None:
    """Newcombe 1998, table II, method 10: 56/70 - 48/80, 9/10 - 3/10, 10/10 - 0/10 and 0/10 - 0/10."""
    assert difference_interval(56, 70, 48, 80) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert difference_interval(9, 10, 3, 10) == pytest.approx((0.1705, 0.8090), abs=5e-5)
    assert difference_interval(10, 10, 0, 10) == pytest.approx((0.6075, 1.0), abs=5e-5)
    assert difference_interval(0, 10, 0, 10) == pytest.approx((-0.2775, 0.2775), abs=5e-5)
    assert difference_interval(0, 0, 1, 2) == (-1.0, 1.0)


def test_difference_interval_is_antisymmetric() -> None:
    low, high = difference_interval(3, 17, 9, 20)
    assert difference_interval(9, 20, 3, 17) == pytest.approx((-high, -low))


def test_mean_interval_against_scipy() -> None:
    values = np.random.Generator(np.random.Philox(1)).beta(0.5, 2, 60)
    random = np.random.Generator(np.random.Philox(2))
    theirs = bootstrap((values,), np.mean, method="percentile", n_resamples=4000, rng=random).confidence_interval
    low, high = mean_interval(values.tolist())
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.012)
    assert low < values.mean() < high
    assert mean_interval(values.tolist()) == (low, high), "repeatable"


def test_mean_interval_of_equal_values() -> None:
    assert mean_interval([0.25] * 9) == (0.25, 0.25) == mean_interval([0.25])
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_log_linear_fit() -> None:
    exact = log_linear_fit([1, 10, 100, 1000], [0.1, 0.3, 0.5, 0.7])
    assert (exact.slope, exact.intercept, exact.r_squared) == pytest.approx((0.2, 0.1, 1.0))
    assert exact.low == pytest.approx(exact.high, abs=1e-6) and exact.points == 4
    x, y = [2.0, 4, 8, 16, 64, 64], [0.1, 0.15, 0.4, 0.35, 0.7, 0.65]
    found, theirs = log_linear_fit(x, y), linregress(np.log10(x), y)
    assert (found.slope, found.r_squared) == pytest.approx((theirs.slope, theirs.rvalue**2))
    # t(0.975; 4) = 2.7764
    assert found.high - found.slope == pytest.approx(2.7764451 * theirs.stderr, rel=1e-6)
    assert found.slope - found.low == pytest.approx(found.high - found.slope)


@pytest.mark.parametrize(("x", "message"), [([1, 1, 2], "at least 3 different"), ([0, 1, 2], "positive x, 0 is not")])
def test_log_linear_fit_refuses(x: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        log_linear_fit(x, [0.1, 0.2, 0.3])


def test_a_flat_line_has_no_r_squared_of_its_own() -> None:
    flat = log_linear_fit([1, 10, 100], [0.0, 0.0, 0.0])
    assert flat.slope == 0.0 and (math.isnan(flat.r_squared) or 0 <= flat.r_squared <= 1)
