"""Which steps are refused, against sums done by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from megafish.config import GuardConfig
from megafish.train.spikes import StepGuard


def guard(**settings: float | None) -> StepGuard:
    return StepGuard(GuardConfig(**{"window": 8, "min_history": 4, "sigma": 3.0, **settings}))


def fill(made: StepGuard, losses: list[float], norms: list[float] | None = None) -> StepGuard:
    for loss, norm in zip(losses, norms or [1.0] * len(losses), strict=True):
        made.accept(loss, norm)
    return made


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_from_the_first_step_on(value: float) -> None:
    for made in (guard(), guard(sigma=None)):
        assert "loss" in (made.fault(value, 1.0) or "")
        assert "gradient norm" in (made.fault(1.0, value) or "")
        assert made.fault(1.0, 1.0) is None


def test_the_threshold_is_sigma_deviations_above_the_mean() -> None:
    made = fill(guard(), [2.0, 4.0, 2.0, 4.0])  # mean 3, standard deviation 1
    assert made.fault(5.999, 1.0) is None
    assert made.fault(6.001, 1.0) == "loss 6.001, more than 3 sigma above the last 4 steps"
    assert made.fault(-100.0, 1.0) is None, "a loss that falls is no spike"


def test_the_norm_is_judged_by_its_logarithm() -> None:
    made = fill(guard(), [3.0] * 4, [1.0, math.e**2, 1.0, math.e**2])  # logarithms 0 and 2: mean 1, deviation 1
    assert made.fault(3.0, math.exp(3.999)) is None
    assert "gradient norm" in (made.fault(3.0, math.exp(4.001)) or "")
    assert made.fault(3.0, 0.0) is None, "a step without supervised tokens"


def test_only_the_window_counts() -> None:
    made = fill(guard(), [100.0] * 8 + [2.0, 4.0] * 4)
    assert made.fault(5.999, 1.0) is None and made.fault(6.001, 1.0) is not None


def test_a_refused_value_enters_the_window_cut_down_to_the_limit() -> None:
    made = fill(guard(window=5), [2.0, 4.0, 2.0, 4.0])
    made.refuse(1e9, 1.0)
    # The limit was 6. Of 2 4 2 4 6 the mean is 3.6 and the variance (2.56 + 0.16 + 2.56 + 0.16 + 5.76) / 5.
    limit = 3.6 + 3 * math.sqrt(11.2 / 5)
    assert made.fault(limit - 1e-3, 1.0) is None and made.fault(limit + 1e-3, 1.0) is not None
    assert made.fault(1e9, 1.0) is not None, "a spike does not hide the next"
    made.refuse(math.nan, 1.0)
    made.refuse(3.0, math.inf)
    assert made.fault(limit - 1e-3, 1.0) is None and made.fault(limit + 1e-3, 1.0) is not None


def test_a_level_that_has_risen_for_good_is_accepted_after_a_few_steps() -> None:
    rng = np.random.default_rng(0)
    made = StepGuard(GuardConfig())
    for _ in range(128):
        made.accept(3.0, math.exp(0.1 * rng.standard_normal()))
    norm = math.exp(2.15)
    assert made.fault(3.0, norm) is not None
    refused = 0
    while made.fault(3.0, norm) is not None:
        assert not made.refuse(3.0, norm), "without going back"
        refused += 1
    assert refused > 0


def test_little_history_refuses_nothing_finite() -> None:
    assert fill(guard(), [3.0] * 3).fault(1e9, 1e9) is None
    assert fill(guard(), [3.0] * 4).fault(1e9, 1.0) is not None


def test_a_loss_that_hardly_varies_is_left_its_rounding() -> None:
    made = fill(guard(), [3.0] * 8)
    assert made.fault(3.0 * 1.0149, 1.0) is None
    assert made.fault(3.0 * 1.0151, 1.0) is not None
    assert made.fault(3.0, math.exp(1.049)) is None
    assert made.fault(3.0, math.exp(1.051)) is not None


def test_the_usual_course_of_a_run_is_never_refused() -> None:
    """A steep fall from log(V), norms that rise in the warmup and fall, noise of both: the defaults refuse nothing."""
    rng = np.random.default_rng(0)
    made = StepGuard(GuardConfig())
    for step in range(5000):
        loss = 3.0 + 7.4 * math.exp(-step / 60) + 2.0 * (1 + step) ** -0.3 + 0.05 * rng.standard_normal()
        norm = (0.3 + min(step, 40) / 20 * math.exp(-step / 200)) * math.exp(0.2 * rng.standard_normal())
        assert made.fault(loss, norm) is None, step
        made.accept(loss, norm)
    assert made.fault(loss + 1.0, norm) is not None
    assert made.fault(loss, 8 * norm) is not None


def test_more_refusals_in_the_window_than_are_put_up_with() -> None:
    made = guard(max_skips=2)
    assert [made.refuse(math.nan, 1.0) for _ in range(3)] == [False, False, True]
    fill(made, [3.0] * 5)
    assert made.refuse(math.nan, 1.0) is True, (
        "the first one left the window of 8 just now, the two after it are still there"
    )
    fill(made, [3.0] * 8)
    assert made.refuse(math.nan, 1.0) is False


def test_the_state_gives_back_every_bit() -> None:
    rng = np.random.default_rng(1)
    made = fill(guard(), rng.random(11).tolist(), rng.random(11).tolist())
    made.refuse(math.nan, 1.0)
    again = guard()
    again.load(json.loads(json.dumps(made.state())))
    assert again.state() == made.state()
    again.load(None)
    assert again.state() == guard().state()


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="min_history=64 is above window=32"):
        GuardConfig(window=32)
    with pytest.raises(ValueError, match="stall_seconds=7200 is above slow_stall_seconds=3600"):
        GuardConfig(stall_seconds=7200)
