"""Tensors under Hugging Face's names and under ours, one at a time.

Ours are fused: queries, keys and values are one matrix, gate and up another, and the embedding has rows of padding
behind the vocabulary. Both have rotary pairs half a head apart, so no row changes its place within a head.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megafish.config import ModelConfig
from megafish.errors import InputError
from megafish.model.load import Tensors
from megafish.model.tensor_file import Entry

Part = tuple[str, int]
"""Name of a tensor at Hugging Face and its rows."""


def parts_of(config: ModelConfig, vocab_size: int) -> dict[str, list[Part]]:
    """What each of our tensors is made of, one below the other. `vocab_size`: rows of the embedding there."""
    width, inner = config.hidden_size, config.intermediate_size
    heads = config.num_heads * config.resolved_head_dim
    kv_heads = config.resolved_kv_heads * config.resolved_head_dim
    parts: dict[str, list[Part]] = {"embedding.weight": [("model.embed_tokens.weight", vocab_size)]}
    for layer in range(config.num_layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        parts[f"{ours}.attention_norm.weight"] = [(f"{theirs}.input_layernorm.weight", width)]
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            parts[f"{ours}.attention.qkv.{kind}"] = [
                (f"{attention}.q_proj.{kind}", heads),
                (f"{attention}.k_proj.{kind}", kv_heads),
                (f"{attention}.v_proj.{kind}", kv_heads),
            ]
        parts[f"{ours}.attention.out.weight"] = [(f"{attention}.o_proj.weight", width)]
        for which in ("q", "k") if config.qk_norm else ():
            norm = f"{attention}.{which}_norm.weight"
            parts[f"{ours}.attention.{which}_norm.weight"] = [(norm, config.resolved_head_dim)]
        parts[f"{ours}.feed_forward_norm.weight"] = [(f"{theirs}.post_attention_layernorm.weight", width)]
        for kind in ("weight", "bias") if config.mlp_bias else ("weight",):
            parts[f"{ours}.feed_forward.gate_up.{kind}"] = [
                (f"{mlp}.gate_proj.{kind}", inner),
                (f"{mlp}.up_proj.{kind}", inner),
            ]
            parts[f"{ours}.feed_forward.down.{kind}"] = [(f"{mlp}.down_proj.{kind}", width)]
    parts["norm.weight"] = [("model.norm.weight", width)]
    if not config.tie_embeddings:
        parts["head.weight"] = [("lm_head.weight", vocab_size)]
    return parts


def to_huggingface(config: ModelConfig, vocab_size: int, stored: Tensors, dtype: torch.dtype) -> Iterator[Entry]:
    """What is to be written under Hugging Face's names, read from our tensors when it is written."""
    for ours, parts in parts_of(config, vocab_size).items():
        shape, begin = stored.shape(ours), 0
        for theirs, rows in parts:

            def make(name: str = ours, begin: int = begin, end: int = begin + rows) -> torch.Tensor:
                return stored.rows(name, begin, end).to(dtype)

            yield Entry(theirs, dtype, (rows, *shape[1:]), make)
            begin += rows


def from_huggingface(
    config: ModelConfig, vocab_size: int, padded: int, stored: Tensors, dtype: torch.dtype
) -> Iterator[Entry]:
    """What is to be written under our names, read from Hugging Face's tensors when it is written.

    vocab_size: rows of the embedding there; padded: here. InputError for tensors that are missing, of another shape or
    not of this model.
    """
    wanted = parts_of(config, vocab_size)
    known = {theirs for parts in wanted.values() for theirs, _ in parts}
    # A tied head may be stored all the same; the rotary frequencies of old files follow from the configuration.
    ignored = {"lm_head.weight"} if config.tie_embeddings else set()
    for name in stored.files:
        if name not in known and name not in ignored and not name.endswith("rotary_emb.inv_freq"):
            raise InputError(f"{stored.folder}: tensor {name} has no place in the model that config.json describes")
    columns = _columns(config)
    for ours, parts in wanted.items():
        width = columns.get(ours.split(".", 2)[-1] if ours.startswith("blocks.") else ours)
        tail = () if width is None or ours.endswith("bias") else (width,)
        for theirs, rows in parts:
            shape = stored.shape(theirs)
            if shape != (rows, *tail):
                raise InputError(
                    f"{stored.folder}: {theirs} has shape {list(shape)}, config.json makes it {[rows, *tail]}"
                )
        rows = padded if ours in ("embedding.weight", "head.weight") else sum(rows for _, rows in parts)

        def make(parts: list[Part] = parts, rows: int = rows) -> torch.Tensor:
            found = torch.cat([stored.rows(theirs, 0, count) for theirs, count in parts]).to(dtype)
            missing = rows - len(found)
            return torch.cat((found, found.new_zeros(missing, *found.shape[1:]))) if missing else found

        yield Entry(ours, dtype, (rows, *tail), make)


def _columns(config: ModelConfig) -> dict[str, int]:
    """Columns of our matrices, by the name within a block."""
    return {
        "embedding.weight": config.hidden_size,
        "head.weight": config.hidden_size,
        "attention.qkv.weight": config.hidden_size,
        "attention.out.weight": config.num_heads * config.resolved_head_dim,
        "feed_forward.gate_up.weight": config.hidden_size,
        "feed_forward.down.weight": config.intermediate_size,
    }
