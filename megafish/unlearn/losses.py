"""What the methods minimize, as functions of numbers alone: negative log-likelihoods, divergences, hidden states.

Tensors of tokens are [n], of answers [items]; s stands for the summed negative log-likelihood of an answer (natural
logarithm), reference values carry no gradient. Every function returns one loss a token or an item, to be averaged by
the caller with a denominator that is known before the first backward pass.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def sums(nll: torch.Tensor, owner: torch.Tensor, items: int) -> torch.Tensor:
    """s of each item, from the losses of tokens [n] and the item of each token, int64 [n]."""
    return nll.new_zeros(items).index_add(0, owner, nll)


def npo(s: torch.Tensor, reference: torch.Tensor, beta: float) -> torch.Tensor:
    """Negative preference optimization, -(2/beta) log sigmoid(beta (s - reference)) (Zhang et al. 2024, arXiv
    2404.05868). For beta towards 0 its gradient is that of -s: gradient ascent."""
    return -2 / beta * F.logsigmoid(beta * (s - reference))


def dpo(
    wanted: torch.Tensor,
    wanted_reference: torch.Tensor,
    unwanted: torch.Tensor,
    unwanted_reference: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """Direct preference optimization with a refusal as the wanted answer: -(2/beta) log sigmoid(beta (gain of the
    wanted - gain of the unwanted)), a gain being the reference's s less the model's (Rafailov et al. 2023; the factor
    2 as in NPO)."""
    gain = (wanted_reference - wanted) - (unwanted_reference - unwanted)
    return -2 / beta * F.logsigmoid(beta * gain)


def simnpo(s: torch.Tensor, lengths: torch.Tensor, beta: float, margin: float) -> torch.Tensor:
    """SimNPO, -(2/beta) log sigmoid(beta (s / length - margin)): no reference model (Fan et al. 2024, arXiv
    2410.07163)."""
    return -2 / beta * F.logsigmoid(beta * (s / lengths - margin))


def weighted_ascent(nll: torch.Tensor, beta: float) -> torch.Tensor:
    """WGA, -p^beta nll with p the model's probability as a constant (Wang et al. 2025, arXiv 2502.19301)."""
    return -torch.exp(-beta * nll.detach()) * nll


def saturated_ascent(nll: torch.Tensor, beta: float, beta2: float) -> torch.Tensor:
    """SatImp, -p^beta (1 - p)^beta2 nll, the weight a constant (Yang et al. 2025, arXiv 2505.11953)."""
    p = torch.exp(-nll.detach())
    return -(p**beta) * (1 - p).clamp(min=0) ** beta2 * nll


def steer(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over the width of (hidden - target)^2, [n, D] -> [n] (RMU's two terms; Li et al. 2024, arXiv 2403.03218)."""
    return (hidden.float() - target.float()).square().mean(dim=-1)


def steering_vector(width: int, seed: int, device: torch.device) -> torch.Tensor:
    """RMU's direction: entries uniform in [0, 1), normalized to length 1, fp32 [width]."""
    generator = torch.Generator().manual_seed(seed)
    vector = torch.rand(width, generator=generator)
    return (vector / vector.norm()).to(device)
