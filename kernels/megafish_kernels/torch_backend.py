"""The linear cross-entropy in plain torch: any device, and the backend of a run on CPUs.

The kept tokens are worked off in chunks of rows. A chunk's logits live in one buffer that is used again by every chunk
and that its softmax and then its gradient overwrite in place, so that the memory does not grow with the number of
tokens. Where the upstream gradient is one number the gradients are computed right there (`sweep`: 6 n V D
floating-point operations for n kept tokens); otherwise logits are computed a second time (`gradients`: 8 n V D in all).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megafish_kernels.partials import LOWEST, Fields, RowLoss, entropy_weight

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
    """Ids of the whole vocabulary, over which smoothing is spread."""
    columns: int
    """Rows of this weight that are real: those from here on are padding. Equal to vocab_size unless the weight is one
    rank's shard of the vocabulary."""
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    logits_bytes: int | None = None
    stats: bool = False
    """Entropy and accuracy are wanted, which cost passes of their own."""
    entropy_weight: tuple[float, float] | None = None
    """(sigma, gamma): (sigma + entropy)^gamma multiplies a row's loss, as a constant."""
    dtype: torch.dtype = torch.float32
    """Of sums and losses."""

    @property
    def fields(self) -> Fields:
        """The figures that a part of the vocabulary has to give."""
        return Fields(self.label_smoothing > 0, self.entropy)

    @property
    def entropy(self) -> bool:
        """Whether the entropy is needed."""
        return self.stats or self.entropy_weight is not None


@dataclass(frozen=True)
class Rows:
    """The kept tokens: the i-th is row index[i] of the flattened batch (i itself where index is None)."""

    hidden: Tensor
    """[N, D], all tokens, dropped ones too."""
    targets: Tensor
    """int64 [n], rows of the weight; outside it for a token whose target lies in another rank's shard."""
    index: Tensor | None
    """integers [n]"""
    factor: Tensor | None
    """float [n], by which a row's gradient is multiplied; None for 1."""


