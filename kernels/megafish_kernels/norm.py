"""RMSNorm, alone or with the residual addition before it: fewer passes over memory than torch's composition."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megafish_kernels.backends import Backend, compilable, takes_triton

MAX_TRITON_WIDTH = 32768
"""A program of the Triton kernels holds whole rows."""


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, *, residual: None = None, backend: Backend = "auto") -> Tensor: ...


@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, backend: Backend = "auto"
) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467).

    Computed in fp32 (float64 for float64) and rounded once. Deterministic: the weight's gradient is summed in a fixed
    order, on a GPU one that depends on its number of multiprocessors. Any strides; on the Triton path x is copied only
    where its leading dimensions cannot be walked with two strides, or the last one's is not 1. Unchanged by autocast.

    Args:
        x: [..., D] in any floating dtype.
        weight: [D] in any floating dtype.
        eps: at least 0.
        residual: [..., D] as x, added to it first; the sum has the dtype that torch promotes the two to.
        backend: "triton" (float32, bfloat16, float16; D up to 32,768), "torch" on any device, "auto" for Triton on
            CUDA where it can.

    Returns:
        [..., D] in x's dtype. With a residual (the normalized sum, the sum), both in the sum's dtype, both
        differentiable.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the backend cannot take them.
    """
    _check(x, weight, eps, residual)
    supported = x.shape[-1] <= MAX_TRITON_WIDTH
    triton = takes_triton(backend, x, weight, *(() if residual is None else (residual,)), supported=supported)
    if triton and not supported:
        raise ValueError(f'x: D = {x.shape[-1]}, and backend "triton" takes at most {MAX_TRITON_WIDTH}')
    if triton and x.numel() > 0:
        result: Tensor | tuple[Tensor, Tensor] = _TritonRMSNorm.apply(x, residual, weight, eps)
        return result
    if residual is None:
        return _torch_rms_norm(x, weight, eps)
    total = x + residual
    return _torch_rms_norm(total, weight, eps), total


def _check(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> None:
    if x.dim() < 1 or not x.is_floating_point():
        raise ValueError(f"x: expected floating-point [..., D], got {x.dtype} {tuple(x.shape)}")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight: expected [{x.shape[-1]}] as x has it, got {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise ValueError(f"weight: expected a floating-point dtype, got {weight.dtype}")
    if weight.device != x.device:
        raise ValueError(f"weight: lies on {weight.device}, but x on {x.device}")
    if not eps >= 0:
        raise ValueError(f"eps: {eps} must be at least 0")
    if residual is None:
        return
    if residual.shape != x.shape:
        raise ValueError(f"residual: expected the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}")
    if not residual.is_floating_point():
        raise ValueError(f"residual: expected a floating-point dtype, got {residual.dtype}")
    if residual.device != x.device:
        raise ValueError(f"residual: lies on {residual.device}, but x on {x.device}")


def _forward_shapes(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    inverse = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    return y, y.new_empty(0) if residual is None else torch.empty_like(y), inverse


@compilable("rms_norm_forward", _forward_shapes)
def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y; x + residual, empty without one; 1 / sqrt(mean(x^2) + eps) of each row, fp32."""
    from megafish_kernels import triton_norm

    y, total, inverse = _forward_shapes(x, residual, weight, eps)
    triton_norm.forward(x, residual, weight, eps, y, total, inverse)
    return y, total, inverse


def _backward_shapes(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, inverse: Tensor, weight_gradient: bool
) -> tuple[Tensor, Tensor]:
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return d_x, torch.empty(weight.shape if weight_gradient else (0,), dtype=weight.dtype, device=x.device)


@compilable("rms_norm_backward", _backward_shapes)
def _backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, inverse: Tensor, weight_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight (empty unless asked for); grad_total is added to the former."""
    from megafish_kernels import triton_norm

    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = triton_norm.backward(grad, grad_total, x, weight, inverse, d_x, weight_gradient)
    d_weight = weight.new_empty(0) if partial is None else partial.sum(0).to(weight.dtype)
    return d_x, d_weight


class _TritonRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Any:
        ctx.set_materialize_grads(False)
        y, total, inverse = _forward(x, residual, weight, eps)
        ctx.dtypes = x.dtype, x.dtype if residual is None else residual.dtype
        ctx.save_for_backward(x if residual is None else total, weight, inverse)
        return y if residual is None else (y, total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_total: Tensor | None = None) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        need_x, need_residual, need_weight = ctx.needs_input_grad[:3]
        d_weight: Tensor | None = None
        if grad is None:
            d_sum = grad_total
        else:
            d_sum, d_weight = _backward(grad, grad_total, x, weight, inverse, need_weight)
        if d_sum is None:
            return None, None, None, None
        of_x, of_residual = ctx.dtypes
        return (
            d_sum.to(of_x) if need_x else None,
            d_sum.to(of_residual) if need_residual else None,
            d_weight if need_weight else None,
            None,
        )


def _no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Switches autocast off where it is on; to do so in any case would cost more than the check."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def _torch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """CUDA has a fused kernel of torch's own, and torch.compile fuses by itself; on the CPU torch composes the norm of
    seven passes and keeps two copies of x."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.rms_norm(x, (x.shape[-1],), weight, eps).to(x.dtype)
    out: Tensor = _TorchRMSNorm.apply(x, weight, eps)
    return out


class _TorchRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float() if x.dtype != torch.float64 else x
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        # A rounded input has been copied to fp32 just now: that copy can be overwritten.
        out = torch.mul(wide, inverse, out=wide if wide is not x else None)
        return out.mul_(weight.to(wide.dtype)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        width = x.shape[-1]
        rows = inverse.numel()
        wide, grad = x.reshape(rows, width).to(inverse.dtype), grad.reshape(rows, width).to(inverse.dtype)
        scale, w = inverse.reshape(rows, 1), weight.to(inverse.dtype)
        # With y = x s w, s = (mean(x^2) + eps)^(-1/2): dx = s (g w) - x s^3 mean(g w x), dw = sum of s (g x) over
        # rows. Both reductions are products of g x with a vector, which autocast would compute in half precision.
        product = grad * wide
        with _no_autocast(x.device.type):
            d_weight = torch.mv(product.t(), scale.squeeze(1))
            pull = torch.mv(product, w).unsqueeze(1).mul_(scale.pow(3)).div_(width)
        d_x = torch.mul(grad, w, out=product).mul_(scale).addcmul_(wide, pull, value=-1)
        return d_x.view_as(x).to(x.dtype), d_weight.to(weight.dtype), None
