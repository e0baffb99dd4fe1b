"""The linear cross-entropy as autograd sees it: when the gradients are computed, what is kept until then.

Two ways, of which `loss.py` chooses. OnePass: for one number of the whole vocabulary in plain torch, the gradients are
computed in the forward, chunk by chunk, while a chunk's logits exist (6 n V D operations). TwoPass: the forward leaves
each row's log-sum-exp, and the backward computes the gradients from it. So it goes where the upstream gradients of the
rows are not known in the forward, where several ranks must agree on the log-sum-exp first, and in Triton.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megafish_kernels import torch_backend
from megafish_kernels.partials import RowLoss, merge, row_loss
from megafish_kernels.shard import Shard
from megafish_kernels.tiles import LossTiles, override
from megafish_kernels.torch_backend import Gradients, Options, Rows, reduction_dtype


@dataclass(frozen=True)
class Call:
    """What a call is beside its differentiable tensors."""

    options: Options
    targets: Tensor
    """int64 [n], ids of the whole vocabulary."""
    index: Tensor | None
    """integers [n]: the kept rows of the batch. None: all of them."""
    count: int | Tensor
    """How many of the n are kept tokens: all, n, or a 0-d int32 tensor that only the device has read."""
    size: int
    """Rows of the batch, dropped ones too."""
    row_weight: Tensor | None
    """[n] in the dtype of the reductions, 0 past the count."""
    scale: Tensor | None
    """0-d: multiplies the sum of the rows' losses. None: one loss a row."""
    grad_enabled: bool
    triton: bool = False
    tiles: LossTiles | None = None
    """Of an override around the call, for the backward too: autograd runs that in a thread of its own on a GPU."""
    shard: Shard | None = None
    main_grad: Tensor | None = None

    @property
    def function(self) -> type[OnePass] | type[TwoPass]:
        """The way that this call goes."""
        return OnePass if self.scale is not None and self.shard is None and not self.triton else TwoPass

    def shaped(self, values: Tensor, shape: torch.Size) -> Tensor:
        """Values of kept rows -> of all tokens, in the targets' shape, 0 (False) at the others; differentiable."""
        return spread(values, self.index, self.count, self.size).reshape(shape)

    def needs(self, ctx: Any) -> tuple[bool, bool, bool]:
        """Whether the gradient of hidden, weight, bias will be asked for."""
        wanted = ctx.needs_input_grad
        return (wanted[0] and self.grad_enabled, wanted[1] and self.grad_enabled, wanted[2] and self.grad_enabled)

    def reduced(self, done: RowLoss) -> Tensor:
        """Losses of rows [n] -> what the call returns: their weighted sum, scaled, or the weighted rows."""
        loss = done.loss if done.weight is None else done.loss * done.weight
        loss = loss if self.row_weight is None else loss * self.row_weight
        if self.scale is None:
            # Never the tensor of the rows itself, which may be the cross-entropy too: that one has no gradient.
            return loss.clone() if loss is done.loss else loss
        # Without any kept token the sum is an exact 0, whatever the scale (1/0, say) may be.
        total = loss.sum()
        if isinstance(self.count, Tensor):
            return torch.where(self.count > 0, total * self.scale, total)
        return total * self.scale if self.targets.shape[0] else total

    def handed_over(self, gradients: Gradients, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients in the dtype of their inputs, the weight's in main_grad where there is one."""
        weight = gradients.weight
        if self.main_grad is not None and weight is not None:
            self.main_grad.add_(weight)
            gradients = Gradients(gradients.hidden, None, gradients.bias)
        pairs = zip(gradients, inputs, strict=True)
        return (*(None if g is None or t is None else g.to(t.dtype) for g, t in pairs), None)


def spread(values: Tensor, index: Tensor | None, count: int | Tensor, size: int) -> Tensor:
    """Values of kept rows [n, ...] -> of all rows [size, ...], 0 (False) at the others; differentiable."""
    if index is None:
        return values
    place = index.long()
    if not isinstance(count, Tensor):
        return values.new_zeros(size, *values.shape[1:]).index_copy_(0, place, values)
    # What stands past the count goes to one more row, which is cut off.
    place = torch.where(torch.arange(place.shape[0], device=place.device) < count, place, size)
    return values.new_zeros(size + 1, *values.shape[1:]).index_copy_(0, place, values)[:size]


class OnePass(torch.autograd.Function):
    """Tensors in, (loss, cross_entropy, lse, entropy, correct) of the kept rows out; only the loss has a gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> tuple[Tensor | None, ...]:
        scale, needs = call.scale, call.needs(ctx)
        assert scale is not None
        # A scale that lies in the CPU's memory goes into the products for nothing; on another device reading it here
        # would wait for that device's queue, so it is multiplied in by the backward.
        # Nor does it go in for float16: the gradient of hidden is stored in that type before the upstream gradient, a
        # loss scale that is there to prevent just this, arrives, and 1e-6 of it would be rounded to nothing.
        early = scale.device.type == "cpu" and hidden.dtype != torch.float16
        alpha = float(scale) if early else None
        rows = Rows(hidden, call.targets, call.index, call.row_weight)
        with _no_autocast(hidden.device):
            done, gradients = torch_backend.sweep(
                rows, weight, bias, call.options, 1.0 if alpha is None else alpha, needs
            )
            loss = call.reduced(done)
        ctx.save_for_backward(hidden, weight, bias, call.targets, call.index, call.row_weight, scale)
        ctx.call, ctx.needs, ctx.alpha = call, needs, alpha
        ctx.ready = gradients
        return _outputs(ctx, loss, done)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, index, row_weight, scale = ctx.saved_tensors
        call: Call = ctx.call
        upstream = upstream.to(reduction_dtype(hidden.dtype))
        with _no_autocast(hidden.device):
            gradients, ctx.ready = ctx.ready, None
            alpha = ctx.alpha
            if gradients is None:
                # The first backward through a graph that was retained has handed its gradients over.
                rows = Rows(hidden, targets, index, row_weight)
                start = 1.0 if alpha is None else alpha
                gradients = torch_backend.sweep(rows, weight, bias, call.options, start, ctx.needs)[1]
            # Scaled in place and handed over, so that no second copy of the weight's gradient ever exists.
            late = upstream * scale if alpha is None else upstream
            if targets.shape[0] and not (late.device.type == "cpu" and float(late) == 1.0):
                for gradient in gradients:
                    if gradient is not None:
                        gradient.mul_(late)
        return call.handed_over(gradients, hidden, weight, bias)


class TwoPass(torch.autograd.Function):
    """As OnePass; hidden states of a sequence-sharded call are this rank's."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> tuple[Tensor | None, ...]:
        needs, shard = call.needs(ctx), call.shard
        with _no_autocast(hidden.device):
            full = hidden if shard is None else shard.gather_rows(hidden)
            taken = full if call.index is None else full.index_select(0, call.index)
            taken, weight = taken.contiguous(), weight.contiguous()
            done, logits = _rows(call, taken, weight, bias, any(needs))
            loss = call.reduced(done)
        ctx.save_for_backward(taken, weight, bias, call.targets, call.row_weight, call.scale, done.lse, done.weight)
        ctx.call, ctx.needs, ctx.logits = call, needs, logits
        return _outputs(ctx, loss, done)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        taken, weight, bias, targets, row_weight, scale, lse, focus = ctx.saved_tensors
        call: Call = ctx.call
        # Used up: a second backward through a retained graph computes all logits anew.
        logits, ctx.logits = ctx.logits, None
        with _no_autocast(taken.device):
            factors = upstream.to(lse.dtype)
            if scale is not None:
                factors = factors * scale
            factors = factors.expand(lse.shape) if row_weight is None else factors * row_weight
            factors = factors if focus is None else factors * focus
            local = targets if call.shard is None else targets - call.shard.offset
            if call.triton:
                from megafish_kernels import triton_loss

                kept = triton_loss.Kept(taken, local.int(), call.count)
                with override(call.tiles):
                    gradients = triton_loss.gradients(
                        kept, logits, weight, bias, call.options, lse, factors.contiguous(), ctx.needs, call.main_grad
                    )
            else:
                rows = Rows(taken, local, None, factors)
                gradients = torch_backend.gradients(rows, weight, bias, call.options, lse, ctx.needs)
            # Kept logits can be a gigabyte, which what follows may have.
            del logits
            grad_hidden = _whole(gradients.hidden, call, taken.dtype)
        gradients = Gradients(grad_hidden, gradients.weight, gradients.bias)
        return call.handed_over(gradients, taken, weight, bias)


def _no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Products in the dtypes that they are given; the meta device has no autocast to switch off."""
    return torch.autocast(device.type, enabled=False) if device.type != "meta" else nullcontext()


def _outputs(ctx: Any, loss: Tensor, done: RowLoss) -> tuple[Tensor | None, ...]:
    facts = (done.cross_entropy, done.lse, done.entropy, done.correct if ctx.call.options.stats else None)
    ctx.mark_non_differentiable(*(fact for fact in facts if fact is not None))
    return loss, *facts


def _rows(call: Call, taken: Tensor, weight: Tensor, bias: Tensor | None, need_gradient: bool) -> tuple[RowLoss, Any]:
    """Losses of the compacted rows, and the triton_loss.KeptLogits that the backward will use, if there are any."""
    options, shard, logits = call.options, call.shard, None
    offset = 0 if shard is None else shard.offset
    if call.triton:
        from megafish_kernels import triton_loss

        kept = triton_loss.Kept(taken, (call.targets - offset).int(), call.count)
        parts, logits = triton_loss.partials(kept, weight, bias, options, offset, need_gradient)
        figures = merge(parts, options.fields)
    elif shard is None:
        rows = Rows(taken, call.targets, None, None)
        return torch_backend.sweep(rows, weight, bias, options, 1.0, (False, False, False))[0], None
    else:
        rows = Rows(taken, call.targets - offset, None, None)
        figures = torch_backend.partials(rows, weight, bias, options, offset)
    if shard is not None:
        figures = merge(shard.gather_figures(figures), options.fields)
    done = row_loss(
        figures,
        options.fields,
        call.targets,
        vocab_size=options.vocab_size,
        label_smoothing=options.label_smoothing,
        z_loss=options.z_loss,
        entropy_power=options.entropy_weight,
    )
    if not isinstance(call.count, Tensor):
        return done, logits
    real = torch.arange(taken.shape[0], device=taken.device) < call.count

    def only_real(value: Tensor | None) -> Tensor | None:
        return None if value is None else torch.where(real, value, torch.zeros_like(value))

    facts = (done.loss, done.cross_entropy, done.lse, done.entropy, done.correct, done.weight)
    return RowLoss(*map(only_real, facts)), logits  # type: ignore[arg-type]


def _whole(gradient: Tensor | None, call: Call, dtype: torch.dtype) -> Tensor | None:
    """The gradient of the compacted hidden states, this rank's share of it -> that of the hidden states as given."""
    if gradient is None:
        return None
    shard = call.shard
    if shard is not None and shard.sequence_sharded:
        return shard.add_up_own(spread(gradient, call.index, call.count, call.size).contiguous()).to(dtype)
    if shard is not None:
        # Compacted and in fp32: dropped rows are not sent.
        shard.add_up(gradient)
    return spread(gradient.to(dtype), call.index, call.count, call.size)