@dataclass(frozen=True)
class Gradients:
    """Where asked for: of hidden [N, D] in its own dtype; of weight [V, D] and bias [V] in that of the reductions."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    def __iter__(self) -> Iterator[Tensor | None]:
        return iter((self.hidden, self.weight, self.bias))


def reduction_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and losses: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunk_rows(rows: int, columns: int, dtype: torch.dtype, logits_bytes: int | None) -> int:
    """Rows of each chunk: near the wanted size, and spread evenly, so that no small chunk is left at the end."""
    if logits_bytes is not None:
        wanted = max(1, logits_bytes // (columns * dtype.itemsize))
    else:
        sums = reduction_dtype(dtype)
        fewest = _CHUNK_ROWS if dtype == sums else _LOW_CHUNK_ROWS
        wanted = max(fewest, _CHUNK_BYTES // (columns * sums.itemsize))
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

    def __init__(self, hidden: Tensor, options: Options) -> None:
        self.options = options
        self.dtype = reduction_dtype(hidden.dtype)
        self.block = max(1, _BLOCK_BYTES // (max(options.columns, 1) * self.dtype.itemsize))
        if hidden.device.type != "cpu":
            self.block = 2**31
        self.wide: Tensor | None = None

    def blocks(self, product: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows of the product, their part of it, its logits in the dtype of the reductions)."""
        for begin in range(0, len(product), self.block):
            some = slice(begin, min(begin + self.block, len(product)))
            given = product[some]
            yield some, given, given if given.dtype == self.dtype else self._widened(given)

    def _widened(self, given: Tensor) -> Tensor:
        if self.wide is None or len(self.wide) < len(given):
            self.wide = torch.empty_like(given, dtype=self.dtype)
        return self.wide[: len(given)].copy_(given)

    def cap(self, logits: Tensor, need_gradient: bool) -> Tensor | None:
        """Apply the softcap in place; returns its derivative where there is one and it is needed."""
        cap = self.options.softcap
        if cap is None:
            return None
        logits.div_(cap).tanh_()
        slope = logits.square().neg_().add_(1.0) if need_gradient else None
        logits.mul_(cap)
        return slope

    def figures(self, out: Tensor, logits: Tensor, target: Tensor, offset: int) -> None:
        """Write the figures of `partials` [F, n] for rows of logits [n, V] (overwritten); target [n, 1]."""
        fields = self.options.fields
        self.cap(logits, False)
        # A bias of -inf bans an id: differences of two of these are NaN.
        logits.clamp_(min=LOWEST)
        inside = (target >= 0) & (target < self.options.columns)
        picked = logits.gather(1, torch.where(inside, target, 0))
        out[fields.target] = torch.where(inside, picked, 0)[:, 0]
        if fields.smoothing:
            out[fields.total] = logits.sum(dim=1)
        if fields.stats:
            out[fields.best] = logits.argmax(dim=1) + offset
        top = out[fields.maximum] = logits.amax(dim=1)
        logits.sub_(top[:, None])
        weights = logits.exp() if fields.stats else logits.exp_()
        out[fields.sum_exp] = weights.sum(dim=1)
        if fields.stats:
            out[fields.moment] = weights.mul_(logits).sum(dim=1)

    def gradient(
        self,
        given: Tensor,
        probability: Tensor,
        lse: Tensor | None,
        target: Tensor,
        slope: Tensor | None,
        factor: Tensor | None,
    ) -> None:
        """Turn probabilities [n, V] into the gradient of the rows' losses by their logits, in `given`'s memory.

        target [n, 1]; lse [n], for the z-loss; slope [n, V], of the softcap; factor [n, 1] multiplies the gradient.
        """
        options, smooth = self.options, self.options.label_smoothing
        if options.z_loss:
            assert lse is not None
            probability.mul_((1 + 2 * options.z_loss * lse)[:, None])
        if smooth:
            probability.sub_(smooth / options.vocab_size)
        if options.columns == options.vocab_size:
            probability.scatter_(1, target, probability.gather(1, target) - (1 - smooth))
        else:
            inside = (target >= 0) & (target < options.columns)
            # Out of this shard: 0 is added to its first column.
            step = torch.where(inside, smooth - 1.0, 0.0).to(probability.dtype)
            probability.scatter_add_(1, torch.where(inside, target, 0), step)
        if slope is not None:
            probability.mul_(slope)
        if factor is not None:
            probability.mul_(factor)
        if probability is not given:
            # Rounded once, after the factor: the products that follow add in fp32 and round their result once.
            given.copy_(probability)


@dataclass(frozen=True)
class _Chunk:
    part: slice
    """Which of the kept rows."""
    taken: Tensor
    """[n + padding, D], their hidden states."""
    padded: Tensor
    """[n + padding, V]: logits, which become their gradient in place."""
    target: Tensor
    """[n, 1]"""

    @property
    def product(self) -> Tensor:
        """[n, V], without the padding."""
        return self.padded[: len(self.target)]


