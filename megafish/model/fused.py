"""RMSNorm, SwiGLU and rotary embedding with hand-written backward passes: fewer passes over memory, less kept for
backward."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32, returned in x's dtype.

    CUDA has a fused kernel of torch's own; on the CPU torch composes it of seven passes and keeps two copies of x.
    """
    if x.device.type != "cpu":
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    out: torch.Tensor = _RMSNorm.apply(x, weight, eps)
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float() if x.dtype != torch.float64 else x
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        # A rounded input has been copied to fp32 just now: that copy can be overwritten.
        out = torch.mul(wide, inverse, out=wide if wide is not x else None)
        return out.mul_(weight.to(wide.dtype)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        width = x.shape[-1]
        wide, grad = x.reshape(-1, width).to(inverse.dtype), grad.reshape(-1, width).to(inverse.dtype)
        scale, w = inverse.reshape(-1, 1), weight.to(inverse.dtype)
        # With y = x s w, s = (mean(x^2) + eps)^(-1/2): dx = s (g w) - x s^3 mean(g w x), dw = sum of s (g x) over
        # rows. Both reductions are products of g x with a vector.
        product = grad * wide
        d_weight = torch.mv(product.t(), scale.squeeze(1))
        pull = torch.mv(product, w).unsqueeze(1).mul_(scale.pow(3)).div_(width)
        d_x = torch.mul(grad, w, out=product).mul_(scale).addcmul_(wide, pull, value=-1)
        return d_x.view_as(x).to(x.dtype), d_weight.to(weight.dtype), None


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of [..., 2 n], gate first -> [..., n].

    Keeps its input for the backward pass, and on the CPU silu(gate) too: an exponential costs more there than a read.
    """
    out: torch.Tensor = _SwiGLU.apply(gate_up)
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        activated = F.silu(gate)
        if gate_up.device.type == "cpu":
            ctx.save_for_backward(gate_up, activated)
            return activated * up
        ctx.save_for_backward(gate_up)
        return activated.mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        gate_up, *kept = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        d_gate_up = torch.empty_like(gate_up)
        d_gate, d_up = d_gate_up.chunk(2, dim=-1)
        torch.mul(grad, kept[0] if kept else F.silu(gate), out=d_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=d_gate)
        return d_gate_up


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of x [b, S, H, head_dim] (Su et al. 2021; half-split, as Hugging Face).

    cos [S or b, S; 1, head_dim], both halves alike; sin of that shape, the first half negated (see RotaryTable).
    Computed in x's dtype, with cos and sin rounded to it, as in transformers.
    """
    out: torch.Tensor = _Rotary.apply(x, cos, sin)
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        # The transpose of a rotation turns the other way.
        return _rotate(grad, cos, -sin), None, None


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(x[..., half:], sin[..., :half], out=out[..., :half])
    torch.mul(x[..., :half], sin[..., half:], out=out[..., half:])
    return out.addcmul_(x, cos)
