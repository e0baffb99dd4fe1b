"""SwiGLU's Triton kernels: a program works on a block of columns of one row."""

# Kernels' arguments are the compiler's own values, which have no useful Python types.
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megafish_kernels import triton_runtime

_BLOCK = 1024


@triton.jit
def swiglu_forward(gate_up, out, width, stride, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    blocks = tl.cdiv(width, BLOCK)
    row = (program // blocks).to(tl.int64)
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    gate = tl.load(gate_up + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + width + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward(grad, gate_up, d_gate_up, width, grad_stride, stride, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    blocks = tl.cdiv(width, BLOCK)
    row = (program // blocks).to(tl.int64)
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    # All is read before anything is written: d_gate_up may be gate_up.
    g = tl.load(grad + row * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + width + column, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    d_gate = g * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    d_up = g * gate * sigmoid
    at = d_gate_up + row * 2 * width + column
    tl.store(at, d_gate.to(d_gate_up.dtype.element_ty), mask=mask)
    tl.store(at + width, d_up.to(d_gate_up.dtype.element_ty), mask=mask)


def forward(gate_up: Tensor, out: Tensor) -> None:
    """Fills out [..., n] (contiguous) from gate_up [..., 2 n]."""
    if out.numel() == 0:
        return
    gate_up = _rows(gate_up)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    block, warps = _block(width)
    grid = (rows * triton.cdiv(width, block),)
    triton_runtime.launch(swiglu_forward, grid, gate_up, out, width, gate_up.stride(0), BLOCK=block, num_warps=warps)


def backward(grad: Tensor, gate_up: Tensor, d_gate_up: Tensor) -> None:
    """Fills d_gate_up [..., 2 n] (contiguous; may be gate_up) from the gradient of the result, [..., n]."""
    if grad.numel() == 0:
        return
    grad, gate_up = _rows(grad), _rows(gate_up)
    rows, width = grad.shape
    block, warps = _block(width)
    triton_runtime.launch(
        swiglu_backward,
        (rows * triton.cdiv(width, block),),
        grad,
        gate_up,
        d_gate_up,
        width,
        grad.stride(0),
        gate_up.stride(0),
        BLOCK=block,
        num_warps=warps,
    )


def _rows(x: Tensor) -> Tensor:
    """x as [rows, columns] with columns side by side; a copy where its strides do not allow that."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _block(width: int) -> tuple[int, int]:
    """Columns of a program and its warps: eight columns a thread, one 128-bit load in half precision."""
    block = min(triton.next_power_of_2(width), _BLOCK)
    return block, max(1, block // 256)
