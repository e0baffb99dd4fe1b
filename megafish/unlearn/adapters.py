"""Adapters of an unlearning run: which are asked for, and how a checkpoint's weights are made from them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megafish.config import UnlearnConfig
from megafish.model.lora import LoRA, adapted_names, merged
from megafish.model.transformer import Transformer
from megafish.train.state import MASTER, StateReader, Weights


def lora_of(settings: UnlearnConfig) -> LoRA | None:
    """The adapters that are asked for."""
    if settings.lora_rank is None:
        return None
    alpha = 2.0 * settings.lora_rank if settings.lora_alpha is None else settings.lora_alpha
    return LoRA(settings.lora_rank, alpha, settings.seed)


def merged_weights(
    shapes: dict[str, tuple[int, ...]], start: Callable[[str], torch.Tensor], lora: LoRA, model: Transformer
) -> Weights:
    """The plain model's weights, each made from the starting one and the factors on disk.

    shapes: of the plain model's parameters. start: its weights by name. model: with its adapters.
    """
    adapted = adapted_names(model)

    def read(reader: StateReader, name: str) -> torch.Tensor:
        return merged(name, start, lambda factor: reader.whole(factor, MASTER), lora, adapted)

    return Weights(shapes, read)
