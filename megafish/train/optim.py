"""The optimizer: AdamW with decoupled weight decay on the matrices, or Muon for the hidden ones and AdamW beside it."""

from __future__ import annotations

from typing import Any

import torch

from megafish.config import OptimizerConfig
from megafish.model.shard import shard_of
from megafish.model.transformer import Attention, FeedForward, Transformer
from megafish.train.muon import Matrix, Muon
from megafish.train.partition import full_shape


def parameter_groups(model: Transformer, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups by weight decay, and with Muon a group of its own before them for the hidden matrices (marked `muon`).

    Decayed are the weights of matrices (two dimensions or more). Norms and biases never are; the embedding and the
    output head only with `decay_embeddings` (a token that is rare would otherwise shrink towards zero between its
    occurrences). A tied embedding counts once. What is frozen is in none.
    """
    embeddings = {id(model.embedding.weight), id(model.head.weight)}
    hidden: list[torch.Tensor] = []
    decayed: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        is_matrix, is_embedding = len(full_shape(parameter)) >= 2, id(parameter) in embeddings
        if config.name == "muon" and is_matrix and not is_embedding:
            hidden.append(parameter)
        elif is_matrix and (config.decay_embeddings or not is_embedding):
            decayed.append(parameter)
        else:
            kept.append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    if config.name == "muon":
        groups = [{"params": hidden, "weight_decay": config.weight_decay}, *groups]
        for group in groups:
            group["muon"] = group["params"] is hidden
    return [group for group in groups if group["params"]]


def build_optimizer(model: Transformer, config: OptimizerConfig) -> torch.optim.Optimizer:
    """torch's AdamW in its fused form: nothing is compiled at run time, on CPU or CUDA (Loshchilov and Hutter 2019).

    Muon's hidden matrices go to our own (Jordan 2024; Liu et al. 2025). No tensor parallelism may cut them.
    """
    groups = parameter_groups(model, config)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    rows = _fused_rows(model)
    matrices = []
    for parameter in groups[0]["params"]:
        assert shard_of(parameter) is None, "the configuration refuses Muon with tensor parallelism"
        height, width = full_shape(parameter)
        matrices.append(Matrix(parameter, (height, width), rows.get(id(parameter), (height,))))
    return Muon(groups, matrices, lr=config.lr, betas=config.betas, eps=config.eps, momentum=config.momentum)


def _fused_rows(model: Transformer) -> dict[int, tuple[int, ...]]:
    """Rows of the projections that share a weight, by the weight's id: queries, keys, values; gate, up."""
    rows: dict[int, tuple[int, ...]] = {}
    for module in model.modules():
        if isinstance(module, Attention):
            query, key = module.heads * module.head_dim, module.kv_heads * module.head_dim
            rows[id(module.qkv.weight)] = (query, key, key)
        elif isinstance(module, FeedForward):
            gate_up = module.gate_up.weight
            rows[id(gate_up)] = (full_shape(gate_up)[0] // 2,) * 2
    return rows
