"""When patches end, and the learning rate of both stages."""

from __future__ import annotations

import pytest

from megafish.config import load_config
from megafish.errors import InputError
from megafish.train.schedule import Budget, Spent, learning_rate_factor
from megafish.train.stages import Stages

COMMON = ["data.train=corpus", "train.steps=30", "optimizer.lr=1.0", "schedule.warmup_fraction=0.1"]


def stages(*overrides: str) -> Stages:
    config = load_config("tiny", [*COMMON, *overrides])
    return Stages(config, Budget.from_config(config))


def walk(plan: Stages) -> list[tuple[int | None, bool, float]]:
    """(patch, starts anew, learning rate) of every step."""
    spent, found = Spent(), []
    while not plan.budget.used_up(spent):
        patch = plan.patch(spent)
        after = spent.plus(samples=1, tokens=1, supervised_tokens=1, patches=patch is not None)
        found.append((patch, plan.starts_anew(spent), plan.learning_rate(spent, after)))
        spent = after
    return found


def test_without_patches_it_is_the_schedule() -> None:
    plan = stages()
    rates = [learning_rate_factor(plan.config.schedule, 0.1, step / 30) for step in range(1, 31)]
    assert walk(plan) == [(None, False, rate) for rate in rates]


def test_both_stages_have_a_schedule_of_their_own() -> None:
    plan = stages("patch.size=4")
    schedule = plan.config.schedule
    first = [(4, False, learning_rate_factor(schedule, 0.1, step / 20)) for step in range(1, 21)]
    second = [(None, step == 1, learning_rate_factor(schedule, 0.1, step / 10)) for step in range(1, 11)]
    got = walk(plan)
    assert [entry[:2] for entry in got] == [entry[:2] for entry in first + second]
    assert [entry[2] for entry in got] == pytest.approx([entry[2] for entry in first + second])


def test_kept_the_schedule_goes_on() -> None:
    got = walk(stages("patch.size=2", "patch.fraction=0.5", "patch.restart=false"))
    assert [patch for patch, _, _ in got] == [2] * 15 + [None] * 15
    assert not any(anew for _, anew, _ in got)
    assert [rate for *_, rate in got] == [rate for *_, rate in walk(stages())]


def test_the_first_token_step_is_tried_anew_after_a_refusal() -> None:
    plan = stages("patch.size=4")
    spent = Spent(steps=20, patch_steps=20)
    assert plan.starts_anew(spent) and plan.starts_anew(spent)
    assert not plan.starts_anew(Spent(steps=21, patch_steps=20))


def test_warmup_steps_must_fit_both_stages() -> None:
    assert walk(stages("patch.size=4", "schedule.warmup_steps=10"))[9][2] == 1.0
    with pytest.raises(InputError, match=r"warmup_steps=11 is more than a stage, 0\.333 of the budget"):
        stages("patch.size=4", "schedule.warmup_steps=11")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["patch.fraction=0.5"], "no meaning with size=null"),
        (["patch.size=3"], "sequence_length=256 is not a multiple of patch.size=3"),
        (["patch.size=4", "engine.tensor_parallel=2"], "looked up in the whole head"),
        (["patch.size=64", "data.sequence_length=64", "engine.sequence_parallel=2"], "engine.sequence_parallel=2"),
        (["patch.size=1"], "patch.size"),
    ],
)
def test_what_cannot_be_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_config("tiny", [*COMMON, "model.num_heads=6", "model.num_kv_heads=6", *overrides])
