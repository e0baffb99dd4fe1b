"""The operators as their definitions read, in float64 and by torch's own autograd: the oracles of the tests."""

from __future__ import annotations

import torch
from torch import Tensor


def reference_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    denominator: float | Tensor | None = None,
    reduction: str = "mean",
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    entropy_weight: tuple[float, float] | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`linear_cross_entropy` by torch's own autograd, for small sizes.

    Arguments as there, in any floating dtype; everything is computed in float64, and gradients flow back into the
    tensors given. Returns the loss and the fields of LossStats by name.
    """
    vocab = weight.shape[0] if vocab_size is None else vocab_size
    logits = hidden.double() @ weight[:vocab].double().T
    if bias is not None:
        logits = logits + bias[:vocab].double()
    logits = logits * logit_scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap

    keep = targets != ignore_index
    weights = torch.ones(targets.shape, dtype=torch.float64, device=targets.device)
    if token_weight is not None:
        weights = token_weight.detach().double()
        keep = keep & (weights != 0)
    weights = torch.where(keep, weights, 0.0)

    lse = torch.logsumexp(logits, dim=-1)
    log_p = logits - lse[..., None]
    if entropy_weight is not None:
        sigma, gamma = entropy_weight
        weights = weights * (sigma + torch.special.entr(log_p.detach().exp()).sum(dim=-1)) ** gamma
    at_target = log_p.gather(-1, torch.where(keep, targets, 0)[..., None])[..., 0]
    loss = -(1 - label_smoothing) * at_target - label_smoothing * log_p.mean(dim=-1) + z_loss * lse**2
    loss = torch.where(keep, loss * weights, 0.0)
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean" and bool(keep.any()):
        loss = loss / (weights.sum() if denominator is None else denominator)

    with torch.no_grad():
        stats = {
            "lse": torch.where(keep, lse, 0.0),
            "entropy": torch.where(keep, torch.special.entr(log_p.exp()).sum(dim=-1), 0.0),
            "correct": keep & (logits.argmax(dim=-1) == targets),
            "cross_entropy": torch.where(keep, -at_target, 0.0),
        }
    return loss, stats


def reference_rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`rms_norm` in float64: (the normalized sum, the sum), the sum being x without a residual."""
    total = x.double() if residual is None else x.double() + residual.double()
    return total / torch.sqrt((total * total).mean(dim=-1, keepdim=True) + eps) * weight.double(), total


def reference_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotary` of one tensor in float64, as a product of complex numbers x[i] + j x[i + half] and cos + j sin."""
    half = x.shape[-1] // 2
    numbers = torch.complex(x[..., :half].double(), x[..., half:].double())
    turned = numbers * torch.complex(cos[..., :half].double(), sin[..., half:].double())
    return torch.cat((turned.real, turned.imag), dim=-1)


def reference_swiglu(gate_up: Tensor) -> Tensor:
    """`swiglu` in float64."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up
