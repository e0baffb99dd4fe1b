"""Triton kernels of the goldfish mask (scheme goldfish-v1) and of the index of kept rows.

A program works on a block of consecutive tokens of the batch, in row-major order. Each token's window is summed
directly, h products that stop at the start of its document: no scan, no scratch memory, nothing to reset between
documents. The hash's coefficients are computed where they are used, from the seed alone: two multiplications each, no
table to copy to the device, to cache, or to keep alive through a CUDA graph.

The index of kept rows comes from each block's count, written by the kernel that made the mask, a prefix sum over these
counts, and a kernel in which each block puts its rows in their places: deterministic, without atomics.
"""

# Kernels' arguments are the compiler's own values, which have no useful Python types.
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megafish_kernels import goldfish
from megafish_kernels.triton_runtime import launch

# Tokens of one program, one a thread: more threads hide the latency of loads better than more tokens in each do, and
# the coefficients, the same for all tokens of a warp, run on its scalar unit.
_BLOCK = 256
_WARPS = 8
# Windows up to this are unrolled whole; a wider one by twos: by fours or eights, ptxas spills some variants of it.
_UNROLLED = tl.constexpr(16)

_GOLDEN = tl.constexpr(goldfish.GOLDEN)
_MIX_1 = tl.constexpr(goldfish.MIX_1)
_MIX_2 = tl.constexpr(goldfish.MIX_2)
_TWO_32 = tl.constexpr(2**32)


@triton.jit
def _mix(state):
    """splitmix64's finaliser on uint64."""
    state = (state ^ (state >> 30)) * _MIX_1
    state = (state ^ (state >> 27)) * _MIX_2
    return state ^ (state >> 31)


@triton.jit
def _same_document(inside, column, at, back, BY_POSITION: tl.constexpr):
    """Whether the token `back` before lies in the row and in the document, given that the one after it does."""
    inside = inside & (column >= back)
    if at is not None:
        mark = tl.load(at - (back - 1), mask=inside, other=0)
        inside = inside & ((mark != 0) if BY_POSITION else (mark == 0))
    return inside


_RUNTIME_INTEGERS = [
    "tokens_row",
    "ids_row",
    "marks_row",
    "positions_row",
    "ks_row",
    "ks_column",
    "targets_row",
    "total",
    "span",
    "lead",
    "halo",
    "min_context",
    "last",
    "vocabulary",
    "seed_low",
    "seed_high",
    "ignore_index",
]


