"""Which steps are refused: those whose loss or gradient norm is not finite, or a spike.

A spike is a value further above the mean of the last accepted steps than `guard.sigma` standard deviations (the rule of
OLMo-core's SkipStepOptimizer). Two things differ here: the gradient norm is judged by its logarithm, because norms vary
by factors, and a refused value enters the window cut down to the limit: one spike does not hide the next, and a level
that has risen for good is accepted after a few steps. The steep fall of the loss at the start only widens the window's
deviation: fewer steps are refused then, never more.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy as np

from megafish.config import GuardConfig

_LOSS_FLOOR, _NORM_FLOOR = 0.005, 0.35
"""Least standard deviation: of the loss relative to its mean, of the norm's logarithm as it is. With large batches both
hardly vary, and six deviations would be a change that harms nobody; with small ones norms have heavy tails (4 to 6
times the usual in a clean run of 512 tokens a step), which the clipping takes care of."""


class StepGuard:
    """Judges the steps of a run by their global loss and gradient norm, so that every process judges alike."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self._losses: deque[float] = deque(maxlen=config.window)
        self._norms: deque[float] = deque(maxlen=config.window)  # natural logarithms
        self._recent: deque[bool] = deque(maxlen=config.window)  # True for a refused step

    def fault(self, loss: float, norm: float) -> str | None:
        """What is wrong with a step, in words; None for a good one.

        `loss`: mean over the global batch [nats/token]. `norm`: global gradient norm before clipping.
        """
        if not math.isfinite(loss):
            return f"loss {loss}"
        if not math.isfinite(norm):
            return f"gradient norm {norm}"
        if self.config.sigma is None:
            return None
        if norm > 0:  # a step without a supervised token has neither loss nor gradient
            loss_limit, norm_limit = self._limits()
            history = f"{len(self._losses)} steps"
            if loss > loss_limit:
                return f"loss {loss:.4g}, more than {self.config.sigma:g} sigma above the last {history}"
            if math.log(norm) > norm_limit:
                return f"gradient norm {norm:.4g}, more than {self.config.sigma:g} sigma above the last {history}"
        return None

    def accept(self, loss: float, norm: float) -> None:
        """A step was taken."""
        self._recent.append(False)
        self._remember(loss, norm)

    def refuse(self, loss: float, norm: float) -> bool:
        """A step was refused. Whether there were more of them in the window than are put up with."""
        self._recent.append(True)
        if math.isfinite(loss) and math.isfinite(norm):
            self._remember(loss, norm)
        return sum(self._recent) > self.config.max_skips

    def state(self) -> dict[str, Any]:
        """For a checkpoint: JSON types that give back every bit, so that a resumed run judges as an undisturbed one."""
        return {"losses": list(self._losses), "log_norms": list(self._norms), "refused": list(self._recent)}

    def load(self, state: dict[str, Any] | None) -> None:
        """Take over a checkpoint's state; None (a checkpoint without one) empties the window."""
        state = state or {"losses": [], "log_norms": [], "refused": []}
        for window, key in ((self._losses, "losses"), (self._norms, "log_norms"), (self._recent, "refused")):
            window.clear()
            window.extend(state[key])

    def _remember(self, loss: float, norm: float) -> None:
        if norm > 0:
            loss_limit, norm_limit = self._limits()
            self._losses.append(min(loss, loss_limit))
            self._norms.append(min(math.log(norm), norm_limit))

    def _limits(self) -> tuple[float, float]:
        """The highest loss, and logarithm of the norm, that is no spike."""
        if self.config.sigma is None or len(self._losses) < self.config.min_history:
            return math.inf, math.inf
        losses, norms = np.array(self._losses), np.array(self._norms)
        loss_deviation = max(float(losses.std()), _LOSS_FLOOR * abs(float(losses.mean())))
        norm_deviation = max(float(norms.std()), _NORM_FLOOR)
        sigma = self.config.sigma
        return float(losses.mean()) + sigma * loss_deviation, float(norms.mean()) + sigma * norm_deviation
