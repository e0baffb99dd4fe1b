"""Layers whose weights, and attention whose sequences, are spread over processes.

Tensor parallelism with sequence-sharded norms (Shoeybi et al. 2019, arXiv 1909.08053; Korthikanti et al. 2022, arXiv
2205.05198): between the layers each process of the tensor axis holds an equal share of the tokens, as [tokens / T, D]
of the flattened batch. A column-parallel layer gathers the tokens, a row-parallel one scatters the sum. Sequence
parallelism (DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv 2309.14509): each process holds consecutive tokens of every
sequence, and exchanges them around attention for all tokens of a share of the heads.

On an axis of one process every layer is the plain one: no copy, no collective.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megafish.model.mesh import Axis
from megafish.model.shard import shard_of

# torch 2.13 renamed both; the old names warn.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b, each process with some rows of W and their columns of y.

    [tokens / T, in] -> [tokens, out / T]; without tensor parallelism [..., in] -> [..., out].
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, axis: Axis) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.axis = axis

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.axis.size == 1:
            return F.linear(x, self.weight, self.bias)
        out: torch.Tensor = _GatheredLinear.apply(x, self.weight, self.bias, self.axis)
        return out


class RowParallelLinear(nn.Module):
    """y = x W^T + b, each process with some columns of W and of x; b is whole everywhere.

    [..., in / T] -> [tokens / T, out]; without tensor parallelism [..., in] -> [..., out].
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, axis: Axis) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.axis = axis

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.axis.size == 1:
            return F.linear(x, self.weight, self.bias)
        y = sum_own_tokens(F.linear(x.flatten(0, -2), self.weight), self.axis)
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(nn.Module):
    """Token ids to vectors, each process with some ids' rows of weight [padded vocabulary, D].

    int64 [b, S] -> [tokens / T, D]; without tensor parallelism [b, S, D].
    """

    def __init__(self, weight: nn.Parameter, axis: Axis) -> None:
        super().__init__()
        self.weight = weight
        self.axis = axis
        self.first_id = first_id(weight)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.axis.size == 1:
            return F.embedding(tokens, self.weight)
        row = tokens.flatten() - self.first_id
        elsewhere = (row < 0) | (row >= self.weight.shape[0])
        vectors = F.embedding(row.masked_fill(elsewhere, 0), self.weight)
        return sum_own_tokens(vectors.masked_fill(elsewhere[:, None], 0.0), self.axis)


def first_id(weight: torch.Tensor) -> int:
    """Token id of the first row of a vocabulary-parallel weight."""
    shard = shard_of(weight)
    return 0 if shard is None else shard.ranges[0][0]


