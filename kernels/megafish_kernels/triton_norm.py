"""RMSNorm's Triton kernels. A program holds whole rows: one long one, or a tile of short ones (heads)."""

# Kernels' arguments are the compiler's own values, which have no useful Python types.
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megafish_kernels import triton_runtime

# Elements of a tile of short rows, and elements that a thread holds of a row: two 128-bit loads in half precision.
_TILE = 2048
_PER_THREAD = 16
_MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}


@triton.jit
def rms_norm_forward(
    x,
    residual,
    weight,
    y,
    total,
    inverse,
    eps,
    rows,
    inner,
    x_outer,
    x_inner,
    residual_outer,
    residual_inner,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows)[:, None] & (column < WIDTH)
    outer, within = (row // inner).to(tl.int64), (row % inner).to(tl.int64)
    place = row.to(tl.int64)[:, None] * WIDTH + column

    value = tl.load(x + (outer * x_outer + within * x_inner)[:, None] + column, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        at = (outer * residual_outer + within * residual_inner)[:, None] + column
        value += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        # Rounded before it is normalized, so that the backward, which reads the rounded sum, sees the same.
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + place, rounded, mask=mask)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=1) / WIDTH + eps)
    tl.store(inverse + row, scale, mask=row < rows)
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    tl.store(y + place, (value * scale[:, None] * w).to(y.dtype.element_ty), mask=mask)


@triton.jit
def rms_norm_backward(
    grad,
    grad_total,
    x,
    weight,
    inverse,
    d_x,
    partial,
    rows,
    inner,
    grad_outer,
    grad_inner,
    total_outer,
    total_inner,
    x_outer,
    x_inner,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    WEIGHT: tl.constexpr,
    AGAIN: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)[None, :]
    keep: tl.constexpr = "evict_last" if AGAIN else ""
    d_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    for tile in range(program, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (column < WIDTH)
        outer, within = (row // inner).to(tl.int64), (row % inner).to(tl.int64)
        scale = tl.load(inverse + row, mask=row < rows, other=0.0)[:, None]
        x_row = x + (outer * x_outer + within * x_inner)[:, None] + column
        grad_row = grad + (outer * grad_outer + within * grad_inner)[:, None] + column
        normed = tl.load(x_row, mask=mask, other=0.0, eviction_policy=keep).to(tl.float32) * scale
        g = tl.load(grad_row, mask=mask, other=0.0, eviction_policy=keep).to(tl.float32)
        # With y = x s w, s = (mean(x^2) + eps)^(-1/2): dx = s (g w - x s mean(g w x s)), dw = sum of g x s over rows.
        if ROWS == 1:  # Long rows: read anew for each, the weight costs less in the cache than in registers.
            w = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        mean = tl.sum(g * w * normed, axis=1)[:, None] / WIDTH
        if AGAIN:  # The longest do not fit the registers beside the sums: read from the cache once more.
            normed = tl.load(x_row, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32) * scale
            g = tl.load(grad_row, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
            w = tl.load(weight + column, mask=column < WIDTH, other=0.0, eviction_policy="evict_last").to(tl.float32)
        d_value = (g * w - normed * mean) * scale
        if ADD:
            at = (outer * total_outer + within * total_inner)[:, None] + column
            d_value += tl.load(grad_total + at, mask=mask, other=0.0).to(tl.float32)
        place = row.to(tl.int64)[:, None] * WIDTH + column
        tl.store(d_x + place, d_value.to(d_x.dtype.element_ty), mask=mask)
        if WEIGHT:
            d_weight += g * normed
    if WEIGHT:
        place = program.to(tl.int64) * WIDTH + tl.arange(0, BLOCK)
        tl.store(partial + place, tl.sum(d_weight, axis=0), mask=tl.arange(0, BLOCK) < WIDTH)


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, y: Tensor, total: Tensor, inverse: Tensor
) -> None:
    """Fills y [..., D] and inverse [...], and total [..., D] with a residual (all contiguous)."""
    rows, width, inner = inverse.numel(), x.shape[-1], _inner(x, residual)
    x, x_outer, x_inner = _strided(x, rows, inner)
    residual_outer = residual_inner = 0
    if residual is not None:
        residual, residual_outer, residual_inner = _strided(residual, rows, inner)
    tile, block, warps = _tile(width)
    triton_runtime.launch(
        rms_norm_forward,
        (triton.cdiv(rows, tile),),
        x,
        residual,
        weight.contiguous(),
        y,
        total,
        inverse,
        eps,
        rows,
        inner,
        x_outer,
        x_inner,
        residual_outer,
        residual_inner,
        WIDTH=width,
        ROWS=tile,
        BLOCK=block,
        ADD=residual is not None,
        num_warps=warps,
    )


def backward(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    inverse: Tensor,
    d_x: Tensor,
    weight_gradient: bool,
) -> Tensor | None:
    """Fills d_x [..., D] (contiguous); returns parts of the weight's gradient, fp32 [programs, D], if asked for."""
    rows, width, inner = inverse.numel(), x.shape[-1], _inner(x, grad, grad_total)
    x, x_outer, x_inner = _strided(x, rows, inner)
    grad, grad_outer, grad_inner = _strided(grad, rows, inner)
    total_outer = total_inner = 0
    if grad_total is not None:
        grad_total, total_outer, total_inner = _strided(grad_total, rows, inner)
    tile, block, warps = _tile(width)
    programs = min(triton.cdiv(rows, tile), _programs(x.device, warps))
    partial = torch.empty((programs, width), dtype=torch.float32, device=x.device) if weight_gradient else None
    triton_runtime.launch(
        rms_norm_backward,
        (programs,),
        grad,
        grad_total,
        x,
        weight.contiguous(),
        inverse,
        d_x,
        partial,
        rows,
        inner,
        grad_outer,
        grad_inner,
        total_outer,
        total_inner,
        x_outer,
        x_inner,
        WIDTH=width,
        ROWS=tile,
        BLOCK=block,
        ADD=grad_total is not None,
        WEIGHT=weight_gradient,
        AGAIN=block > 8192,
        num_warps=warps,
    )
    return partial


def _tile(width: int) -> tuple[int, int, int]:
    """Rows and columns of a program's tile, and its warps."""
    block = triton.next_power_of_2(width)
    rows = max(1, _TILE // block)
    return rows, block, min(max(1, rows * block // (32 * _PER_THREAD)), 32)


def _programs(device: torch.device, warps: int) -> int:
    """Programs of the backward, each of which leaves one row of partial sums: enough to fill the device, two to a
    multiprocessor at least, so that one loads while the other sums."""
    if device.type == "cuda":
        count = torch.cuda.get_device_properties(device).multi_processor_count
    else:
        # The interpreter, where few programs make short tests, or a recording.
        count = 2 if device.type == "cpu" else _MULTIPROCESSORS.get(triton_runtime.architecture(device), 132)
    return count * max(2, 16 // warps)


def _inner(*tensors: Tensor | None) -> int:
    """Rows are counted with two strides, where a tensor is not contiguous (heads of a projection); 1: with one."""
    for tensor in tensors:
        if tensor is not None and tensor.dim() > 2 and not tensor.is_contiguous():
            return tensor.shape[-2]
    return 1


def _strided(x: Tensor, rows: int, inner: int) -> tuple[Tensor, int, int]:
    """x [..., D] and the strides of its rows, as [rows / inner, inner]; a copy only where two strides cannot do it."""
    x = x.reshape(rows // inner, inner, x.shape[-1])
    if x.stride(2) != 1:
        x = x.contiguous()
    return x, x.stride(0), x.stride(1)
