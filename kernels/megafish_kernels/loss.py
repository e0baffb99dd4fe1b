"""The loss of a language model's head, from hidden states to a number, without the logits of all tokens in memory."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megafish_kernels import compiled
from megafish_kernels.autograd import Call
from megafish_kernels.backends import Backend, takes_triton
from megafish_kernels.checks import (
    check_companions,
    check_entropy_weight,
    check_ids,
    check_kinds,
    check_options,
    check_rows,
    check_tensors,
    integer,
)
from megafish_kernels.partials import entropy_weight as weight_of_entropy
from megafish_kernels.rows import KeptRows, compact_rows, kept_weights
from megafish_kernels.shard import Shard, own_columns
from megafish_kernels.tiles import overriding
from megafish_kernels.torch_backend import Options, reduction_dtype


class LossStats(NamedTuple):
    """Per-token facts about the predictions, detached, shaped like the targets, 0 (False) at tokens left out."""

    lse: Tensor
    """Log-sum-exp of the logits, fp32 (float64 for float64 hidden states)."""
    entropy: Tensor | None
    """Entropy of the prediction in nats, in the dtype of lse; None with return_stats="loss" and no entropy_weight."""
    correct: Tensor | None
    """bool: the target has the highest logit, or is the first of those that share it; None with return_stats="loss"."""
    cross_entropy: Tensor
    """-log p(target) in nats, in the dtype of lse: without weight, z-loss and label smoothing."""
    dropped: Tensor | None = None
    """The same of the tokens that `drop` left out, 0 at all others; None unless audit_dropped."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    drop: Tensor | None = None,
    rows: KeptRows | None = None,
    denominator: float | Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    entropy_weight: tuple[float, float] | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    sequence_sharded: bool = False,
    main_grad: Tensor | None = None,
    logits_bytes: int | None = None,
    backend: Backend = "auto",
    return_stats: bool | Literal["loss"] = False,
    audit_dropped: bool = False,
) -> Tensor | tuple[Tensor, LossStats]:
    """Cross-entropy of softcap(logit_scale * (hidden @ weight.T + bias)) with `targets`.

    Tokens that are left out are taken out before any product, so that a token that the goldfish mask drops costs the
    head nothing, forward or backward. Sums and losses are fp32 (float64 for float64 hidden states), and so is the
    adding up of gradients. Deterministic on one machine and number of threads.

    Backends. "triton" (CUDA; fp32, fp16, bf16) takes its figures from fp32 logits in registers, rounds their gradient
    once to the dtype of the hidden states, and never waits for the device: the number of kept tokens stays there.
    "torch" (any device) rounds logits and their gradient to that dtype between the products, and its host reads the
    number of kept tokens. "auto": triton on CUDA where it is installed and takes the dtype, torch elsewhere.

    Args:
        hidden: [..., D] float32, bfloat16, float16 or float64.
        weight: [V, D] in the same dtype. Under autocast both are cast to autocast's dtype.
        targets: [...] integers in [0, vocab_size), or `ignore_index`.
        bias: [V] in the dtype of weight.
        token_weight: [...] multiplies each token's loss; 0 leaves the token out, as `ignore_index` does. A constant: it
            gets no gradient.
        ignore_index: the target of tokens that are left out.
        drop: bool [...]; True leaves the token out too (`goldfish_drop`).
        rows: the kept rows of the flattened batch, where the caller has them (`goldfish_keep`, `compact_rows`), instead
            of drop and ignore_index. With an int as its count the host knows the shapes, and the products of the Triton
            backend are the BLAS library's, which are the faster ones.
        denominator: what "mean" divides by: the sum of the weights of the whole global batch, a number or a 0-d tensor
            of integers or fp32, which the host does not read. Default: the sum of the weights of this call's kept
            tokens.
        reduction: "mean", "sum", or "none" for the loss of each token, 0 where left out.
        z_loss: coefficient of lse^2, added to each token's loss before its weight (PaLM, arXiv 2204.02311, section 5).
        label_smoothing: a of (1 - a) * onehot + a / vocab_size as the target's distribution.
        entropy_weight: (sigma, gamma) multiplies each token's loss, with its z-loss and smoothing, by
            (sigma + entropy)^gamma, where the entropy [nats] is that of its prediction and gets no gradient: tokens
            that are hard to learn count more (MiLe, arXiv 2310.19531, section 3). "mean" divides by the sum of these
            weights then, unless there is a denominator.
        softcap: logits become softcap * tanh(logits / softcap) (Gemma 2, arXiv 2408.00118, section 2).
        logit_scale: multiplies the logits, before the softcap.
        vocab_size: ids of the whole vocabulary; rows of weight past it are padding, take no part and get no gradient.
            Default: the rows of weight. At most 2^24.
        group: vocabulary-parallel ranks, each of which has the ids from its vocab_start on as rows of its weight (and
            bias); together these make up the vocabulary, in shards of any sizes. All ranks call with the same tokens
            and get the same loss and the whole gradient of hidden. One collective forward, one backward.
        vocab_start: id of this rank's first row of weight.
        sequence_sharded: each rank's hidden has its part of the tokens alone, equal parts of the first dimension in the
            order of ranks, and gets the gradient of that; targets are those of all tokens. One more collective forward.
        main_grad: fp32 [V, D], to which the weight's gradient is added in the backward; the weight then gets none.
        logits_bytes: bytes that logits may take at one time. torch: rows of a chunk (default: 16 MiB or 256 tokens, 512
            in half precision, whichever is more). triton: logits that the forward keeps, so that the backward need not
            compute them anew, and a slab for those that it does (default: 1 GiB; at least 128 columns).
        backend: "auto", "torch" or "triton".
        return_stats: True returns LossStats too; "loss" only those of its fields that cost nothing.
        audit_dropped: LossStats have the loss of the tokens that `drop` left out as well: a forward for these alone.

    Returns:
        The loss, a 0-d tensor in the dtype of the sums ([...] with "none"), or (loss, LossStats). With no kept token
        it is 0, and so are its gradients.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit each other, or a target is out of range. Values are
            looked at on the CPU alone; on CUDA a target out of range stops the device with an assertion.
    """
    check_kinds(
        rows,
        hidden=hidden,
        weight=weight,
        targets=targets,
        bias=bias,
        token_weight=token_weight,
        drop=drop,
        main_grad=main_grad,
    )
    ignore_index = integer("ignore_index", ignore_index)
    check_options(denominator, reduction, z_loss, label_smoothing, softcap, logit_scale, logits_bytes, return_stats)
    check_entropy_weight(entropy_weight)
    if audit_dropped and (drop is None or not return_stats):
        raise ValueError("audit_dropped: asks for the loss of dropped tokens: give drop and return_stats")
    if vocab_size is None:
        if group is not None:
            raise ValueError("vocab_size: needed with a group, whose ranks hold parts of the vocabulary")
        vocab_size = weight.shape[0] if weight.dim() == 2 else 0
    vocab_size, shard = integer("vocab_size", vocab_size), None
    if group is not None:
        if vocab_start < 0:
            raise ValueError(f"vocab_start: {vocab_start} must be at least 0")
        shard = Shard(group, vocab_start, sequence_sharded)
    elif vocab_start or sequence_sharded:
        raise ValueError("vocab_start, sequence_sharded: mean nothing without a group")
    check_tensors(hidden, weight, targets, bias, shard)
    check_companions(weight, targets, token_weight, drop, rows, main_grad)
    # 2^24: ids stand among fp32 figures (partials.Fields.best), and offsets within a tile have 32 bits.
    most = 2**24 if shard is not None else min(weight.shape[0], 2**24)
    if not 1 <= vocab_size <= most:
        bound = "2^24" if most == 2**24 else f"the {most} rows of weight"
        raise ValueError(f"vocab_size: {vocab_size} must be at least 1 and at most {bound}")

    device = hidden.device
    # torch.amp.is_autocast_available says the same, but torch.compile traces it from torch 2.12 on alone.
    autocast = device.type != "meta" and torch.is_autocast_enabled(device.type)
    if autocast and hidden.dtype != torch.float64:
        compute = torch.get_autocast_dtype(device.type)
        hidden, weight = hidden.to(compute), weight.to(compute)
        bias = None if bias is None else bias.to(compute)
    elif hidden.dtype != weight.dtype:
        raise ValueError(f"weight: dtype {weight.dtype} must be that of hidden, {hidden.dtype}")
    if bias is not None and bias.dtype != weight.dtype:
        raise ValueError(f"bias: dtype {bias.dtype} must be that of weight, {weight.dtype}")
    use_triton = takes_triton(backend, hidden)

    options = Options(
        vocab_size=vocab_size,
        columns=own_columns(vocab_size, vocab_start, weight.shape[0]),
        z_loss=z_loss,
        label_smoothing=label_smoothing,
        softcap=softcap,
        logit_scale=logit_scale,
        logits_bytes=logits_bytes,
        stats=return_stats is True,
        entropy_weight=entropy_weight,
        dtype=reduction_dtype(hidden.dtype),
    )
    # The sum of these weights is known after the sum of the losses.
    own_mean = entropy_weight is not None and reduction == "mean" and denominator is None
    inner = "sum" if own_mean else reduction
    selection = (targets, token_weight, drop, rows, ignore_index, inner, denominator, options, use_triton)
    if torch.compiler.is_compiling():
        if shard is not None or main_grad is not None:
            # Tracing ends here, and the call is made outside the graph.
            raise ValueError("group, main_grad: not within torch.compile's graph")
        loss, *facts = compiled.run(hidden, weight, bias, *selection)
    else:
        call = make_call(*selection, shard, main_grad)
        outputs = call.function.apply(hidden.reshape(-1, hidden.shape[-1]), weight, bias, call)
        loss = call.shaped(outputs[0], targets.shape) if reduction == "none" else outputs[0]
        facts = [None if fact is None else call.shaped(fact, targets.shape) for fact in outputs[1:]]
    if own_mean:
        assert facts[2] is not None and entropy_weight is not None
        weights = weight_of_entropy(facts[2], *entropy_weight)
        kept = kept_weights(targets, token_weight, drop, rows, ignore_index, weights.dtype)
        total = (weights * kept).sum()
        loss = loss / torch.where(total > 0, total, 1)
    if not return_stats:
        return loss
    dropped = None
    if audit_dropped:
        assert drop is not None
        dropped_targets = targets.masked_fill(~drop, ignore_index)
        with torch.no_grad():
            others = linear_cross_entropy(
                hidden,
                weight,
                dropped_targets,
                bias=bias,
                ignore_index=ignore_index,
                reduction="none",
                softcap=softcap,
                logit_scale=logit_scale,
                vocab_size=vocab_size,
                group=group,
                vocab_start=vocab_start,
                sequence_sharded=sequence_sharded,
                logits_bytes=logits_bytes,
                backend=backend,
            )
        assert isinstance(others, Tensor)
        dropped = others
    cross_entropy, lse, entropy, correct = facts
    assert cross_entropy is not None and lse is not None
    return loss, LossStats(lse, entropy, correct, cross_entropy, dropped)


