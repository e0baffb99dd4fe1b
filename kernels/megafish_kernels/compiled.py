"""The linear cross-entropy under torch.compile: one operator of fixed shapes, which the compiler does not look into.

How many rows are kept, and thus the shapes inside, depends on the targets' values; the operator's own inputs and
outputs are those of the whole batch. For one number the gradients are computed in the forward and scaled by the
backward; for one loss a token, and in float16 (whose loss scale comes with the upstream gradient and has to go in
first), a second operator computes forward and gradients anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megafish_kernels.autograd import Call
from megafish_kernels.rows import KeptRows, kept_weights
from megafish_kernels.torch_backend import Options, reduction_dtype


class _Flags(NamedTuple):
    """Travels as bool[]."""

    needs_hidden: bool
    needs_weight: bool
    needs_bias: bool
    per_token: bool
    deferred: bool
    """Gradients are computed in the backward."""
    stats: bool
    entropy: bool
    triton: bool

    @property
    def needs(self) -> tuple[bool, bool, bool]:
        return self[:3]


class _Context:
    """What OnePass and TwoPass write to, when it is not autograd that calls them."""

    def __init__(self, needs: tuple[bool, bool, bool]) -> None:
        self.needs_input_grad = (*needs, False)
        self.saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        pass


def _call(
    hidden: Tensor,
    targets: Tensor,
    token_weight: Tensor | None,
    drop: Tensor | None,
    index: Tensor | None,
    count: Tensor | None,
    per_token: bool,
    flags: _Flags,
    scalars: Sequence[float],
    vocab_size: int,
    ignore_index: int,
    logits_bytes: int | None,
) -> Call:
    from megafish_kernels.loss import make_call

    z_loss, label_smoothing, softcap, logit_scale, sigma, gamma = scalars
    options = Options(
        vocab_size=vocab_size,
        columns=vocab_size,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
        softcap=softcap or None,
        logit_scale=logit_scale,
        logits_bytes=logits_bytes,
        stats=flags.stats,
        entropy_weight=(sigma, gamma) if gamma else None,
        dtype=reduction_dtype(hidden.dtype),
    )
    rows = None if index is None else KeptRows(index, index.shape[0] if count is None else count)
    reduction = "none" if per_token else "sum"
    with torch.enable_grad():  # `needs` says what is wanted
        return make_call(targets, token_weight, drop, rows, ignore_index, reduction, None, options, flags.triton)


def _like(needs: Sequence[bool], found: Sequence[Tensor | None], hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; an operator returns tensors, so that those not needed are empty ones."""
    given = [
        hidden.new_empty(0) if gradient is None or not need else gradient
        for gradient, need in zip(found, needs, strict=True)
    ]
    return given[0], given[1], given[2]


