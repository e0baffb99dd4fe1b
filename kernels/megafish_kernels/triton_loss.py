"""The Triton kernels of the linear cross-entropy.

Four ideas, of which the first three are known and the fourth is why they are put together here:

- Forward without logits in memory: every program walks over its split of the vocabulary with a running maximum and sum
  (online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867) and writes a few figures a row; `partials.merge` puts
  the splits together. No locks, no atomics: the same bits every time.
- Backward by vocabulary chunks (as Megatron-LM's fused head for Blackwell): the gradient of a chunk's logits is made in
  a slab, two products take it from there. All rows are in one product, so that each row of the weight's gradient is
  written once, or added once to a main gradient, and never rounded on the way.
- The logits of as many columns as the byte budget holds are kept by the forward, and their gradient overwrites them:
  (8 - 2c) n V D operations with a share c of the columns kept. They are kept as differences from the largest logit of
  their row in their tile, so that rounding is finest where the probability lies (logits rounded as they are would make
  probabilities near 1 wrong by |logit| / 256 in bf16).
- Only kept rows exist here (n of them), and nobody asks the device how many there are: programs beyond the count, which
  lies in the device's memory, end at once. Where the host knows the count, the two products are the BLAS library's.
"""

# Kernels' arguments are the compiler's own values, which have no useful Python types.
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megafish_kernels.partials import LOWEST
from megafish_kernels.tiles import (
    GROUP,
    SLAB_COLUMNS,
    LossTiles,
    Tile,
    kept_columns,
    loss_tiles,
    vocabulary_splits,
)
from megafish_kernels.torch_backend import Gradients, Options
from megafish_kernels.triton_runtime import architecture, interpreted, launch

_LOWEST = tl.constexpr(LOWEST)
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _logits(
    hidden, weight, bias, row, last_row, column, last_column, D, scale, softcap,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EVEN: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """softcap(scale * (hidden @ weight.T + bias)) in fp32 for BM rows from `row` on and BN columns from `column` on.

    What lies past the last row or column repeats it, so that loads need no mask. Offsets are 64 bits wide for the
    tile's corner and 32 within it: a whole tile of 64-bit ones would take the registers that the sums need.
    """
    inner = tl.arange(0, BK)
    rows = tl.minimum(tl.arange(0, BM), last_row - row)
    columns = tl.minimum(tl.arange(0, BN), last_column - column)
    left = hidden + tl.cast(row, tl.int64) * D
    right = weight + tl.cast(column, tl.int64) * D
    left_at = rows[:, None] * D + inner[None, :]
    right_at = columns[None, :] * D + inner[:, None]
    logits = tl.zeros((BM, BN), tl.float32)
    for start in range(0, D, BK):
        if EVEN:
            a = tl.load(left + left_at)
            b = tl.load(right + right_at)
        else:
            a = tl.load(left + left_at, mask=(start + inner)[None, :] < D, other=0.0)
            b = tl.load(right + right_at, mask=(start + inner)[:, None] < D, other=0.0)
        logits = tl.dot(a, b, logits, input_precision=PRECISION)
        left += BK
        right += BK
    if BIAS:
        added = tl.load(bias + column + columns).to(tl.float32)
        # -inf, which bans an id, would make NaN of the differences within a tile where all are banned.
        lowest = _LOWEST / tl.maximum(scale, 1.0)
        logits += tl.where(added < lowest, lowest, added)[None, :]
    logits *= scale
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1), right at both ends: the exponential is 0 or infinite there.
        logits = softcap - 2.0 * softcap / (tl.exp2(logits * (2.0 * _LOG2E / softcap)) + 1.0)
    return logits