def sum_replicated_gradients(parameters: Iterable[nn.Parameter], axis: Axis) -> None:
    """Have the backward sum the gradients of those parameters that every process holds whole: norms, and biases of
    row-parallel layers.

    Each process's gradient is that of its own tokens (of its own heads, for norms of queries and keys). A hook on the
    parameter, because ZeRO reduces a gradient over the data-parallel processes as soon as it is there.
    """
    if axis.size == 1:
        return

    def add_up(gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
        dist.all_reduce(total, group=axis.group)
        return total.to(gradient.dtype)

    for parameter in parameters:
        if shard_of(parameter) is None:
            parameter.register_hook(add_up)


def gradient_norm(parameters: Iterable[nn.Parameter], axis: Axis) -> torch.Tensor:
    """L2 norm of all gradients, 0-d; of a sharded parameter all shards count, of a whole one a single copy."""
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = [parameter.grad for parameter in with_gradient if parameter.grad is not None]
    if axis.size == 1:
        return nn.utils.get_total_norm(gradients)
    sharded = [g for g, p in zip(gradients, with_gradient, strict=True) if shard_of(p) is not None]
    whole = [g for g, p in zip(gradients, with_gradient, strict=True) if shard_of(p) is None]
    squared = nn.utils.get_total_norm(sharded).square()
    dist.all_reduce(squared, group=axis.group)
    return (squared + nn.utils.get_total_norm(whole).square()).sqrt()


# -------------------------------------------------------------------------------------------------------- tensor axis


def sum_own_tokens(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Sum of x [tokens, D] over the axis, of which each process keeps its share: [tokens / T, D]."""
    out: torch.Tensor = _SumOwnTokens.apply(x, axis)
    return out


class _SumOwnTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        own, _ = _scatter(x, axis)
        return own

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        whole, _ = _gather(grad, ctx.axis)
        return whole, None


class _GatheredLinear(torch.autograd.Function):
    """Tokens gathered, then a linear layer. What is kept for the backward is this process's share of the tokens, which
    is gathered again; both exchanges of the backward run beside its products."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, axis: Axis) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.axis, ctx.has_bias = axis, bias is not None
        whole, _ = _gather(x, axis)
        return F.linear(whole, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        whole, gathering = _gather(x, ctx.axis, wait=False)
        d_whole = grad @ weight
        gathering.wait()
        d_x, scattering = _scatter(d_whole, ctx.axis, wait=False)
        d_weight = grad.t() @ whole
        d_bias = grad.sum(0) if ctx.has_bias else None
        scattering.wait()
        return d_x, d_weight, d_bias, None


def _gather(own: torch.Tensor, axis: Axis, *, wait: bool = True) -> tuple[torch.Tensor, Any]:
    """[n, D] of each process -> [T n, D]; with wait=False it is there once the second result's wait() returns."""
    whole = own.new_empty(axis.size * own.shape[0], *own.shape[1:])
    return whole, _all_gather(whole, own.contiguous(), group=axis.group, async_op=not wait)


def _scatter(whole: torch.Tensor, axis: Axis, *, wait: bool = True) -> tuple[torch.Tensor, Any]:
    """[T n, D], the sum of which over the axis is meant -> this process's [n, D] of the sum; `wait` as in _gather."""
    own = whole.new_empty(whole.shape[0] // axis.size, *whole.shape[1:])
    return own, _reduce_scatter(own, whole.contiguous(), group=axis.group, async_op=not wait)


# ------------------------------------------------------------------------------------------------------ sequence axis


def tokens_to_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, axis: Axis
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All heads of this process's tokens [b, S / P, H, d] -> all tokens of its share of the heads [b, S, H / P, d].

    One exchange for the three. Fewer key/value heads than processes are repeated, so that each process has the one that
    its queries share.
    """
    if axis.size == 1:
        return query, key, value
    kv_heads = key.shape[2]
    if kv_heads < axis.size:
        key, value = (x.repeat_interleave(axis.size // kv_heads, dim=2) for x in (key, value))
    by_process = [x.unflatten(2, (axis.size, -1)) for x in (query, key, value)]
    # [P, b, S / P, heads of that process, d]: to each process its heads; from each its tokens.
    got = _exchange(torch.cat(by_process, dim=3).movedim(2, 0), axis)
    whole = got.movedim(0, 1).flatten(1, 2)
    query, key, value = whole.split([x.shape[3] for x in by_process], dim=2)
    return query, key, value


def heads_to_tokens(mixed: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The way back, for the result of attention: [b, S, H / P, d] -> [b, S / P, H, d]."""
    if axis.size == 1:
        return mixed
    got = _exchange(mixed.unflatten(1, (axis.size, -1)).movedim(1, 0), axis)
    return got.movedim(0, 2).flatten(2, 3)


def _exchange(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """x[i] goes to process i of the axis; out[i] is what process i had for this one."""
    out: torch.Tensor = _Exchange.apply(x.contiguous(), axis)
    return out


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=axis.group)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # An exchange is its own transpose.
        back = torch.empty_like(grad, memory_format=torch.contiguous_format)
        dist.all_to_all_single(back, grad.contiguous(), group=ctx.axis.group)
        return back, None
