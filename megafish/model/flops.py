"""What a model costs: parameters, floating-point operations a token, and what devices can do at best."""

from __future__ import annotations

import torch

from megafish.config import ModelConfig

PEAK_BF16_FLOPS: dict[str, float] = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "MI300X": 1307e12,
}
"""Dense bf16 operations per second by a part of the device's name (makers' data sheets); the first match counts."""


def padded_vocab_size(config: ModelConfig, vocab_size: int) -> int:
    """Rows of the embedding: config.vocab_size, or the real vocabulary rounded up to a multiple of 64."""
    return config.vocab_size if config.vocab_size is not None else -(-vocab_size // 64) * 64


def block_matrix_parameters(config: ModelConfig) -> int:
    """Weights of one block that take part in matrix products."""
    head_dim, width = config.resolved_head_dim, config.hidden_size
    attention = width * head_dim * (2 * config.num_heads + 2 * config.resolved_kv_heads)
    return attention + 3 * width * config.intermediate_size


def parameter_count(config: ModelConfig, vocab_size: int) -> int:
    """Trainable numbers of the model (tied embeddings counted once, padding rows included)."""
    width, head_dim = config.hidden_size, config.resolved_head_dim
    block = block_matrix_parameters(config) + 2 * width
    if config.qk_norm:
        block += 2 * head_dim
    if config.qkv_bias:
        block += head_dim * (config.num_heads + 2 * config.resolved_kv_heads)
    if config.mlp_bias:
        block += 2 * config.intermediate_size + width
    tables = 1 if config.tie_embeddings else 2
    return config.num_layers * block + width + tables * padded_vocab_size(config, vocab_size) * width


def flops_per_token(config: ModelConfig, vocab_size: int, sequence_length: int, kept_fraction: float = 1.0) -> float:
    """Operations of a training step for each input token: forward and backward (twice the forward), no recomputation.

    6 for every weight in a matrix product (the embedding is looked up, the head counts for kept tokens alone), plus
    for each layer 12 * num_heads * head_dim * (keys a token sees on average), which is
    6 * num_heads * head_dim * (S + 1) for causal attention over S tokens. PaLM's formula (arXiv 2204.02311, appendix B)
    counts the full square, twice that. Rows of several documents take less.
    """
    span = sequence_length if config.sliding_window is None else min(config.sliding_window, sequence_length)
    keys = span - span * (span - 1) / (2 * sequence_length)
    products = config.num_layers * block_matrix_parameters(config) + kept_fraction * vocab_size * config.hidden_size
    return 6 * products + 12 * config.num_layers * config.num_heads * config.resolved_head_dim * keys


def device_peak_flops(device: str | torch.device) -> float | None:
    """Dense bf16 peak of a CUDA device; None for CPUs and for devices that are not in the table."""
    device = torch.device(device)
    return peak_flops_by_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_flops_by_name(name: str) -> float | None:
    """Dense bf16 peak by the name that the driver reports, None where it is unknown."""
    # "NVIDIA H100 80GB HBM3 MIG 1g.10gb" is a slice of a device: the whole one's peak is out of its reach.
    if "MIG" in name.upper().split():
        return None
    # "NVIDIA H100 80GB HBM3" is the SXM part, "NVIDIA H100 PCIe" and "NVIDIA H100 NVL" say what they are.
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if part.lower() in name.lower()), None)