@torch.library.custom_op("megafish::linear_cross_entropy", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    token_weight: Tensor | None,
    drop: Tensor | None,
    index: Tensor | None,
    count: Tensor | None,
    flags: Sequence[bool],
    scalars: Sequence[float],
    vocab_size: int,
    ignore_index: int,
    logits_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    flag = _Flags(*flags)
    tensors = (hidden, targets, token_weight, drop, index, count)
    call = _call(*tensors, flag.per_token, flag, scalars, vocab_size, ignore_index, logits_bytes)
    needs = (False, False, False) if flag.deferred else flag.needs
    context: Any = _Context(needs)
    flat = hidden.reshape(-1, hidden.shape[-1])
    loss, *facts = call.function.forward(context, flat, weight, bias, call)
    assert loss is not None
    gradients: Sequence[Tensor | None] = (None, None, None)
    if any(needs):
        own, *others = call.function.backward(context, torch.ones_like(loss))[:3]
        gradients = (None if own is None else own.reshape(hidden.shape), *others)
    cross_entropy, lse, entropy, correct = (
        loss.new_empty(0) if fact is None else call.shaped(fact, targets.shape) for fact in facts
    )
    if flag.per_token:
        loss = call.shaped(loss, targets.shape)
    return loss, cross_entropy, lse, entropy, correct, *_like(needs, gradients, hidden)


@_forward.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    flag, dtype, shape = _Flags(*others[4]), reduction_dtype(hidden.dtype), targets.shape
    loss = hidden.new_empty(shape if flag.per_token else (), dtype=dtype)
    cross_entropy, lse = hidden.new_empty(shape, dtype=dtype), hidden.new_empty(shape, dtype=dtype)
    entropy = hidden.new_empty(shape if flag.entropy else (0,), dtype=dtype)
    correct = hidden.new_empty(shape, dtype=torch.bool) if flag.stats else hidden.new_empty(0, dtype=dtype)
    needs = (False, False, False) if flag.deferred else flag.needs
    return loss, cross_entropy, lse, entropy, correct, *_fake_gradients(needs, hidden, weight, bias)


@torch.library.custom_op("megafish::linear_cross_entropy_backward", mutates_args=())
def _backward(
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    token_weight: Tensor | None,
    drop: Tensor | None,
    index: Tensor | None,
    count: Tensor | None,
    flags: Sequence[bool],
    scalars: Sequence[float],
    vocab_size: int,
    ignore_index: int,
    logits_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    flag = _Flags(*flags)
    tensors = (hidden, targets, token_weight, drop, index, count)
    call = _call(*tensors, True, flag, scalars, vocab_size, ignore_index, logits_bytes)
    context: Any = _Context(flag.needs)
    call.function.forward(context, hidden.reshape(-1, hidden.shape[-1]), weight, bias, call)
    rows = upstream.reshape(-1) if flag.per_token else upstream.expand(call.size)
    kept = rows if call.index is None else rows.index_select(0, call.index)
    own, *others = call.function.backward(context, kept)[:3]
    return _like(flag.needs, (None if own is None else own.reshape(hidden.shape), *others), hidden)


@_backward.register_fake
def _(
    upstream: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_gradients(_Flags(*others[5]).needs, hidden, weight, bias)


def _fake_gradients(
    needs: Sequence[bool], hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(needs, [None if t is None else t.new_empty(t.shape) for t in (hidden, weight, bias)], hidden)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.flags = _Flags(*inputs[8])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    if ctx.flags.deferred:
        ctx.save_for_backward(*inputs[:8])
        ctx.settings = inputs[8:]
    else:
        ctx.save_for_backward(*output[5:])


def _gradients(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if upstream is None:
        return (None,) * 13
    if ctx.flags.deferred:
        found = _backward(upstream, *ctx.saved_tensors, *ctx.settings)
    else:
        found = [(gradient * upstream).to(gradient.dtype) for gradient in ctx.saved_tensors]
    given = (gradient if need else None for gradient, need in zip(found, ctx.flags.needs, strict=True))
    return (*given, *(None,) * 10)


_forward.register_autograd(_gradients, setup_context=_setup)


def run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    token_weight: Tensor | None,
    drop: Tensor | None,
    rows: KeptRows | None,
    ignore_index: int,
    reduction: str,
    denominator: float | Tensor | None,
    options: Options,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(loss, cross_entropy, lse, entropy, correct), all but a scalar loss in the shape of the targets."""
    grad, per_token = torch.is_grad_enabled(), reduction == "none"
    needs = [grad and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)]
    deferred = per_token or hidden.dtype == torch.float16
    flags = [*needs, per_token, deferred, options.stats, options.entropy, triton]
    scalars = [options.z_loss, options.label_smoothing, options.softcap or 0.0, options.logit_scale]
    scalars += options.entropy_weight or (0.0, 0.0)
    index, count = (None, None) if rows is None else rows
    loss, cross_entropy, lse, entropy, correct, *_ = _forward(
        hidden,
        weight,
        bias,
        targets,
        None if token_weight is None else token_weight.detach(),
        drop,
        index,
        count if isinstance(count, Tensor) else None,
        flags,
        scalars,
        options.vocab_size,
        ignore_index,
        options.logits_bytes,
    )
    if reduction == "mean":
        if denominator is None:
            denominator = kept_weights(targets, token_weight, drop, rows, ignore_index, loss.dtype).sum()
        if isinstance(denominator, Tensor):
            # Without a kept token the loss and its gradients are 0, and not 0 / 0.
            denominator = denominator + ((denominator == 0) & (loss.detach() == 0))
        loss = loss / denominator
    return loss, cross_entropy, lse, entropy if options.entropy else None, correct if options.stats else None
