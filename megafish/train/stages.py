"""The stages of a run: patches first where the configuration asks for them, then tokens."""

from __future__ import annotations

from dataclasses import dataclass

from megafish.config import Config
from megafish.train.schedule import Budget, Spent, learning_rate_factor, warmup_fraction


@dataclass(frozen=True)
class Stages:
    """Which stage a step belongs to, and its learning rate. All of it follows from what is spent, so a resumed run
    changes over at the same step."""

    config: Config
    budget: Budget

    def __post_init__(self) -> None:
        for begin, end in self._bounds():
            warmup_fraction(self.config, self.budget, end - begin)  # a warmup that does not fit is refused at once

    def patch(self, spent: Spent) -> int | None:
        """Tokens of a patch in the step after `spent`, None for a step of tokens."""
        patch = self.config.patch
        return patch.size if patch.size is not None and self.budget.progress(spent) < patch.fraction else None

    def starts_anew(self, spent: Spent) -> bool:
        """Whether the step after `spent` is the first of the token stage and the optimizer is to forget the other."""
        after_patches = 0 < spent.steps == spent.patch_steps
        return after_patches and self.patch(spent) is None and self.config.patch.restart

    def learning_rate(self, spent: Spent, after: Spent) -> float:
        """Of the step from `spent` to `after`: the schedule over the budget, or over the step's stage."""
        progress = self.budget.progress(after)
        bounds = self._bounds()
        begin, end = bounds[0] if len(bounds) == 1 or self.patch(spent) is not None else bounds[1]
        warmup = warmup_fraction(self.config, self.budget, end - begin)
        done = min(1.0, (progress - begin) / (end - begin))
        return self.config.optimizer.lr * learning_rate_factor(self.config.schedule, warmup, done)

    def _bounds(self) -> list[tuple[float, float]]:
        """(begin, end) of the schedules, as shares of the budget."""
        patch = self.config.patch
        if patch.size is None or not patch.restart or patch.fraction == 1.0:
            return [(0.0, 1.0)]
        return [(0.0, patch.fraction), (patch.fraction, 1.0)]
