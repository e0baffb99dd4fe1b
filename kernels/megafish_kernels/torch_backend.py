"""The linear cross-entropy in plain torch: any device, and the backend of a run on CPUs.

The kept tokens are worked off in chunks of rows. A chunk's logits live in one buffer that is used again by every chunk
and that its softmax and then its gradient overwrite in place, so that the memory does not grow with the number of
tokens. For a loss that is one number the gradients are computed right there, in the forward (6 n V D floating-point
operations for n kept tokens); for one loss a token, whose upstream gradient is not known yet, the backward computes the
logits anew (8 n V D).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Bytes of the logits buffer and fewest rows of a chunk if the caller names no size. Fewer rows starve the products,
# which then read the weight and its gradient from memory once a chunk for too little work.
_CHUNK_BYTES = 16 * 2**20
_CHUNK_ROWS = 256
# In half precision every chunk also rounds its part of the weight's gradient and adds it up in a pass of its own.
_LOW_CHUNK_ROWS = 512
# Bytes of the logits that a CPU works on at a time between the products, about what its second-level cache holds.
_BLOCK_BYTES = 4 * 2**20
# oneDNN, which multiplies bfloat16 and float16 on CPUs, compiles its code anew for every number of rows that it meets
# (5 to 20 ms each time). The mask leaves another number of rows in every batch: rounded up to a multiple of this, it
# meets few.
_LOW_ROWS = 64


@dataclass(frozen=True)
class Options:
    """What the loss is, beside its tensors (see `linear_cross_entropy`)."""

    vocab_size: int
    """Columns that are real: the weight's rows from here on are padding."""
    z_loss: float
    label_smoothing: float
    softcap: float | None
    logit_scale: float
    chunk_tokens: int | None
    stats: bool
    """Entropy and accuracy are wanted, which cost passes of their own."""


@dataclass(frozen=True)
class Rows:
    """The kept tokens: the i-th is row index[i] of the flattened batch (i itself where index is None)."""

    hidden: Tensor
    """[N, D], all tokens, dropped ones too."""
    targets: Tensor
    """int64 [n]"""
    index: Tensor | None
    """int64 [n]"""
    factor: Tensor | None
    """float [n], by which a row's gradient is multiplied; None for 1."""


@dataclass(frozen=True)
class Sweep:
    """What one pass over the chunks gives, each [n] and in the dtype of the reductions; gradients where asked for."""

    loss: Tensor
    """With smoothing and z-loss, not weighted."""
    cross_entropy: Tensor
    lse: Tensor
    entropy: Tensor | None
    correct: Tensor | None
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None]
    """Of hidden [N, D] in its own dtype; of weight [V, D] and bias [V] in the dtype of the reductions."""


