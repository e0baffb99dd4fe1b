"""Cross-entropy with several targets a row, for patch-level training: one row of hidden states predicts every token of
the next patch (Shao et al., arXiv 2407.12665)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megafish_kernels.backends import Backend
from megafish_kernels.loss import linear_cross_entropy
from megafish_kernels.partials import entropy_weight as weight_of_entropy
from megafish_kernels.torch_backend import reduction_dtype

# (row, target) pairs whose weights are gathered at one time, at least.
_PAIRS = 8192


class PatchLoss(NamedTuple):
    """loss: 0-d with gradient, the sum over all kept targets. cross_entropy: 0-d, their plain cross-entropy [nats].
    weight: 0-d, the sum of their entropy weights; None without any."""

    loss: Tensor
    cross_entropy: Tensor
    weight: Tensor | None


def patch_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    entropy_weight: tuple[float, float] | None = None,
    vocab_size: int | None = None,
    logits_bytes: int | None = None,
    backend: Backend = "auto",
) -> PatchLoss:
    """The sum of `linear_cross_entropy` over K targets a row, at the price of one target a row.

    With the logits z of a row, m targets y that are kept and any one of these as the pivot p,

        sum_y (lse - z_y) = m (lse - z_p) + sum_y (z_p - z_y)

    where the first term is the fused loss of rows with weight m, and the second takes K dot products a row instead of
    its V. What each option does to a token it does to every kept target; a row's entropy is that of all its targets.
    The host reads no count of what is kept. Memory: that of the fused loss, and up to three times the head in fp32.

    Args:
        hidden: [..., D], as for linear_cross_entropy.
        weight: [V, D].
        targets: [..., K] integers in [0, vocab_size), or `ignore_index` for those that are left out.
        ignore_index, z_loss, label_smoothing, entropy_weight, vocab_size, logits_bytes, backend: as for
            linear_cross_entropy.

    Raises:
        ValueError: as linear_cross_entropy does, or targets have other leading dimensions than hidden.
    """
    if targets.ndim != hidden.ndim or targets.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"targets: expected [..., K] with the leading shape {list(hidden.shape[:-1])} of hidden, got "
            f"{list(targets.shape)}"
        )
    hidden, targets = hidden.flatten(0, -2), targets.flatten(0, -2)
    kept = targets != ignore_index
    count = kept.sum(dim=1)
    first = kept.to(torch.int8).argmax(dim=1, keepdim=True)
    pivot = targets.gather(1, first).squeeze(1)
    dtype = reduction_dtype(hidden.dtype)
    total, stats = linear_cross_entropy(
        hidden,
        weight,
        pivot,
        token_weight=count.to(dtype),
        ignore_index=ignore_index,
        reduction="sum",
        z_loss=z_loss,
        label_smoothing=label_smoothing,
        entropy_weight=entropy_weight,
        vocab_size=vocab_size,
        logits_bytes=logits_bytes,
        backend=backend,
        return_stats="loss",
    )
    focus, weight_sum = None, None
    if entropy_weight is not None:
        assert stats.entropy is not None
        focus = weight_of_entropy(stats.entropy, *entropy_weight)
        weight_sum = (focus * count).sum()
    # The pivot takes part with the number of targets that it stands for, every target with -1. What is left out takes
    # part with 0, so that nothing waits for the device to count what is kept.
    ids = torch.cat((pivot[:, None], targets), dim=1)
    plain = torch.cat((count[:, None].to(dtype), -kept.to(dtype)), dim=1)
    ids = torch.where(plain != 0, ids, 0)
    factors = plain * (1 - label_smoothing)
    if focus is not None:
        factors = factors * focus[:, None]
    difference, logits = _PairLogits.apply(hidden, weight, ids, factors)
    cross_entropy = (stats.cross_entropy * count).sum() + (logits * plain).sum()
    return PatchLoss(total + difference, cross_entropy, weight_sum)


class _PairLogits(torch.autograd.Function):
    """The sum over i and j of factors[i, j] hidden[i] . weight[ids[i, j]], and these logits (no gradient)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        dtype = factors.dtype
        parts = _chunks(weight, hidden, ids)
        logits = torch.cat([(rows[:, None].to(dtype) * weight[some].to(dtype)).sum(dim=2) for rows, some in parts])
        ctx.save_for_backward(hidden, weight, ids, factors)
        ctx.mark_non_differentiable(logits)
        return (factors * logits).sum(), logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, ids, factors = ctx.saved_tensors
        scaled = factors * upstream
        d_weight = torch.zeros_like(weight, dtype=scaled.dtype)
        d_hidden = []
        for rows, some, factor in _chunks(weight, hidden, ids, scaled):
            d_hidden.append((factor[:, :, None] * weight[some].to(factor.dtype)).sum(dim=1))
            moved = factor[:, :, None] * rows[:, None].to(factor.dtype)
            # The embedding's gradient sorts on a GPU: index_add_ would add in any order there.
            d_weight += torch.ops.aten.embedding_dense_backward(moved, some, len(weight), -1, False)
        return torch.cat(d_hidden).to(hidden.dtype), d_weight.to(weight.dtype), None, None


def _chunks(weight: Tensor, *columns: Tensor) -> list[tuple[Tensor, ...]]:
    """Rows in pieces with about as many pairs as the vocabulary has ids. columns: the second is ids [n, K]."""
    rows = max(1, max(_PAIRS, len(weight)) // columns[1].shape[1])
    return list(zip(*(column.split(rows) for column in columns), strict=True))