class _Chunks:
    """The kept rows a chunk at a time: their logits, and what the logits' gradient adds to the inputs' gradients.

    alpha * factor multiplies the gradients; `needs`: whether that of hidden, weight, bias is wanted; `wide`: that of
    hidden in the dtype of the reductions, not in its own.
    """

    def __init__(
        self,
        rows: Rows,
        weight: Tensor,
        bias: Tensor | None,
        options: Options,
        alpha: float = 1.0,
        needs: tuple[bool, bool, bool] = (False, False, False),
        wide: bool = False,
    ) -> None:
        self.rows, self.options, self.alpha = rows, options, alpha * options.logit_scale
        hidden, columns = rows.hidden, options.columns
        self.dtype = reduction_dtype(hidden.dtype)
        self.low, self.on_cpu = hidden.dtype != self.dtype, hidden.device.type == "cpu"
        self.weight = weight[:columns]
        self.shift = None if bias is None else bias[:columns] * options.logit_scale
        count = rows.targets.shape[0]
        need_hidden, need_weight, need_bias = needs
        grad_hidden = None
        if need_hidden:
            make = torch.empty_like if rows.index is None and count else torch.zeros_like
            grad_hidden = make(hidden, dtype=self.dtype if wide else hidden.dtype)
        grad_weight = torch.empty_like(weight, dtype=self.dtype) if need_weight else None
        if grad_weight is not None:
            grad_weight[columns if count else 0 :].zero_()
        grad_bias = weight.new_zeros(weight.shape[0], dtype=self.dtype) if need_bias else None
        self.gradients = Gradients(grad_hidden, grad_weight, grad_bias)

    def __iter__(self) -> Iterator[_Chunk]:
        rows, options = self.rows, self.options
        hidden, count = rows.hidden, rows.targets.shape[0]
        size = chunk_rows(count, options.columns, hidden.dtype, options.logits_bytes)
        buffer = hidden.new_empty(padded_rows(size, hidden.dtype) if self.on_cpu else size, options.columns)
        for begin in range(0, count, size or 1):
            part = slice(begin, min(begin + size, count))
            target = rows.targets[part, None]
            taken = hidden[part] if rows.index is None else hidden.index_select(0, rows.index[part])
            padding = padded_rows(len(target), hidden.dtype) - len(target) if self.on_cpu else 0
            if padding:
                taken = F.pad(taken, (0, 0, 0, padding))
            padded = buffer[: len(taken)]
            scaled = taken if options.logit_scale == 1.0 else taken * options.logit_scale
            if self.shift is None:
                torch.mm(scaled, self.weight.t(), out=padded)
            else:
                torch.addmm(self.shift, scaled, self.weight.t(), out=padded)
            yield _Chunk(part, taken, padded, target)

    def factor(self, chunk: _Chunk) -> Tensor | None:
        """The factor [n, 1] of a chunk's rows. In a low dtype it goes into the logits' gradient before that is rounded;
        otherwise it costs less in the products' other side (`add`)."""
        return None if self.rows.factor is None else self.rows.factor[chunk.part, None]

    def add(self, chunk: _Chunk, factor: Tensor | None) -> None:
        """Add up the gradients that follow from the gradient of the logits, which now stands in their place; factor
        [n, 1], unless it is in there."""
        rows, alpha, columns, part = self.rows, self.alpha, self.options.columns, chunk.part
        padded, product, taken = chunk.padded, chunk.product, chunk.taken
        if self.low:
            factor = None
        if self.low:
            padded[len(product) :].zero_()
        grad_hidden, grad_weight, grad_bias = self.gradients
        if grad_hidden is not None:
            step = torch.mm(padded, self.weight)[: len(product)].to(self.dtype).mul_(alpha)
            if factor is not None:
                step.mul_(factor)
            if rows.index is None:
                grad_hidden[part] = step
            else:
                grad_hidden.index_copy_(0, rows.index[part].long(), step.to(grad_hidden.dtype))
        if grad_weight is not None:
            total, first = grad_weight[:columns], part.start == 0
            if not self.low:
                weighted = taken if factor is None else taken * factor
                torch.addmm(total, product.t(), weighted, beta=0.0 if first else 1.0, alpha=alpha, out=total)
            elif first:
                torch.mul(torch.mm(padded.t(), taken), alpha, out=total)
            else:
                total.add_(torch.mm(padded.t(), taken), alpha=alpha)
        if grad_bias is not None:
            ones = grad_bias.new_ones(len(product)) if factor is None else factor[:, 0]
            grad_bias[:columns].addmv_(product.to(self.dtype).t(), ones, alpha=alpha)