def reduction_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and losses: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunk_rows(rows: int, vocab_size: int, dtype: torch.dtype, chunk_tokens: int | None) -> int:
    """Rows of each chunk: near the wanted size, and spread evenly, so that no small chunk is left at the end."""
    sums = reduction_dtype(dtype)
    fewest = _CHUNK_ROWS if dtype == sums else _LOW_CHUNK_ROWS
    wanted = chunk_tokens or max(fewest, _CHUNK_BYTES // (vocab_size * sums.itemsize))
    chunks = -(-rows // wanted)
    return -(-rows // max(chunks, 1))


def padded_rows(rows: int, dtype: torch.dtype) -> int:
    """Rows that a product over `rows` tokens in this dtype gets on a CPU: the same, or a few more."""
    if dtype not in (torch.bfloat16, torch.float16):
        return rows
    return -(-rows // _LOW_ROWS) * _LOW_ROWS


def _softmax_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of every row, in place; also each row's maximum, and the log of the sum of exp(logit - maximum)."""
    top = logits.amax(dim=1)
    if logits.device.type == "cpu":
        # One fused kernel a row, which stays in the cache. The largest probability is exp(0) over the sum.
        torch.softmax(logits, dim=1, out=logits)
        return top, -logits.amax(dim=1).log()
    logits.sub_(top[:, None]).exp_()
    total = logits.sum(dim=1)
    logits.div_(total[:, None])
    return top, total.log()


class _RowWork:
    """What is done to the logits of each row: its losses, and the gradient in the logits' place.

    On a CPU a few rows at a time, which stay in the cache from the first pass over them to the last; the products want
    many more rows at a time.
    """

    def __init__(self, hidden: Tensor, count: int, options: Options, need_gradient: bool) -> None:
        self.options, self.need_gradient = options, need_gradient
        self.dtype = reduction_dtype(hidden.dtype)
        self.block = max(1, _BLOCK_BYTES // (options.vocab_size * self.dtype.itemsize))
        if hidden.device.type != "cpu":
            self.block = max(1, count)
        self.wide: Tensor | None = None
        self.loss, self.cross_entropy, self.lse = (hidden.new_empty(count, dtype=self.dtype) for _ in range(3))
        self.entropy = hidden.new_empty(count, dtype=self.dtype) if options.stats else None
        self.correct = hidden.new_empty(count, dtype=torch.bool) if options.stats else None

    def run(self, part: slice, product: Tensor, target: Tensor, factor: Tensor | None) -> None:
        """Rows `part` of all: product [n, V], logits that become the gradient; target [n, 1]; factor [n, 1] multiplies
        the gradient."""
        for begin in range(0, len(product), self.block):
            some = slice(begin, begin + self.block)
            given = product[some]
            logits = given if given.dtype == self.dtype else self._widened(given)
            place = slice(part.start + begin, part.start + begin + len(given))
            self._rows(place, logits, target[some])
            if not self.need_gradient:
                continue
            if factor is not None:
                logits.mul_(factor[some])
            if logits is not given:
                # Rounded once, after the factor: the products that follow add in fp32 and round their result once.
                given.copy_(logits)

    def _widened(self, given: Tensor) -> Tensor:
        if self.wide is None or len(self.wide) < len(given):
            self.wide = torch.empty_like(given, dtype=self.dtype)
        return self.wide[: len(given)].copy_(given)

    def _rows(self, place: slice, logits: Tensor, target: Tensor) -> None:
        options, smooth, cap = self.options, self.options.label_smoothing, self.options.softcap
        slope = None
        if cap is not None:
            logits.div_(cap).tanh_()
            slope = logits.square().neg_().add_(1.0) if self.need_gradient else None
            logits.mul_(cap)

        at_target = logits.gather(1, target)[:, 0]
        mean = logits.mean(dim=1) if smooth else None
        if self.correct is not None:
            torch.eq(logits.argmax(dim=1), target[:, 0], out=self.correct[place])
        top, log_sum = _softmax_(logits)
        lse = torch.add(top, log_sum, out=self.lse[place])
        row_loss = torch.add(top - at_target, log_sum, out=self.cross_entropy[place])
        if self.entropy is not None:
            torch.sum(torch.special.entr(logits), dim=1, out=self.entropy[place])
        if mean is not None:
            row_loss = (1 - smooth) * row_loss + smooth * (top - mean + log_sum)
        if options.z_loss:
            row_loss = row_loss + options.z_loss * lse.square()
        self.loss[place] = row_loss
        if not self.need_gradient:
            return

        # From here on the logits' memory holds the gradient of the row's loss by its logits.
        if options.z_loss:
            logits.mul_((1 + 2 * options.z_loss * lse)[:, None])
        if smooth:
            logits.sub_(smooth / options.vocab_size)
        logits.scatter_(1, target, logits.gather(1, target) - (1 - smooth))
        if slope is not None:
            logits.mul_(slope)


def sweep(
    rows: Rows, weight: Tensor, bias: Tensor | None, options: Options, alpha: float, needs: tuple[bool, bool, bool]
) -> Sweep:
    """One pass over the chunks: losses of every row, and the gradients of sum(alpha * factor * loss) in `needs`.

    Args:
        weight: [V, D] in the dtype of the hidden states.
        bias: [V] or None.
        needs: whether the gradient of hidden, weight, bias is wanted.
    """
    hidden, targets, index, factor = rows.hidden, rows.targets, rows.index, rows.factor
    count, vocab = targets.shape[0], options.vocab_size
    dtype = reduction_dtype(hidden.dtype)
    low, on_cpu = hidden.dtype != dtype, hidden.device.type == "cpu"
    need_hidden, need_weight, need_bias = needs
    need_any = need_hidden or need_weight or need_bias
    columns = weight[:vocab]
    shift = None if bias is None else bias[:vocab] * options.logit_scale
    alpha = alpha * options.logit_scale

    size = chunk_rows(count, vocab, hidden.dtype, options.chunk_tokens)
    buffer = hidden.new_empty(padded_rows(size, hidden.dtype) if on_cpu else size, vocab)
    work = _RowWork(hidden, count, options, need_any)
    grad_hidden = None
    if need_hidden:
        grad_hidden = torch.empty_like(hidden) if index is None and count else torch.zeros_like(hidden)
    grad_weight = torch.empty_like(weight, dtype=dtype) if need_weight else None
    grad_bias = weight.new_zeros(weight.shape[0], dtype=dtype) if need_bias else None
    if grad_weight is not None:
        grad_weight[vocab if count else 0 :].zero_()

    for begin in range(0, count, size or 1):
        part = slice(begin, min(begin + size, count))
        target = targets[part, None]
        taken = hidden[part] if index is None else hidden.index_select(0, index[part])
        padding = padded_rows(len(target), hidden.dtype) - len(target) if on_cpu else 0
        if padding:
            taken = F.pad(taken, (0, 0, 0, padding))
        # The buffer with all rows of the products, and with those of tokens.
        padded = buffer[: len(taken)]
        product = padded[: len(target)]

        scaled = taken if options.logit_scale == 1.0 else taken * options.logit_scale
        if shift is None:
            torch.mm(scaled, columns.t(), out=padded)
        else:
            torch.addmm(shift, scaled, columns.t(), out=padded)
        # A low dtype is rounded after the rows' factors are in; otherwise they cost less in the products' other side.
        row_factor = None if factor is None else factor[part, None]
        work.run(part, product, target, row_factor if low else None)
        if not need_any:
            continue
        if low:
            padded[len(target) :].zero_()
            row_factor = None
        first = begin == 0
        if grad_hidden is not None:
            step = torch.mm(padded, columns)[: len(target)].to(dtype).mul_(alpha)
            if row_factor is not None:
                step.mul_(row_factor)
            if index is None:
                grad_hidden[part] = step
            else:
                grad_hidden.index_copy_(0, index[part], step.to(hidden.dtype))
        if grad_weight is not None:
            total = grad_weight[:vocab]
            if not low:
                weighted = taken if row_factor is None else taken * row_factor
                torch.addmm(total, product.t(), weighted, beta=0.0 if first else 1.0, alpha=alpha, out=total)
            elif first:
                torch.mul(torch.mm(padded.t(), taken), alpha, out=total)
            else:
                total.add_(torch.mm(padded.t(), taken), alpha=alpha)
        if grad_bias is not None:
            ones = work.loss.new_ones(len(target)) if row_factor is None else row_factor[:, 0]
            grad_bias[:vocab].addmv_(product.to(dtype).t(), ones, alpha=alpha)
    gradients = (grad_hidden, grad_weight, grad_bias)
    return Sweep(work.loss, work.cross_entropy, work.lse, work.entropy, work.correct, gradients)


class LinearCrossEntropy(torch.autograd.Function):
    """Tensors in, (loss, cross_entropy, lse, entropy, correct) of the kept rows out; only the loss has a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        index: Tensor | None,
        row_weight: Tensor | None,
        scale: Tensor | None,
        options: Options,
        grad_enabled: bool,
    ) -> tuple[Tensor | None, ...]:
        """`scale` is a 0-d tensor that multiplies the sum of the rows' losses; None keeps one loss a row."""
        wanted = ctx.needs_input_grad
        needs = (wanted[0] and grad_enabled, wanted[1] and grad_enabled, wanted[2] and grad_enabled)
        rows = Rows(hidden, targets, index, row_weight)
        # A scale that lies in the CPU's memory goes into the products for nothing; on another device reading it here
        # would wait for that device's queue, so it is multiplied in by the backward.
        # Nor does it go in for float16: the gradient of hidden is stored in that type before the upstream gradient, a
        # loss scale that is there to prevent just this, arrives, and 1e-6 of it would be rounded to nothing.
        early = scale is not None and scale.device.type == "cpu" and hidden.dtype != torch.float16
        alpha = float(scale) if scale is not None and early else None
        with torch.autocast(hidden.device.type, enabled=False):
            now = needs if scale is not None else (False, False, False)
            done = sweep(rows, weight, bias, options, 1.0 if alpha is None else alpha, now)
            loss = done.loss if row_weight is None else done.loss * row_weight
            if scale is not None:
                # Without any kept token the sum is an exact 0, whatever the scale (1/0, say) may be.
                loss = loss.sum() * scale if targets.shape[0] else loss.sum()
        ctx.save_for_backward(hidden, weight, bias, targets, index, row_weight, scale)
        ctx.options, ctx.needs, ctx.alpha = options, needs, alpha
        ctx.ready = done.gradients if scale is not None else None
        others = [t for t in (done.cross_entropy, done.lse, done.entropy, done.correct) if t is not None]
        ctx.mark_non_differentiable(*others)
        return loss, done.cross_entropy, done.lse, done.entropy, done.correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, index, row_weight, scale = ctx.saved_tensors
        dtype = reduction_dtype(hidden.dtype)
        upstream = upstream.to(dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            if scale is None:
                factor = upstream if row_weight is None else upstream * row_weight
                rows = Rows(hidden, targets, index, factor)
                grads = sweep(rows, weight, bias, ctx.options, 1.0, ctx.needs).gradients
            else:
                grads, ctx.ready = ctx.ready, None
                alpha = ctx.alpha
                if grads is None:
                    # The first backward through a graph that was retained has handed its gradients over.
                    rows = Rows(hidden, targets, index, row_weight)
                    grads = sweep(rows, weight, bias, ctx.options, 1.0 if alpha is None else alpha, ctx.needs).gradients
                # Scaled in place and handed over, so that no second copy of the weight's gradient ever exists.
                late = upstream * scale if alpha is None else upstream
                if targets.shape[0] and not (late.device.type == "cpu" and float(late) == 1.0):
                    for grad in grads:
                        if grad is not None:
                            grad.mul_(late)
        like = (hidden, weight, bias)
        cast = [None if g is None or t is None else g.to(t.dtype) for g, t in zip(grads, like, strict=True)]
        return (*cast, None, None, None, None, None, None)
