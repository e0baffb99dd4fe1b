"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): the matrices of the blocks stay, a product of two thin ones is
added to each and trained. A checkpoint holds the thin ones for going on, and the sums as the model's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from megafish.model.mesh import Axis
from megafish.model.transformer import Initializer, Transformer

_PLACES = (("attention", "qkv"), ("attention", "out"), ("feed_forward", "gate_up"), ("feed_forward", "down"))


@dataclass(frozen=True)
class LoRA:
    """rank: of the product; it is multiplied by alpha / rank. seed: of the first factor; the second begins at zero."""

    rank: int
    alpha: float
    seed: int

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / self.rank


class LowRankLinear(nn.Module):
    """y = W x + b + scale * up (down x), with W and b as they were."""

    def __init__(self, base: nn.Module, down: nn.Parameter, up: nn.Parameter, scale: float) -> None:
        super().__init__()
        self.base, self.down, self.up, self.scale = base, down, up, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        out: torch.Tensor = self.base(x) + self.scale * F.linear(F.linear(x, self.down), self.up)
        return out


def adapt(model: Transformer, lora: LoRA, chosen: Callable[[str], bool]) -> None:
    """Put adapters beside the matrices of the blocks whose names are `chosen`; nothing else is trained any more.

    To be called where the model is made, under train.engine.building. The first factor is normal with a variance of
    1 / inputs, a function of the seed and the name alone.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    width, config = model.config.hidden_size, model.config
    inner, heads = config.num_heads * config.resolved_head_dim, config.num_heads + 2 * config.resolved_kv_heads
    sizes = {
        "qkv": (heads * config.resolved_head_dim, width),
        "out": (width, inner),
        "gate_up": (2 * config.intermediate_size, width),
        "down": (width, config.intermediate_size),
    }
    init = Initializer(lora.seed, Axis())
    for name, owner, place in _matrices(model):
        if not chosen(f"{name}.weight"):
            continue
        rows, columns = sizes[place]
        down = init.normal(f"{name}.lora_down", (lora.rank, columns), columns**-0.5)
        up = init.constant(f"{name}.lora_up", (rows, lora.rank), 0.0)
        setattr(owner, place, LowRankLinear(getattr(owner, place), down, up, lora.scale))


def merged(
    name: str,
    start: Callable[[str], torch.Tensor],
    factor: Callable[[str], torch.Tensor],
    lora: LoRA,
    adapted: set[str],
) -> torch.Tensor:
    """A parameter of the plain model, fp32: the starting one and, where it has an adapter, the product of its factors.

    factor: a factor by its name. adapted: names of matrices with adapters, without `.weight`.
    """
    weight = start(name)
    matrix = name.removesuffix(".weight")
    if matrix not in adapted:
        return weight
    return weight + lora.scale * (factor(f"{matrix}.up").float() @ factor(f"{matrix}.down").float())


def adapted_names(model: Transformer) -> set[str]:
    """Names of the matrices that have adapters."""
    return {name for name, owner, place in _matrices(model) if isinstance(getattr(owner, place), LowRankLinear)}


def _matrices(model: Transformer) -> Iterator[tuple[str, nn.Module, str]]:
    for number, block in enumerate(model.blocks):
        for room, place in _PLACES:
            yield f"blocks.{number}.{room}.{place}", getattr(block, room), place
