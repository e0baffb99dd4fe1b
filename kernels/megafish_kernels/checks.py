"""Refusals of `linear_cross_entropy`: one line each, before any work."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megafish_kernels.goldfish import whole
from megafish_kernels.rows import KeptRows
from megafish_kernels.shard import Shard


def check_ids(kept: Tensor, vocab_size: int) -> None:
    """Targets of kept tokens lie in the vocabulary."""
    if kept.device.type == "cpu":
        if kept.numel() and (int(kept.min()) < 0 or int(kept.max()) >= vocab_size):
            wrong = kept[(kept < 0) | (kept >= vocab_size)][0]
            raise ValueError(f"targets: id {int(wrong)} is outside the vocabulary of {vocab_size}")
    elif kept.device.type == "cuda":
        torch._assert_async(((kept >= 0) & (kept < vocab_size)).all(), "targets: an id is outside the vocabulary")


def check_rows(rows: KeptRows, size: int) -> None:
    """Kept rows are rows of the batch, each named once: of one named twice a gradient would be lost."""
    if rows.index.device.type != "cpu":
        return
    kept = rows.index[: int(rows.count)]
    if not kept.numel():
        return
    if int(kept.min()) < 0 or int(kept.max()) >= size:
        wrong = kept[(kept < 0) | (kept >= size)][0]
        raise ValueError(f"rows: {int(wrong)} is no row of the batch, which has {size}")
    named = torch.bincount(kept)
    if int(named.max()) > 1:
        raise ValueError(f"rows: row {int(named.argmax())} is named {int(named.max())} times")


def integer(name: str, value: Any) -> int:
    """As it is if it is an int (torch.compile's symbols are), else `whole`."""
    return value if isinstance(value, int) else whole(name, value)


def check_kinds(rows: KeptRows | None, **tensors: Tensor | None) -> None:
    """Refuse what is no tensor where one is expected."""
    for name, tensor in tensors.items():
        if tensor is not None and not isinstance(tensor, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if rows is not None and not isinstance(rows, KeptRows):
        raise ValueError(f"rows: expected KeptRows, got {type(rows).__name__}")


def check_options(
    denominator: float | Tensor | None,
    reduction: str,
    z_loss: float,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    logits_bytes: int | None,
    return_stats: bool | str,
) -> None:
    """Refuse numbers out of their range, NaN among them, and words that are not known."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: {reduction!r} is not one of mean, sum, none")
    if denominator is not None and reduction != "mean":
        raise ValueError(f'denominator: goes with reduction "mean" alone, got {reduction!r}')
    if isinstance(denominator, Tensor) and denominator.dim() != 0:
        raise ValueError(f"denominator: expected a 0-d tensor, got shape {tuple(denominator.shape)}")
    if isinstance(denominator, Tensor) and denominator.dtype in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"denominator: {denominator.dtype} rounds a count of tokens; give an integer or fp32 (FSDP's mixed "
            "precision casts the floating-point arguments of a forward, but no integers)"
        )
    if denominator is not None and not isinstance(denominator, Tensor) and not denominator > 0:
        raise ValueError(f"denominator: {denominator} must be above 0")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss: {z_loss} must be a number of at least 0")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing: {label_smoothing} must be at least 0 and below 1")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap: {softcap} must be a number above 0; None for no cap")
    if not -math.inf < logit_scale < math.inf:
        raise ValueError(f"logit_scale: {logit_scale} must be a number")
    if logits_bytes is not None and integer("logits_bytes", logits_bytes) < 1:
        raise ValueError(f"logits_bytes: {logits_bytes} must be at least 1")
    # Not `in`: 1 is equal to True, and would be taken for neither of them further on.
    if not isinstance(return_stats, bool) and return_stats != "loss":
        raise ValueError(f'return_stats: {return_stats!r} is not one of False, True, "loss"')


def check_entropy_weight(given: tuple[float, float] | None) -> None:
    """Refuse what is not (sigma, gamma)."""
    if given is None:
        return
    if not isinstance(given, tuple) or len(given) != 2 or not all(0 <= number < math.inf for number in given):
        raise ValueError(f"entropy_weight: {given!r} must be (sigma, gamma), two numbers of at least 0")
    if not given[1]:
        raise ValueError("entropy_weight: gamma 0 weighs all tokens alike; None for that")


def check_tensors(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, shard: Shard | None) -> None:
    """Refuse shapes, dtypes and devices of the call's own tensors that do not fit each other."""
    for name, tensor in (("weight", weight), ("bias", bias), ("hidden", hidden), ("targets", targets)):
        # For isinstance torch.distributed.tensor would have to be imported, which takes a second or two.
        if tensor is not None and hasattr(tensor, "device_mesh"):
            raise ValueError(
                f"{name}: is a DTensor, of which this process holds a part. FSDP gathers a parameter around the "
                "forward of the module that owns it: call this there, as LinearCrossEntropyHead does"
            )
    if weight.dim() != 2 or (weight.shape[0] > 0 and weight.shape[1] == 0):
        raise ValueError(
            f"weight: expected [V, D], got shape {tuple(weight.shape)} (ZeRO-3 and FSDP gather a parameter around the "
            "forward of the module that owns it: call this there, as LinearCrossEntropyHead does)"
        )
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden: expected [..., {weight.shape[1]}] as weight has it, got {tuple(hidden.shape)}")
    if not hidden.is_floating_point():
        raise ValueError(f"hidden: expected a floating-point dtype, got {hidden.dtype}")
    tokens = tuple(hidden.shape[:-1])
    if shard is not None and shard.sequence_sharded:
        if not tokens:
            raise ValueError("hidden: sequence_sharded needs a dimension of tokens")
        tokens = (tokens[0] * shard.size, *tokens[1:])
    if tuple(targets.shape) != tokens:
        raise ValueError(f"targets: expected shape {tokens}, got {tuple(targets.shape)}")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets: expected integers, got {targets.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("targets", targets), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name}: lies on {tensor.device}, but hidden on {hidden.device}")


def check_companions(
    weight: Tensor,
    targets: Tensor,
    token_weight: Tensor | None,
    drop: Tensor | None,
    rows: KeptRows | None,
    main_grad: Tensor | None,
) -> None:
    """Refuse optional tensors that do not fit those of the call, or one another."""
    for name, tensor in (("token_weight", token_weight), ("drop", drop)):
        if tensor is not None and tensor.shape != targets.shape:
            raise ValueError(f"{name}: expected shape {tuple(targets.shape)}, got {tuple(tensor.shape)}")
    if drop is not None and drop.dtype != torch.bool:
        raise ValueError(f"drop: expected bool, got {drop.dtype}")
    if rows is not None:
        if drop is not None:
            raise ValueError("rows: say already which tokens are kept; leave drop out")
        if rows.index.dim() != 1 or rows.index.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"rows: expected an index int32 [N], got {rows.index.dtype} {tuple(rows.index.shape)}")
        if not isinstance(rows.count, Tensor) and rows.count != rows.index.shape[0]:
            raise ValueError(f"rows: the count {rows.count} must be the {rows.index.shape[0]} entries of the index")
        if isinstance(rows.count, Tensor) and (rows.count.dim() != 0 or rows.count.dtype != torch.int32):
            raise ValueError(
                f"rows: expected a count int32 and 0-d, got {rows.count.dtype} {tuple(rows.count.shape)}; compact_rows "
                "makes it from a mask"
            )
    if main_grad is not None:
        if main_grad.shape != weight.shape or main_grad.dtype != torch.float32:
            raise ValueError(
                f"main_grad: expected fp32 {tuple(weight.shape)}, got {main_grad.dtype} {tuple(main_grad.shape)}"
            )
        if not main_grad.is_contiguous():
            raise ValueError("main_grad: must be contiguous")
    found = () if rows is None else tuple(("rows", tensor) for tensor in rows if isinstance(tensor, Tensor))
    for name, tensor in (("token_weight", token_weight), ("drop", drop), ("main_grad", main_grad), *found):
        if tensor is not None and tensor.device != weight.device:
            raise ValueError(f"{name}: lies on {tensor.device}, but hidden on {weight.device}")
