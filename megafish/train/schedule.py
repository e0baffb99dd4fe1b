"""Budgets and learning-rate schedules. Both are functions of progress: the share of the budget that is spent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megafish.config import Config, ScheduleConfig
from megafish.errors import InputError


@dataclass(frozen=True)
class Spent:
    """What a run has used up so far, over all processes."""

    steps: int = 0
    samples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    patch_steps: int = 0
    """Steps of the patch stage, which comes first."""
    flops: float = 0.0
    """Operations of the model (model.flops), without recomputation."""

    def plus(
        self, *, samples: int, tokens: int, supervised_tokens: int, patches: bool = False, flops: float = 0.0
    ) -> Spent:
        """After one more step."""
        return Spent(
            self.steps + 1,
            self.samples + samples,
            self.tokens + tokens,
            self.supervised_tokens + supervised_tokens,
            self.patch_steps + patches,
            self.flops + flops,
        )


@dataclass(frozen=True)
class Budget:
    """How much a run may use: `total` of `unit`."""

    unit: Literal["steps", "tokens", "supervised_tokens"]
    total: int

    @classmethod
    def from_config(cls, config: Config) -> Budget:
        """The one budget that is set in the train section."""
        for unit in ("steps", "tokens", "supervised_tokens"):
            total = getattr(config.train, unit)
            if total is not None:
                return cls(unit, total)
        raise AssertionError("TrainConfig guarantees one budget")

    def progress(self, spent: Spent) -> float:
        """Share of the budget that is spent, 0 to 1."""
        return min(1.0, getattr(spent, self.unit) / self.total)

    def used_up(self, spent: Spent) -> bool:
        """Whether the run is over."""
        return getattr(spent, self.unit) >= self.total


def warmup_fraction(config: Config, budget: Budget, part: float = 1.0) -> float:
    """Share of the budget, or of a `part` of it, that is warmup. `warmup_steps` is converted through the tokens of a
    step."""
    steps = config.schedule.warmup_steps
    if steps is None:
        return config.schedule.warmup_fraction
    if budget.unit == "supervised_tokens":
        raise InputError(
            f"schedule.warmup_steps={steps} cannot be placed in a budget of supervised tokens, whose number of steps "
            "is not known ahead: set schedule.warmup_fraction and leave warmup_steps null"
        )
    per_step = 1 if budget.unit == "steps" else config.train.global_batch_size * config.data.sequence_length
    fraction = steps * per_step / budget.total / part
    if fraction > 1:
        whole = "the whole budget" if part == 1.0 else f"a stage, {part:.3g} of the budget"
        raise InputError(f"schedule.warmup_steps={steps} is more than {whole} (train.{budget.unit}={budget.total})")
    return fraction


def learning_rate_factor(schedule: ScheduleConfig, warmup: float, progress: float) -> float:
    """Learning rate / peak learning rate at `progress` (0 to 1).

    A step uses the progress at its END: the first step of a warmup has a rate above zero and the last step of the run
    has the last rate. With x the share of the decay that is done and m = min_lr_ratio:

        cosine  m + (1 - m) (1 + cos(pi x)) / 2
        linear  1 - (1 - m) x
        wsd     m + (1 - m) (1 - sqrt(x)), or 1 - (1 - m) x, over the last `decay_fraction` of the budget
                (Haegele et al. 2024, arXiv 2405.18392)
    """
    if progress < warmup:
        return progress / warmup
    floor = schedule.min_lr_ratio
    if schedule.name == "constant":
        return 1.0
    start = 1.0 - schedule.decay_fraction if schedule.name == "wsd" else warmup
    done = 0.0 if progress <= start else min(1.0, (progress - start) / (1.0 - start))
    if schedule.name == "cosine":
        shape = (1.0 + math.cos(math.pi * done)) / 2
    elif schedule.name == "wsd" and schedule.decay_shape == "sqrt":
        shape = 1.0 - math.sqrt(done)
    else:
        shape = 1.0 - done
    return floor + (1.0 - floor) * shape