def make_call(
    targets: Tensor,
    token_weight: Tensor | None,
    drop: Tensor | None,
    rows: KeptRows | None,
    ignore_index: int,
    reduction: str,
    denominator: float | Tensor | None,
    options: Options,
    triton: bool,
    shard: Shard | None = None,
    main_grad: Tensor | None = None,
) -> Call:
    """The kept rows, their targets and weights, and the scale of their sum; arguments as in linear_cross_entropy."""
    dtype = options.dtype
    flat = targets.reshape(-1).long()
    weights = None if token_weight is None else token_weight.detach().reshape(-1).to(dtype)
    if rows is not None:
        check_rows(rows, flat.shape[0])
    index, count = _kept_rows(flat, weights, ignore_index, drop, rows, triton)
    kept = flat if index is None else flat.index_select(0, index)
    kept_weights = weights if index is None or weights is None else weights.index_select(0, index)
    if isinstance(count, Tensor):
        real = torch.arange(kept.shape[0], device=kept.device) < count
        kept = torch.where(real, kept, 0)
        kept_weights = real.to(dtype) if kept_weights is None else torch.where(real, kept_weights, 0)
    check_ids(kept, options.vocab_size)
    scale: Tensor | None = None
    if reduction == "sum":
        scale = torch.ones((), dtype=dtype)
    elif reduction == "mean":
        if denominator is not None:
            total = torch.as_tensor(denominator).detach()
        elif kept_weights is not None:
            total = kept_weights.sum()
        else:
            total = torch.tensor(float(kept.shape[0]))
        scale = total.to(dtype).reciprocal()
    return Call(
        options=options,
        targets=kept,
        index=index,
        count=count,
        size=flat.shape[0],
        row_weight=kept_weights,
        scale=scale,
        grad_enabled=torch.is_grad_enabled(),
        triton=triton,
        tiles=overriding(),
        shard=shard,
        main_grad=main_grad,
    )


def _kept_rows(
    flat: Tensor,
    weights: Tensor | None,
    ignore_index: int,
    drop: Tensor | None,
    rows: KeptRows | None,
    use_triton: bool,
) -> tuple[Tensor | None, int | Tensor]:
    """(index [n] of the kept rows, None for all; their count): n itself, or on the device."""
    if rows is None:
        keep = flat != ignore_index
        if weights is not None:
            keep &= weights != 0
        if drop is not None:
            keep &= ~drop.reshape(-1)
        found = keep.nonzero()[:, 0] if not use_triton else None
        rows = compact_rows(keep) if found is None else KeptRows(found, found.shape[0])
    index, count = rows
    if isinstance(count, Tensor) and not use_triton:
        count = int(count)
        index = index[:count]
    if isinstance(count, Tensor):
        return index, count
    return (None if count == flat.shape[0] else index), count
