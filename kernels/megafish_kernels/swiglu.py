"""SwiGLU's product, whose backward computes the activation anew instead of keeping it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megafish_kernels.backends import Backend, compilable, takes_triton


def swiglu(gate_up: Tensor, *, overwrite: bool = False, backend: Backend = "auto") -> Tensor:
    """silu(gate) * up of a fused projection (Shazeer 2020, arXiv 2002.05202).

    Its input is all that it keeps for the backward; on a CPU silu(gate) too, since an exponential costs more there than
    a read. Triton computes in fp32 and rounds once, torch rounds silu(gate) as well. Unchanged by autocast.

    Args:
        gate_up: [..., 2 n] in any floating dtype, gate first.
        overwrite: the backward may write the gradient of gate_up over gate_up. Allowed if nothing but this call reads
            gate_up (a linear layer's backward does not need its output) and the backward runs once: a second one raises
            torch's error about tensors modified in place. It is a permission: torch makes no use of it, nor does Triton
            of leaves, of tensors that are not contiguous, or under torch.compile, which plans memory itself.
        backend: "triton" (float32, bfloat16, float16), "torch" on any device, "auto" for Triton on CUDA where it can.

    Returns:
        [..., n] in the dtype of gate_up.

    Raises:
        ValueError: the shape or the dtype does not fit, or the backend cannot take it.
    """
    if gate_up.dim() < 1 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up: expected [..., 2 n], got {tuple(gate_up.shape)}")
    if not gate_up.is_floating_point():
        raise ValueError(f"gate_up: expected a floating-point dtype, got {gate_up.dtype}")
    if takes_triton(backend, gate_up):
        overwrite = overwrite and not torch.compiler.is_compiling() and not gate_up.is_leaf and gate_up.is_contiguous()
        out: Tensor = _TritonSwiGLU.apply(gate_up, overwrite)
    elif torch.compiler.is_compiling():
        gate, up = gate_up.chunk(2, dim=-1)
        out = F.silu(gate) * up
    else:
        out = _TorchSwiGLU.apply(gate_up)
    return out


def _forward_shapes(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@compilable("swiglu_forward", _forward_shapes)
def _forward(gate_up: Tensor) -> Tensor:
    from megafish_kernels import triton_swiglu

    out = _forward_shapes(gate_up)
    triton_swiglu.forward(gate_up, out)
    return out


def _backward_shapes(grad: Tensor, gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


@compilable("swiglu_backward", _backward_shapes)
def _backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    from megafish_kernels import triton_swiglu

    d_gate_up = _backward_shapes(grad, gate_up)
    triton_swiglu.backward(grad, gate_up, d_gate_up)
    return d_gate_up


def _overwriting_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient in gate_up's memory; autograd's count of versions lets no second backward read it."""
    from megafish_kernels import triton_swiglu

    triton_swiglu.backward(grad, gate_up, gate_up)
    torch.autograd.graph.increment_version(gate_up)
    return gate_up.detach()


class _TritonSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, overwrite: bool) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.overwrite = overwrite
        return _forward(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        return (_overwriting_backward if ctx.overwrite else _backward)(grad, gate_up), None


class _TorchSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        activated = F.silu(gate)
        if gate_up.device.type == "cpu":
            ctx.save_for_backward(gate_up, activated)
            return activated * up
        ctx.save_for_backward(gate_up)
        return activated.mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        gate_up, *kept = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        d_gate_up = torch.empty_like(gate_up)
        d_gate, d_up = d_gate_up.chunk(2, dim=-1)
        torch.mul(grad, kept[0] if kept else F.silu(gate), out=d_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=d_gate)
        return d_gate_up
