"""What part of a vocabulary says about a row's logits, how such parts are put together, and the loss that follows.

A part is a split of a Triton kernel, or a rank's shard of a vocabulary-parallel head. Its figures are one row each of a
tensor [F, n] in the dtype of the reductions, so that all of them travel in one collective. Merging is a fixed sequence
of additions over the parts: no locks, no atomics, the same bits every time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The maximum of no logits at all, and of ids that a bias of -inf bans. Finite, so that differences of two of them are 0
# and not NaN, and so far from the end of fp32 that a difference times a sum of exponentials is finite too.
LOWEST = -1e30


@dataclass(frozen=True)
class Fields:
    """Which figures there are, and the row in which each one stands."""

    smoothing: bool
    """The sum of all logits is wanted."""
    stats: bool
    """Entropy and accuracy are wanted, or one of them."""

    maximum = 0
    sum_exp = 1
    """Sum of exp(z - maximum)."""
    target = 2
    """The target's logit, 0 where the target lies in another part."""

    @property
    def total(self) -> int:
        """Row of the sum of the logits."""
        return 3

    @property
    def moment(self) -> int:
        """Row of the sum of exp(z - maximum) (z - maximum)."""
        return 3 + self.smoothing

    @property
    def best(self) -> int:
        """Row of the id of the first column that has the maximum, a whole number."""
        return 4 + self.smoothing

    @property
    def count(self) -> int:
        """F, the number of figures."""
        return 3 + self.smoothing + 2 * self.stats


@dataclass(frozen=True)
class RowLoss:
    """Losses and facts of every kept row, each [n]; see LossStats."""

    loss: Tensor
    """With smoothing and z-loss, not weighted."""
    cross_entropy: Tensor
    lse: Tensor
    entropy: Tensor | None
    correct: Tensor | None
    weight: Tensor | None = None
    """By which the entropy multiplies the row's loss; None for 1."""


def entropy_weight(entropy: Tensor, sigma: float, gamma: float) -> Tensor:
    """(sigma + entropy)^gamma of each row (MiLe, arXiv 2310.19531, section 3). Rounding can make a certain prediction's
    entropy fall below 0."""
    return entropy.clamp(min=0).add_(sigma).pow_(gamma)


def merge(parts: Tensor, fields: Fields) -> Tensor:
    """[P, F, n] figures of P parts -> [F, n] of all of them together."""
    if parts.shape[0] == 1:
        return parts[0]
    maxima = parts[:, fields.maximum]
    top = maxima.amax(dim=0)
    shift = maxima - top
    factor = shift.exp()
    sums = parts[:, fields.sum_exp]
    merged = [top, (sums * factor).sum(dim=0), parts[:, fields.target].sum(dim=0)]
    if fields.smoothing:
        merged.append(parts[:, fields.total].sum(dim=0))
    if fields.stats:
        # exp(z - top) (z - top) = factor exp(z - m) ((z - m) + shift)
        merged.append(((parts[:, fields.moment] + shift * sums) * factor).sum(dim=0))
        # Parts need not stand in the order of their columns: of those that share the maximum the lowest id counts.
        ids = parts[:, fields.best]
        merged.append(torch.where(shift == 0, ids, torch.inf).amin(dim=0))
    return torch.stack(merged)


def row_loss(
    figures: Tensor,
    fields: Fields,
    targets: Tensor,
    *,
    vocab_size: int,
    label_smoothing: float,
    z_loss: float,
    entropy_power: tuple[float, float] | None = None,
) -> RowLoss:
    """The losses of rows from the figures [F, n] of their whole vocabulary; `targets` [n] are ids of it;
    entropy_power: (sigma, gamma) of `entropy_weight`."""
    top, at_target = figures[fields.maximum], figures[fields.target]
    log_sum = figures[fields.sum_exp].log()
    lse = top + log_sum
    # Not lse - at_target: the sum in lse has already rounded away what a small log_sum holds.
    cross_entropy = (top - at_target) + log_sum
    loss = cross_entropy
    if label_smoothing:
        mean = figures[fields.total] / vocab_size
        loss = (1 - label_smoothing) * loss + label_smoothing * ((top - mean) + log_sum)
    if z_loss:
        loss = loss + z_loss * lse.square()
    if not fields.stats:
        return RowLoss(loss, cross_entropy, lse, None, None)
    entropy = log_sum - figures[fields.moment] / figures[fields.sum_exp]
    weight = None if entropy_power is None else entropy_weight(entropy, *entropy_power)
    return RowLoss(loss, cross_entropy, lse, entropy, figures[fields.best] == targets, weight)