@triton.jit
def _forward(
    hidden, weight, bias, targets, count, figures, kept_logits, kept_tops,
    capacity, V, D, tiles_each, splits, row_blocks, offset, kept_columns, kept_stride, scale, softcap,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, STATS: tl.constexpr,
    KEEP: tl.constexpr, FIGURES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Figures of a block of rows over one split of the vocabulary (see `partials`), and the logits that are kept.

    Programs that run together share GROUP blocks of rows, which every tile of columns reads again: these few stay in
    the cache, where all rows of a large batch would not.
    """
    program = tl.program_id(0)
    group = program // (GROUP * splits)
    group_rows = tl.minimum(row_blocks - group * GROUP, GROUP)
    split = (program % (GROUP * splits)) // group_rows
    block = (group * GROUP + (program % (GROUP * splits)) % group_rows) * BM
    row = block + tl.arange(0, BM)
    out = figures + split.to(tl.int64) * (FIGURES * capacity) + row
    inside = row < capacity
    n = tl.load(count)
    top = tl.full((BM,), _LOWEST, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    at_target = tl.zeros((BM,), tl.float32)
    plain = tl.zeros((BM,), tl.float32)
    moment = tl.zeros((BM,), tl.float32)
    best = tl.zeros((BM,), tl.float32)
    if block < n:
        # Rows past the last one repeat it, so that loads need no mask: nobody reads what comes of them.
        rows = tl.minimum(row, n - 1)
        target = tl.load(targets + rows)
        first = split * tiles_each
        last = tl.minimum(first + tiles_each, tl.cdiv(V, BN))
        for tile in range(first, last):
            begin = tile * BN
            column = begin + tl.arange(0, BN)
            logits = _logits(
                hidden, weight, bias, block, n - 1, begin, V - 1, D, scale, softcap,
                BM, BN, BK, EVEN, BIAS, SOFTCAP, PRECISION,
            )  # fmt: skip
            real = (column < V)[None, :]
            # A target of another shard may carry the number of a padding column: only real ones can match.
            hit = (column[None, :] == target[:, None]) & real
            at_target += tl.sum(tl.where(hit, logits, 0.0), axis=1)
            if SMOOTHING:
                plain += tl.sum(tl.where(real, logits, 0.0), axis=1)
            logits = tl.where(real, logits, _LOWEST)
            tile_top = tl.max(logits, axis=1)
            if KEEP:  # noqa: SIM102 (decided when the kernel is compiled)
                if begin < kept_columns:
                    place = kept_logits + rows.to(tl.int64)[:, None] * kept_stride + column[None, :]
                    # Up to the stride and not the last column: a mask that ends within a vector would split it.
                    stored = (row < n)[:, None] & (column < kept_stride)[None, :]
                    tl.store(place, logits - tile_top[:, None], mask=stored)
                    tl.store(kept_tops + tl.cast(tile, tl.int64) * capacity + row, tile_top, mask=row < n)
            if STATS:
                first_best = tl.min(tl.where(logits == tile_top[:, None], column[None, :], V), axis=1)
                best = tl.where(tile_top > top, (offset + first_best).to(tl.float32), best)
            higher = tl.maximum(top, tile_top)
            shift = top - higher
            factor = tl.exp2(shift * _LOG2E)
            logits = logits - higher[:, None]
            weights = tl.exp2(logits * _LOG2E)
            if STATS:
                # Before total: the old figures, seen from the new maximum. Columns of padding weigh 0.
                moment = factor * (moment + shift * total) + tl.sum(weights * logits, axis=1)
            total = factor * total + tl.sum(weights, axis=1)
            top = higher
    tl.store(out, top, mask=inside)
    tl.store(out + capacity, total, mask=inside)
    tl.store(out + 2 * capacity, at_target, mask=inside)
    if SMOOTHING:
        tl.store(out + 3 * capacity, plain, mask=inside)
    if STATS:
        tl.store(out + (3 + SMOOTHING) * capacity, moment, mask=inside)
        tl.store(out + (4 + SMOOTHING) * capacity, best, mask=inside)


@triton.jit
def _gradient(
    hidden, weight, bias, targets, count, lse, factors, slab, tops, bias_parts,
    capacity, V, D, begin, columns, stride, row_blocks, scale, softcap, z_twice, smoothing, spread,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, KEPT: tl.constexpr, BIAS_GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the rows' losses by the logits of columns [begin, begin + columns), in the slab [n, stride]; from
    there on zeros, as far as the last block reaches and the stride allows.

    factor (probability (1 + 2 z lse) - (1 - smoothing) onehot - smoothing / vocabulary) softcap' scale, in fp32,
    rounded once. KEPT: the slab holds the logits less their tile's tops, in tiles of BN columns, and is overwritten;
    otherwise logits are computed anew.
    """
    program = tl.program_id(0)
    column_blocks = tl.cdiv(columns, BN)
    # Programs that run together share GROUP blocks of rows, so that both operands come out of the cache.
    group = program // (GROUP * column_blocks)
    group_rows = tl.minimum(row_blocks - group * GROUP, GROUP)
    row_block = group * GROUP + (program % (GROUP * column_blocks)) % group_rows
    first = (program % (GROUP * column_blocks)) // group_rows * BN
    local = first + tl.arange(0, BN)
    row = row_block * BM + tl.arange(0, BM)
    column = begin + local
    in_slab = local < columns
    real = local < tl.minimum(columns, V - begin)
    n = tl.load(count)
    if row_block * BM >= n:
        if BIAS_GRADIENT:
            tl.store(bias_parts + row_block.to(tl.int64) * columns + local, tl.zeros((BN,), tl.float32), mask=in_slab)
        return
    rows = tl.minimum(row, n - 1)
    place = slab + rows.to(tl.int64)[:, None] * stride + local[None, :]
    stored = (row < n)[:, None] & (local < stride)[None, :]
    if KEPT:
        top = tl.load(tops + tl.cast(first // BN, tl.int64) * capacity + rows)
        logits = tl.load(place, mask=stored, other=0.0).to(tl.float32) + top[:, None]
    else:
        logits = _logits(
            hidden, weight, bias, row_block * BM, n - 1, begin + first, V - 1, D, scale, softcap,
            BM, BN, BK, EVEN, BIAS, SOFTCAP, PRECISION,
        )  # fmt: skip
    row_lse = tl.load(lse + rows)
    target = tl.load(targets + rows)
    gradient = tl.exp2((logits - row_lse[:, None]) * _LOG2E) * (1.0 + z_twice * row_lse)[:, None]
    hit = column[None, :] == target[:, None]
    gradient = tl.where(hit, gradient - (1.0 - smoothing), gradient) - spread
    if SOFTCAP:
        ratio = logits / softcap
        gradient *= 1.0 - ratio * ratio
    gradient *= (tl.load(factors + rows) * scale)[:, None]
    gradient = tl.where(real[None, :], gradient, 0.0)
    tl.store(place, gradient, mask=stored)
    if BIAS_GRADIENT:
        total = tl.sum(tl.where((row < n)[:, None], gradient, 0.0), axis=0)
        tl.store(bias_parts + row_block.to(tl.int64) * columns + local, total, mask=in_slab)


@triton.jit
def _product(
    left, right, out, count, M, N, K, left_m, left_k, right_k, out_m,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    COUNT_ROWS: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [M, N] = left [M, K] @ right [K, N], or added to it, where M (COUNT_ROWS) or K ends at the count.

    Rows of right and out are contiguous. left is a slab (COUNT_ROWS: left_k is 1) or its transpose (left_m is 1), with
    zeros behind its last column up to a multiple of 16.
    """
    program = tl.program_id(0)
    n = tl.load(count)
    blocks_m, blocks_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    group = program // (GROUP * blocks_n)
    group_rows = tl.minimum(blocks_m - group * GROUP, GROUP)
    block_m = group * GROUP + (program % (GROUP * blocks_n)) % group_rows
    block_n = (program % (GROUP * blocks_n)) // group_rows
    if COUNT_ROWS:
        end_m, end_k = n, K
    else:
        end_m, end_k = M, n
    if block_m * BM >= end_m:
        return
    m = block_m * BM + tl.arange(0, BM)
    column = block_n * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    rows, columns = tl.arange(0, BM), tl.arange(0, BN)
    # Neighbours in memory are masked and not clipped, and a slab's by a multiple of 16: then loads are whole vectors.
    # A slab's rows past the count hold anything; they are clipped, or masked where they are summed over.
    if COUNT_ROWS:
        rows = tl.minimum(rows, end_m - 1 - block_m * BM)
        end_left = tl.cdiv(K, 16) * 16
        left_inside = tl.full((BM,), 1, tl.int1)
    else:
        end_left = end_k
        left_inside = m < tl.cdiv(M, 16) * 16
    right_inside = column < N
    left += tl.cast(block_m * BM, tl.int64) * left_m
    right += block_n * BN
    left_at = rows[:, None] * left_m + inner[None, :] * left_k
    right_at = inner[:, None] * right_k + columns[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, end_k, BK):
        k = start + inner
        a = tl.load(left + left_at, mask=left_inside[:, None] & (k < end_left)[None, :], other=0.0)
        b = tl.load(right + right_at, mask=(k < end_k)[:, None] & right_inside[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        left += BK * left_k
        right += BK * right_k
    place = out + m.to(tl.int64)[:, None] * out_m + column[None, :]
    inside = (m < end_m)[:, None] & (column < N)[None, :]
    if ADD:
        total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, total, mask=inside)


class Kept(NamedTuple):
    """The kept rows, compacted."""

    hidden: Tensor
    """[capacity, D], contiguous."""
    targets: Tensor
    """int32 [capacity], rows of the weight; outside it for a target of another shard."""
    count: int | Tensor  # type: ignore[assignment]  # not the tuple's method
    """How many of the rows are kept tokens: all of them, the capacity, or a 0-d int32 tensor on the device."""

    @property
    def on_device(self) -> Tensor:
        """The count as the kernels read it."""
        if isinstance(self.count, Tensor):
            return self.count
        return torch.full((), self.count, dtype=torch.int32, device=self.hidden.device)


def precision() -> str:
    """Of fp32 products, as torch's own are set: "ieee", or "tf32" after set_float32_matmul_precision("high") or, from
    torch 2.9 on, `torch.backends.cuda.matmul.fp32_precision = "tf32"`, after which the older getter raises an error."""
    newer = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if newer is None:
        newer = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if newer == "tf32" else "ieee"


def _tiles(kept: Kept) -> LossTiles:
    hidden = kept.hidden
    return loss_tiles(architecture(hidden.device), hidden.element_size(), hidden.shape[0])


class KeptLogits(NamedTuple):
    """Logits that the forward leaves for the backward: values + tops of their tile."""

    values: Tensor
    """[capacity, kept columns] in the dtype of the hidden states: the logits less the largest of row and tile."""
    tops: Tensor
    """fp32 [tiles, capacity], these largest ones."""
    tile_columns: int
    """Columns of a tile."""


def partials(
    kept: Kept, weight: Tensor, bias: Tensor | None, options: Options, offset: int, need_gradient: bool
) -> tuple[Tensor, KeptLogits | None]:
    """[splits, F, capacity] figures of the rows over this weight's part of the vocabulary, whose first id is `offset`;
    and the logits of its first columns, where a gradient will want them."""
    hidden, fields, columns = kept.hidden, options.fields, options.columns
    capacity, width = hidden.shape
    if columns == 0 or capacity == 0:
        figures = hidden.new_zeros(1, fields.count, capacity, dtype=torch.float32)
        figures[:, fields.maximum] = LOWEST
        return figures, None
    tile = _tiles(kept).forward
    blocks = triton.cdiv(capacity, tile.rows)
    splits, each = vocabulary_splits(tile, capacity, columns)
    figures = hidden.new_empty(splits, fields.count, capacity, dtype=torch.float32)
    keep = 0
    if need_gradient:
        keep, _ = kept_columns(capacity, columns, hidden.element_size(), options.logits_bytes)
    logits = None
    if keep:
        values = _aligned(hidden.new_empty(capacity * _stride(keep)), capacity, keep)
        tops = figures.new_empty(triton.cdiv(keep, tile.columns), capacity)
        logits = KeptLogits(values, tops, tile.columns)
    launch(
        _forward,
        (blocks * splits,),
        hidden,
        weight,
        bias,
        kept.targets,
        kept.on_device,
        figures,
        logits.values if logits else None,
        logits.tops if logits else None,
        capacity,
        columns,
        width,
        each,
        splits,
        blocks,
        offset,
        keep,
        _stride(keep),
        float(options.logit_scale),
        float(options.softcap or 1.0),
        **_flags(width, tile, bias, options),
        SMOOTHING=int(fields.smoothing),
        STATS=int(fields.stats),
        KEEP=keep > 0,
        FIGURES=fields.count,
        GROUP=GROUP,
        **tile.launch(),
    )
    return figures, logits


def _flags(width: int, tile: Tile, bias: Tensor | None, options: Options) -> dict[str, Any]:
    return {
        "EVEN": width % tile.inner == 0,
        "BIAS": bias is not None,
        "SOFTCAP": options.softcap is not None,
        "PRECISION": precision(),
    }


def gradients(
    kept: Kept,
    logits: KeptLogits | None,
    weight: Tensor,
    bias: Tensor | None,
    options: Options,
    lse: Tensor,
    factors: Tensor,
    needs: tuple[bool, bool, bool],
    main_grad: Tensor | None,
) -> Gradients:
    """The gradients of sum(factors * loss): of the kept hidden states, fp32 [capacity, D] and this part's share, to be
    added up over the parts of the vocabulary; of weight in its own dtype, or added to main_grad; of bias in fp32.

    `logits`: what `partials` kept, overwritten here, or None. lse and factors: fp32 [capacity].
    """
    need_hidden, need_weight, need_bias = needs
    hidden, columns = kept.hidden, options.columns
    capacity, width = hidden.shape
    grad_hidden = hidden.new_empty(capacity, width, dtype=torch.float32) if need_hidden else None
    grad_weight = None
    if need_weight:
        grad_weight = torch.empty_like(weight) if main_grad is None else main_grad
    grad_bias = weight.new_zeros(weight.shape[0], dtype=torch.float32) if need_bias else None
    if columns == 0 or capacity == 0:
        columns = 0
        if grad_hidden is not None:
            grad_hidden.zero_()
    if grad_weight is not None and main_grad is None:
        grad_weight[columns:].zero_()
    begin = 0
    for width_of, slab in _chunks(kept, logits, columns, options):
        parts = _logits_gradient(kept, slab, begin, weight, bias, options, lse, factors, logits, need_bias)
        some = slice(begin, begin + width_of)
        if grad_hidden is not None:
            multiply(slab, weight[some], grad_hidden, kept, add=begin > 0)
        if grad_weight is not None:
            multiply(slab, hidden, grad_weight[some], kept, add=main_grad is not None, transposed=True)
        if grad_bias is not None and parts is not None:
            torch.sum(parts, dim=0, out=grad_bias[some])
        begin += width_of
        logits = None
    return Gradients(grad_hidden, None if main_grad is not None else grad_weight, grad_bias)


def _chunks(kept: Kept, logits: KeptLogits | None, columns: int, options: Options) -> list[tuple[int, Tensor]]:
    """(columns, slab [capacity, columns]) of each chunk, the kept logits first; the others share one slab."""
    hidden = kept.hidden
    capacity = hidden.shape[0]
    chunks = []
    begin = 0
    if logits is not None:
        begin = logits.values.shape[1]
        chunks.append((begin, logits.values))
    if begin < columns:
        _, wanted = kept_columns(capacity, columns, hidden.element_size(), options.logits_bytes)
        # Kept logits were used up by an earlier backward: the whole budget is a slab's now.
        wanted = min(wanted or SLAB_COLUMNS, columns - begin)
        memory = hidden.new_empty(capacity * _stride(wanted))
        while begin < columns:
            some = min(wanted, columns - begin)
            chunks.append((some, _aligned(memory, capacity, some)))
            begin += some
    return chunks


def _stride(columns: int) -> int:
    """From row to row of logits: a multiple of 64, so that loads are as wide as they can be for any vocabulary."""
    return triton.cdiv(columns, 64) * 64


def _aligned(memory: Tensor, rows: int, columns: int) -> Tensor:
    return memory[: rows * _stride(columns)].view(rows, _stride(columns))[:, :columns]


def _logits_gradient(
    kept: Kept,
    slab: Tensor,
    begin: int,
    weight: Tensor,
    bias: Tensor | None,
    options: Options,
    lse: Tensor,
    factors: Tensor,
    logits: KeptLogits | None,
    need_bias: bool,
) -> Tensor | None:
    """Fill the slab; returns the sums of its columns by blocks of rows, fp32 [blocks, columns], if they are needed.

    `logits`: what the slab holds already, less their tops; None if they are to be computed.
    """
    tile = _tiles(kept).gradient
    if logits is not None:
        # No product here. The columns are those of the tops; fewer rows leave registers for more programs.
        tile = Tile(min(32, tile.rows), logits.tile_columns, tile.inner, 4, 1)
    capacity, width = kept.hidden.shape
    columns = slab.shape[1]
    row_blocks = triton.cdiv(capacity, tile.rows)
    parts = slab.new_empty(row_blocks, columns, dtype=torch.float32) if need_bias else None
    launch(
        _gradient,
        (row_blocks * triton.cdiv(columns, tile.columns),),
        kept.hidden,
        weight,
        bias,
        kept.targets,
        kept.on_device,
        lse,
        factors,
        slab,
        logits.tops if logits else None,
        parts,
        capacity,
        options.columns,
        width,
        begin,
        columns,
        slab.stride(0),
        row_blocks,
        float(options.logit_scale),
        float(options.softcap or 1.0),
        2.0 * options.z_loss,
        float(options.label_smoothing),
        options.label_smoothing / options.vocab_size,
        **_flags(width, tile, bias, options),
        GROUP=GROUP,
        KEPT=logits is not None,
        BIAS_GRADIENT=need_bias,
        **tile.launch(),
    )
    return parts


def multiply(slab: Tensor, other: Tensor, out: Tensor, kept: Kept, *, add: bool, transposed: bool = False) -> None:
    """out (+)= slab @ other over the kept rows, or slab.T @ other with `transposed`, summed in fp32.

    By torch's BLAS library where the host knows the count, by a kernel of our own where only the device does.
    """
    if not isinstance(kept.count, Tensor) and not interpreted():
        _blas(slab.t() if transposed else slab, other, out, add)
        return
    tile = _tiles(kept).product
    m, inner = (slab.shape[1], slab.shape[0]) if transposed else slab.shape
    strides = (1, slab.stride(0)) if transposed else (slab.stride(0), 1)
    launch(
        _product,
        (triton.cdiv(m, tile.rows) * triton.cdiv(other.shape[1], tile.columns),),
        slab,
        other,
        out,
        kept.on_device,
        m,
        other.shape[1],
        inner,
        *strides,
        other.stride(0),
        out.stride(0),
        GROUP=GROUP,
        COUNT_ROWS=not transposed,
        ADD=add,
        PRECISION=precision(),
        **tile.launch(),
    )


def _blas(left: Tensor, right: Tensor, out: Tensor, add: bool) -> None:
    if out.dtype == left.dtype:
        torch.addmm(out, left, right, out=out) if add else torch.mm(left, right, out=out)
    elif add:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
