"""Schedules against their closed forms, budgets against counting."""

from __future__ import annotations

import math

import pytest

from megafish.config import ScheduleConfig, load_config
from megafish.errors import InputError
from megafish.train.schedule import Budget, Spent, learning_rate_factor, warmup_fraction


def factor(progress: float, warmup: float = 0.1, **settings: object) -> float:
    return learning_rate_factor(ScheduleConfig(**{"min_lr_ratio": 0.1, **settings}), warmup, progress)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_warmup_is_linear_from_the_first_step_on(name: str) -> None:
    assert factor(0.025, name=name) == pytest.approx(0.25)
    assert factor(0.1, name=name) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_the_last_step_has_the_last_rate(name: str) -> None:
    assert factor(1.0, name=name) == pytest.approx(0.1)


def test_cosine_closed_form() -> None:
    for progress in (0.2, 0.55, 0.9):
        done = (progress - 0.1) / 0.9
        assert factor(progress, name="cosine") == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)


def test_linear_closed_form() -> None:
    assert factor(0.55, name="linear") == pytest.approx(1 - 0.9 * 0.5)


def test_wsd_holds_then_decays() -> None:
    assert factor(0.79, name="wsd", decay_fraction=0.2) == 1.0
    assert factor(0.85, name="wsd", decay_fraction=0.2) == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(0.25)))
    assert factor(0.85, name="wsd", decay_fraction=0.2, decay_shape="linear") == pytest.approx(0.1 + 0.9 * 0.75)


def test_constant_holds() -> None:
    assert factor(0.11, name="constant") == factor(1.0, name="constant") == 1.0


def test_no_warmup_starts_at_the_peak() -> None:
    assert factor(1e-9, warmup=0.0, name="cosine") == pytest.approx(1.0)


@pytest.mark.parametrize(("unit", "total"), [("steps", 4), ("tokens", 16), ("supervised_tokens", 12)])
def test_budget_counts_its_unit(unit: str, total: int) -> None:
    budget = Budget.from_config(load_config("tiny", [f"train.{unit}={total}"]))
    assert (budget.unit, budget.total) == (unit, total)
    spent = Spent()
    for step in range(4):
        assert budget.progress(spent) == pytest.approx(step / 4)
        assert not budget.used_up(spent)
        spent = spent.plus(samples=2, tokens=4, supervised_tokens=3)
    assert spent == Spent(steps=4, samples=8, tokens=16, supervised_tokens=12)
    assert budget.used_up(spent)


def test_warmup_steps_become_a_share_of_the_budget() -> None:
    settings = [
        "schedule.warmup_steps=5",
        "train.global_batch_size=8",
        "train.micro_batch_size=8",
        "data.sequence_length=64",
    ]
    config = load_config("tiny", [*settings, "train.steps=50"])
    assert warmup_fraction(config, Budget.from_config(config)) == pytest.approx(0.1)
    config = load_config("tiny", [*settings, f"train.tokens={50 * 8 * 64}"])
    assert warmup_fraction(config, Budget.from_config(config)) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["schedule.warmup_steps=5", "train.supervised_tokens=1000"], "warmup_fraction"),
        (["schedule.warmup_steps=51", "train.steps=50"], "more than the whole budget"),
    ],
)
def test_impossible_warmups_are_refused(overrides: list[str], message: str) -> None:
    config = load_config("tiny", overrides)
    with pytest.raises(InputError, match=message):
        warmup_fraction(config, Budget.from_config(config))