# The integers are not specialized: a batch of another shape, another seed or k starts the kernel that is there.
@triton.jit(do_not_specialize=_RUNTIME_INTEGERS)
def goldfish_kernel(
    out,
    counts,
    tokens,
    ids,
    marks,
    positions,
    ks,
    exempt,
    targets,
    tokens_row,
    ids_row,
    marks_row,
    positions_row,
    ks_row,
    ks_column,
    targets_row,
    total,
    span,
    lead,
    halo,
    min_context,
    last,
    vocabulary,
    seed_low,
    seed_high,
    ignore_index,
    FIRST: tl.constexpr,
    REACH: tl.constexpr,
    BY_POSITION: tl.constexpr,
    DEFAULT_CONTEXT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[total]: dropped, or with `targets` kept, for the columns lead ... lead + span - 1 of each row.

    tokens: what is hashed; ids: what `exempt` is asked about; marks: document starts, or positions (BY_POSITION);
    ks: k of each token, else `last` is floor(2^32 / k) - 1, which an int32 holds for every k >= 2.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    valid = start + lane < total
    # One 64-bit division a program; a token's own is of 32 bits.
    first_row = start // span
    within = (start - first_row * span).to(tl.int32) + lane
    row = first_row + within // span
    column = within % span + lead

    token_at = tokens + row * tokens_row + column
    mark_at = None
    if marks is not None:
        mark_at = marks + row * marks_row + column

    state = (seed_high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | seed_low.to(tl.uint32, bitcast=True)
    state += _GOLDEN
    key = tl.zeros([BLOCK], tl.uint64) + _mix(state)
    # Outside the document the id is read as -1, and so the term of c * (id + 1) is 0.
    inside = valid
    if FIRST == 0:
        state += _GOLDEN
        token = tl.load(token_at, mask=inside, other=-1).to(tl.int64)
        key += _mix(state) * (token + 1).to(tl.uint64)
    if REACH <= _UNROLLED:
        for back in tl.static_range(1, REACH + 1):
            state += _GOLDEN
            inside = _same_document(inside, column, mark_at, back, BY_POSITION)
            token = tl.load(token_at - back, mask=inside, other=-1).to(tl.int64)
            key += _mix(state) * (token + 1).to(tl.uint64)
    else:
        for back in tl.range(1, REACH + 1, loop_unroll_factor=2):
            state += _GOLDEN
            inside = _same_document(inside, column, mark_at, back, BY_POSITION)
            token = tl.load(token_at - back, mask=inside, other=-1).to(tl.int64)
            key += _mix(state) * (token + 1).to(tl.uint64)

    upper = key >> 32
    if ks is not None:
        # upper < floor(2^32 / k) if and only if (upper + 1) * k <= 2^32: a product instead of a 64-bit division. With
        # k <= 2^32 the left side less 1 stays within uint64. k = 0 drops nothing, nor does a k above 2^32.
        k = tl.load(ks + row * ks_row + column.to(tl.int64) * ks_column, mask=valid, other=0).to(tl.int64)
        wide = k.to(tl.uint64)
        drop = (k >= 2) & (k <= _TWO_32) & (upper * wide + (wide - 1) < _TWO_32)
    else:
        drop = upper.to(tl.int64) <= last

    if positions is not None:
        drop = drop & (tl.load(positions + row * positions_row + column, mask=valid, other=0) >= min_context)
    elif DEFAULT_CONTEXT:
        drop = drop & inside
    else:
        enough = valid & (column >= min_context)
        if marks is not None:
            for back in range(1, min_context + 1):
                enough = _same_document(enough, column, mark_at, back, BY_POSITION)
        drop = drop & enough
    drop = drop & (column >= halo)
    if exempt is not None:
        own = tl.load(ids + row * ids_row + column, mask=valid, other=0).to(tl.int64)
        # An id outside the table reads nothing.
        known = valid & (own >= 0) & (own < vocabulary)
        drop = drop & (tl.load(exempt + own, mask=known, other=0) == 0)

    if targets is not None:
        target = tl.load(targets + row * targets_row + (column - lead), mask=valid, other=0).to(tl.int64)
        keep = valid & (drop == 0) & (target != ignore_index)
        tl.store(out + start + lane, keep.to(tl.uint8), mask=valid)
        tl.store(counts + tl.program_id(0), tl.sum(keep.to(tl.int32)))
    else:
        tl.store(out + start + lane, drop.to(tl.uint8), mask=valid)


@triton.jit(do_not_specialize=["total"])
def count_kernel(counts, keep, total, BLOCK: tl.constexpr):
    """counts[p]: rows kept in block p."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kept = tl.load(keep + row, mask=row < total, other=0) != 0
    tl.store(counts + tl.program_id(0), tl.sum(kept.to(tl.int32)))


@triton.jit(do_not_specialize=["total"])
def scatter_kernel(index, count, keep, ends, total, BLOCK: tl.constexpr):
    """Each row to its place: the kept ones in order, and behind them, as 0, the others.

    ends[p]: rows kept in blocks 0 ... p.
    """
    block = tl.program_id(0)
    row = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = row < total
    kept = (tl.load(keep + row, mask=valid, other=0) != 0).to(tl.int32)
    everything = tl.load(ends + tl.num_programs(0) - 1)
    before = tl.load(ends + block - 1, mask=block > 0, other=0) + tl.cumsum(kept, 0) - kept
    place = tl.where(kept != 0, before, everything + row - before)
    tl.store(index + place, tl.where(kept != 0, row, 0).to(tl.int32), mask=valid)
    tl.store(count, everything, mask=block == 0)


def drop(tokens: Tensor, **options: Any) -> Tensor:
    """bool like `tokens`: True where dropped. `options` are those of `_start`."""
    out = torch.empty(tokens.shape, dtype=torch.bool, device=tokens.device)
    _start(out, None, tokens, None, 0, **options)
    return out


def keep(tokens: Tensor, targets: Tensor, ignore_index: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(bool like `targets`: True where kept, index and count of KeptRows)."""
    out = torch.empty(targets.shape, dtype=torch.bool, device=targets.device)
    counts = torch.empty(triton.cdiv(out.numel(), _BLOCK), dtype=torch.int32, device=out.device)
    _start(out, counts, tokens, targets, ignore_index, **options)
    return out, *_scatter(out, counts)


def compact(keep: Tensor) -> tuple[Tensor, Tensor]:
    """(index, count) of KeptRows for a bool tensor that is not empty."""
    keep = keep.contiguous()
    blocks = triton.cdiv(keep.numel(), _BLOCK)
    counts = torch.empty(blocks, dtype=torch.int32, device=keep.device)
    launch(count_kernel, (blocks,), counts, keep.view(torch.uint8), keep.numel(), BLOCK=_BLOCK, num_warps=_WARPS)
    return _scatter(keep, counts)


def _scatter(keep: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    ends = counts.cumsum(0, dtype=torch.int32)
    index = torch.empty(keep.numel(), dtype=torch.int32, device=keep.device)
    count = torch.empty((), dtype=torch.int32, device=keep.device)
    mask = keep.view(torch.uint8)
    launch(scatter_kernel, (len(counts),), index, count, mask, ends, keep.numel(), BLOCK=_BLOCK, num_warps=_WARPS)
    return index, count


def _start(
    out: Tensor,
    counts: Tensor | None,
    tokens: Tensor,
    targets: Tensor | None,
    ignore_index: int,
    *,
    k: int | Tensor,
    h: int,
    seed: int,
    first: int,
    min_context: int,
    starts: Tensor | None,
    exempt: Tensor | None,
    canonical: Tensor | None,
    halo: int,
    positions: Tensor | None,
) -> None:
    """Start the mask's kernel for the last columns of `tokens`, as many as `out` has. Nothing here is empty."""
    n, span = tokens.shape[-1], out.shape[-1]
    reach = h - 1 + first
    marks = starts if starts is not None else positions
    ids = _loadable(tokens)
    # One look-up a token here, instead of one for each of the h windows that it is part of.
    hashed = ids if canonical is None else _loadable(canonical)[ids]
    ks = k.expand(tokens.shape).reshape(-1, n) if isinstance(k, Tensor) else None
    token_rows, id_rows = _rows(hashed), _rows(ids if exempt is not None else None)
    mark_rows, position_rows = _rows(marks), _rows(positions)
    target_rows = _rows(None if targets is None else _loadable(targets))
    launch(
        goldfish_kernel,
        (triton.cdiv(out.numel(), _BLOCK),),
        out.view(torch.uint8),
        counts,
        token_rows,
        id_rows,
        mark_rows,
        position_rows,
        ks,
        None if exempt is None else exempt.contiguous().view(torch.uint8),
        target_rows,
        *(0 if rows is None else rows.stride(0) for rows in (token_rows, id_rows, mark_rows, position_rows)),
        0 if ks is None else ks.stride(0),
        0 if ks is None else ks.stride(1),
        0 if target_rows is None else target_rows.stride(0),
        out.numel(),
        span,
        n - span,
        halo,
        # No token of a row has more than n - 1 before it there, and the kernel walks back this far.
        min_context if positions is not None else min(min_context, n),
        0 if isinstance(k, Tensor) else 2**32 // k - 1,
        0 if exempt is None else exempt.numel(),
        _signed_32(seed),
        _signed_32(seed >> 32),
        ignore_index,
        FIRST=first,
        REACH=reach,
        BY_POSITION=starts is None,
        DEFAULT_CONTEXT=min_context == reach,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )


def _loadable(ids: Tensor) -> Tensor:
    """int32 and int64 are read as they are; other integers are cast."""
    return ids if ids.dtype in (torch.int32, torch.int64) else ids.long()


def _rows(array: Tensor | None) -> Tensor | None:
    """[rows, n] with neighbours side by side: a view, unless another layout forces a copy."""
    if array is None:
        return None
    rows = array.reshape(-1, array.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return rows.view(torch.uint8) if rows.dtype == torch.bool else rows


def _signed_32(value: int) -> int:
    """The int32 that has the lowest 32 bits of `value`."""
    return (value & 0xFFFFFFFF) - ((value & 0x80000000) << 1)
