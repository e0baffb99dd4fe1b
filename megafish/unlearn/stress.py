"""What brings forgotten text back: weights rounded as for serving, and a steered direction taken out again.

A method that keeps a model useful changes its weights little, often by less than a step of a coarse grid; rounded, the
model may be the one it was before (Zhang et al. 2025, arXiv 2410.16454: after 4 bits 83 % of what was gone is there).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from megafish.model.load import LoadedRun
from megafish.model.transformer import Transformer
from megafish.unlearn.data import Item, pack
from megafish.unlearn.objective import rmu_layer
from megafish.unlearn.options import Rounding

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


def without_direction(loaded: LoadedRun, start: LoadedRun, items: Sequence[Item]) -> LoadedRun:
    """A model that RMU steered, with the steered direction taken out of the output of its block.

    The direction is the mean difference of the block's outputs on `items` between this model and the one it started
    from. Where that one direction is all that stands between a model and what it forgot, the knowledge is back (facts
    and sources in docs/unlearn.md).
    """
    layer = rmu_layer(loaded.config)
    difference = _mean_hidden(loaded, items, layer) - _mean_hidden(start, items, layer)
    direction = difference / difference.norm().clamp(min=1e-12)
    model = copy.deepcopy(loaded.model)

    def project(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        unit = direction.to(output)
        return output - (output @ unit)[..., None] * unit

    model.blocks[layer - 1].register_forward_hook(project)
    return replace(loaded, model=model)


@torch.inference_mode()
def _mean_hidden(loaded: LoadedRun, items: Sequence[Item], layer: int) -> torch.Tensor:
    """Mean output of a block over all inputs of the texts, before any norm: fp32 [D]."""
    outputs: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        outputs.append(output[0].float().sum(dim=0))

    count = 0
    handle = loaded.model.blocks[layer - 1].register_forward_hook(keep)
    try:
        for begin in range(0, len(items), 32):
            packed = pack(items[begin : begin + 32], next(loaded.model.parameters()).device)
            bounds: dict[str, Any] = {"cu_seqlens": packed.cu_seqlens, "max_seqlen": packed.max_seqlen}
            loaded.model(packed.tokens, hidden_after=layer, **bounds)
            count += packed.tokens.shape[1]
    finally:
        handle.remove()
    return torch.stack(outputs).sum(dim=0) / count
