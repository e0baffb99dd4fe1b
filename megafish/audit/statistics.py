"""Intervals and fits: what a figure is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megafish.errors import InputError


def wilson_interval(successes: int, trials: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927), 95 % by default. Zero trials: (0, 1), nothing is known.

    Unlike the normal interval it stays inside [0, 1] and is not of zero width at 0 or n successes: "none of 20 canaries
    was recited" is reported as an upper bound of 16 %.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes={successes} must lie between 0 and trials={trials}")
    if trials == 0:
        return 0.0, 1.0
    p = successes / trials
    scale = 1 + z * z / trials
    centre = (p + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    # At 0 and n successes the ends are exactly 0 and 1; rounding would leave a tiny remainder.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return low, high


def difference_interval(successes: int, trials: int, other_successes: int, other_trials: int) -> tuple[float, float]:
    """95 % interval of the difference of two independent proportions, first minus second: the hybrid of their Wilson
    intervals (Newcombe 1998, method 10). It stays inside [-1, 1] and does not collapse at 0 or n successes."""
    if not trials or not other_trials:
        return -1.0, 1.0
    p, q = successes / trials, other_successes / other_trials
    (low, high), (other_low, other_high) = (
        wilson_interval(successes, trials),
        wilson_interval(other_successes, other_trials),
    )
    return (
        p - q - math.hypot(p - low, other_high - q),
        p - q + math.hypot(high - p, q - other_low),
    )


def mean_interval(
    values: Sequence[float], level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean (Efron 1979). Of a score in [0, 1], often heaped at its ends, the normal
    interval would leave that range. One value: the interval is that value alone."""
    found = np.asarray(values, dtype=np.float64)
    if not len(found):
        raise ValueError("no values: there is no mean")
    random = np.random.Generator(np.random.Philox(seed))
    means = found[random.integers(0, len(found), (draws, len(found)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class LogLinear:
    """y = intercept + slope log10(x), by least squares."""

    slope: float
    """Change of y for ten times x."""
    intercept: float
    r_squared: float
    low: float
    """95 % interval of the slope, by t with n - 2 degrees of freedom."""
    high: float
    points: int


def log_linear_fit(x: Sequence[float], y: Sequence[float]) -> LogLinear:
    """Fit y against log10(x), as the laws of memorization are told (Carlini et al. 2023, figures 1 and 2).

    Raises InputError for fewer than 3 different x, which any line fits, and for an x that is not positive.
    """
    if len(set(x)) < 3:
        raise InputError(f"a log-linear fit needs at least 3 different values of x, there are {len(set(x))}")
    if min(x) <= 0:
        raise InputError(f"a log-linear fit needs positive x, {min(x)} is not")
    from scipy.stats import linregress, t

    found = linregress(np.log10(np.asarray(x, dtype=np.float64)), np.asarray(y, dtype=np.float64))
    half = float(t.ppf(0.975, len(x) - 2)) * float(found.stderr)
    slope = float(found.slope)
    return LogLinear(slope, float(found.intercept), float(found.rvalue) ** 2, slope - half, slope + half, len(x))