def sweep(
    rows: Rows, weight: Tensor, bias: Tensor | None, options: Options, alpha: float, needs: tuple[bool, bool, bool]
) -> tuple[RowLoss, Gradients]:
    """One pass over the chunks: losses of every row, and the gradients of sum(alpha * factor * loss) in `needs`.

    For a weight that is the whole vocabulary: each row's softmax is known as soon as its logits are.
    """
    hidden, count = rows.hidden, rows.targets.shape[0]
    chunks, work = _Chunks(rows, weight, bias, options, alpha, needs), _RowWork(hidden, options)
    loss, cross_entropy, lse = (hidden.new_empty(count, dtype=work.dtype) for _ in range(3))
    entropy = hidden.new_empty(count, dtype=work.dtype) if options.entropy else None
    correct = hidden.new_empty(count, dtype=torch.bool) if options.stats else None
    focus = hidden.new_empty(count, dtype=work.dtype) if options.entropy_weight is not None else None
    smooth, need_any = options.label_smoothing, any(needs)
    for chunk in chunks:
        factor = chunks.factor(chunk)
        if focus is not None:
            ones = hidden.new_ones(len(chunk.target), 1, dtype=work.dtype)
            factor = ones if factor is None else factor.clone()
        for some, given, logits in work.blocks(chunk.product):
            place = slice(chunk.part.start + some.start, chunk.part.start + some.stop)
            target = chunk.target[some]
            slope = work.cap(logits, need_any)
            at_target = logits.gather(1, target)[:, 0]
            mean = logits.mean(dim=1) if smooth else None
            if correct is not None:
                torch.eq(logits.argmax(dim=1), target[:, 0], out=correct[place])
            below = None if entropy is None else logits - logits.amax(dim=1)[:, None]
            top, log_sum = _softmax_(logits)
            torch.add(top, log_sum, out=lse[place])
            row = torch.add(top - at_target, log_sum, out=cross_entropy[place])
            if entropy is not None and below is not None:
                # -sum of p log p, without a logarithm an element; what a bias of -inf bans is 0 * a finite number.
                mean_below = torch.linalg.vecdot(logits, below.clamp_(min=LOWEST))
                torch.sub(log_sum, mean_below, out=entropy[place])
                if focus is not None and factor is not None and options.entropy_weight is not None:
                    focus[place] = entropy_weight(entropy[place], *options.entropy_weight)
                    factor[some, 0] *= focus[place]
            if mean is not None:
                row = (1 - smooth) * row + smooth * (top - mean + log_sum)
            if options.z_loss:
                row = row + options.z_loss * lse[place].square()
            loss[place] = row
            if need_any:
                early = factor[some] if chunks.low and factor is not None else None
                work.gradient(given, logits, lse[place], target, slope, early)
        if need_any:
            chunks.add(chunk, factor)
    return RowLoss(loss, cross_entropy, lse, entropy, correct, focus), chunks.gradients


def partials(rows: Rows, weight: Tensor, bias: Tensor | None, options: Options, offset: int) -> Tensor:
    """[F, n] figures of every row over this weight's part of the vocabulary, whose first id is `offset`."""
    work, count = _RowWork(rows.hidden, options), rows.targets.shape[0]
    out = rows.hidden.new_zeros(options.fields.count, count, dtype=work.dtype)
    if options.columns == 0:
        out[options.fields.maximum] = LOWEST
        return out
    for chunk in _Chunks(rows, weight, bias, options):
        for some, _, logits in work.blocks(chunk.product):
            place = slice(chunk.part.start + some.start, chunk.part.start + some.stop)
            work.figures(out[:, place], logits, chunk.target[some], offset)
    return out


def gradients(
    rows: Rows, weight: Tensor, bias: Tensor | None, options: Options, lse: Tensor, needs: tuple[bool, bool, bool]
) -> Gradients:
    """The gradients of sum(factor * loss) in `needs`, with the log-sum-exp [n] of the whole vocabulary known.

    That of hidden is in the dtype of the reductions: this part's share, to be added up over the vocabulary's parts.
    """
    chunks = _Chunks(rows, weight, bias, options, 1.0, needs, wide=True)
    if options.columns == 0:
        return Gradients(*(None if g is None else g.zero_() for g in chunks.gradients))
    work = _RowWork(rows.hidden, options)
    for chunk in chunks:
        factor = chunks.factor(chunk)
        for some, given, logits in work.blocks(chunk.product):
            place = slice(chunk.part.start + some.start, chunk.part.start + some.stop)
            slope = work.cap(logits, True)
            logits.sub_(lse[place, None]).exp_()
            early = factor[some] if chunks.low and factor is not None else None
            work.gradient(given, logits, lse[place], chunk.target[some], slope, early)
        chunks.add(chunk, factor)
    return chunks.gradients
