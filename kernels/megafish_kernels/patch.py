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
    # The pivots take part with the number of targets that they stand for, every target with -1.
    place = torch.arange(len(targets), device=targets.device)
    rows, slots = kept.nonzero(as_tuple=True)
    pairs = torch.cat((place[count > 0], rows)), torch.cat((pivot[count > 0], targets[rows, slots]))
    plain = torch.cat((count[count > 0].to(dtype), -torch.ones(len(rows), dtype=dtype, device=rows.device)))
    factors = plain * (1 - label_smoothing)
    if focus is not None:
        factors = factors * focus[pairs[0]]
    difference, logits = _PairLogits.apply(hidden, weight, *pairs, factors)
    cross_entropy = (stats.cross_entropy * count).sum() + (logits * plain).sum()
    return PatchLoss(total + difference, cross_entropy, weight_sum)


class _PairLogits(torch.autograd.Function):
    """sum_i factors_i hidden[rows_i] . weight[ids_i], and these logits (no gradient)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, rows: Tensor, ids: Tensor, factors: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits = torch.cat(
            [
                (hidden[row].to(factors.dtype) * weight[token].to(factors.dtype)).sum(dim=1)
                for row, token, _ in _chunks(weight, rows, ids, factors)
            ]
        )
        ctx.save_for_backward(hidden, weight, rows, ids, factors)
        ctx.mark_non_differentiable(logits)
        return (factors * logits).sum(), logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, rows, ids, factors = ctx.saved_tensors
        d_hidden = torch.zeros_like(hidden, dtype=factors.dtype)
        d_weight = torch.zeros_like(weight, dtype=factors.dtype)
        for row, token, factor in _chunks(weight, rows, ids, factors * upstream):
            # By way of the embedding's gradient, which sorts on a GPU: index_add_ would add in any order there.
            for target, source, at, index in ((d_hidden, weight, row, token), (d_weight, hidden, token, row)):
                moved = source[index].to(factor.dtype) * factor[:, None]
                target += torch.ops.aten.embedding_dense_backward(moved, at, len(target), -1, False)
        return d_hidden.to(hidden.dtype), d_weight.to(weight.dtype), None, None, None


def _chunks(weight: Tensor, *columns: Tensor) -> list[tuple[Tensor, ...]]:
    """Columns of pairs in pieces of about as many as the vocabulary has ids."""
    return list(zip(*(column.split(max(_PAIRS, len(weight))) for column in columns), strict=True))
