"""The optimizer: AdamW with decoupled weight decay on the matrices."""

from __future__ import annotations

import torch

from megafish.config import OptimizerConfig
from megafish.model.transformer import Transformer


def parameter_groups(model: Transformer, config: OptimizerConfig) -> list[dict]:
    """Two groups: decayed and not decayed.

    Decayed are the weights of matrices (two dimensions or more). Norms and biases never are; the embedding and the
    output head only with `decay_embeddings` (a token that is rare would otherwise shrink towards zero between its
    occurrences). A tied embedding counts once.
    """
    embeddings = {id(model.embedding.weight), id(model.head.weight)}
    decayed: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []
    for parameter in model.parameters():
        decay = parameter.ndim >= 2 and (config.decay_embeddings or id(parameter) not in embeddings)
        (decayed if decay else kept).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: Transformer, config: OptimizerConfig) -> torch.optim.Optimizer:
    """torch's AdamW in its fused form: nothing is compiled at run time, on CPU or CUDA (Loshchilov and Hutter 2019)."""
    return torch.optim.AdamW(
        parameter_groups(model, config), lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )
