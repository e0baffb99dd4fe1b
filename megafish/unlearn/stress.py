"""What brings forgotten text back: weights rounded as for serving.

A method that keeps a model useful changes its weights little, often by less than a step of a coarse grid; rounded, the
model may be the one it was before (Zhang et al. 2025, arXiv 2410.16454: after 4 bits 83 % of what was gone is there).
"""

from __future__ import annotations

import copy

import torch

from megafish.model.transformer import Transformer
from megafish.unlearn.rounding import Rounding

GROUP = 64
"""Neighbouring weights of a row that share a scale in 4 bits."""


def rounded(model: Transformer, to: Rounding) -> Transformer:
    """A copy of the model whose matrices in the blocks have gone there and back; embedding, head and norms are left
    alone, as serving in few bits leaves them."""
    found = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if name.startswith("blocks.") and parameter.ndim == 2:
                parameter.copy_(round_trip(parameter, to))
    return found


def round_trip(weight: torch.Tensor, to: Rounding) -> torch.Tensor:
    """A matrix [rows, columns] rounded to a grid, in its own dtype."""
    if to is Rounding.bf16:
        return weight.to(torch.bfloat16).to(weight.dtype)
    if to is Rounding.int8:
        return _to_integers(weight.float(), 127).to(weight.dtype)
    columns = weight.shape[1]
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % GROUP))
    groups = _to_integers(padded.reshape(-1, GROUP), 7).reshape(padded.shape)
    return groups[:, :columns].to(weight.dtype)


def _to_integers(rows: torch.Tensor, largest: int) -> torch.Tensor:
    """Multiples of a row's largest value / `largest`."""
    scale = rows.abs().amax(dim=1, keepdim=True) / largest
    return torch.where(scale > 0, (rows / scale).round() * scale, 0)
