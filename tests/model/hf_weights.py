"""Weights of transformers' Llama-like models in this model's layout, for the tests."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megafish.model.transformer import Transformer


def from_hf(model: Transformer, peer: Mapping[str, torch.Tensor | None]) -> None:
    """Copy the peer's tensors (weights, or gradients under the weights' names) into the model."""

    def get(name: str) -> torch.Tensor:
        tensor = peer[name]
        assert tensor is not None, name
        return tensor.detach()

    def join(layer: int, part: str, names: tuple[str, ...], kind: str) -> torch.Tensor:
        return torch.cat([get(f"model.layers.{layer}.{part}.{name}_proj.{kind}") for name in names])

    state: dict[str, torch.Tensor] = {
        "embedding.weight": get("model.embed_tokens.weight"),
        "norm.weight": get("model.norm.weight"),
    }
    state["head.weight"] = state["embedding.weight"] if model.config.tie_embeddings else get("lm_head.weight")
    kinds = {"attention.qkv": ("weight", "bias") if model.config.qkv_bias else ("weight",)}
    kinds["attention.out"] = ("weight",)
    kinds["feed_forward.gate_up"] = kinds["feed_forward.down"] = (
        ("weight", "bias") if model.config.mlp_bias else ("weight",)
    )
    parts = {
        "attention.qkv": ("self_attn", ("q", "k", "v")),
        "attention.out": ("self_attn", ("o",)),
        "feed_forward.gate_up": ("mlp", ("gate", "up")),
        "feed_forward.down": ("mlp", ("down",)),
    }
    for layer in range(model.config.num_layers):
        prefix = f"blocks.{layer}"
        state[f"{prefix}.attention_norm.weight"] = get(f"model.layers.{layer}.input_layernorm.weight")
        state[f"{prefix}.feed_forward_norm.weight"] = get(f"model.layers.{layer}.post_attention_layernorm.weight")
        for name, (part, projections) in parts.items():
            for kind in kinds[name]:
                state[f"{prefix}.{name}.{kind}"] = join(layer, part, projections, kind)
        if model.config.qk_norm:
            for which in ("q", "k"):
                state[f"{prefix}.attention.{which}_norm.weight"] = get(
                    f"model.layers.{layer}.self_attn.{which}_norm.weight"
                )
    model.load_state_dict(state)
