"""Counts against the model itself and against sums written out."""

from __future__ import annotations

from typing import Any

import pytest

from megafish.config import ModelConfig
from megafish.model.flops import device_peak_flops, flops_per_token, parameter_count, peak_flops_by_name
from megafish.model.transformer import Transformer

SHAPE: dict[str, Any] = {"num_layers": 3, "hidden_size": 48, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 80}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"qk_norm": True, "head_dim": 16},
        {"qkv_bias": True, "mlp_bias": True, "vocab_size": 300},
    ],
)
def test_parameter_count_is_the_models(changes: dict[str, Any]) -> None:
    config = ModelConfig(**{**SHAPE, **changes})
    assert parameter_count(config, 90) == sum(p.numel() for p in Transformer(config, 90).parameters())


@pytest.mark.parametrize("window", [None, 1, 7, 100])
def test_flops_are_the_sum_over_products(window: int | None) -> None:
    config = ModelConfig(**SHAPE, sliding_window=window)
    length, vocab = 20, 90
    weights = sum(p.numel() for name, p in Transformer(config, vocab).named_parameters() if p.dim() == 2)
    weights -= 2 * 128 * 48  # the embedding, which is looked up, and the padded head
    keys = sum(min(place, window or length) for place in range(1, length + 1)) / length
    attention = (
        3 * 4 * 12 * keys * 2 * 2 * 3
    )  # layers, heads, head_dim, keys; multiply-add; two products; forward + 2 backward
    for kept in (1.0, 0.75):
        want = 6 * (weights + kept * vocab * 48) + attention
        assert flops_per_token(config, vocab, length, kept) == pytest.approx(want)


def test_peaks_by_name() -> None:
    assert peak_flops_by_name("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops_by_name("NVIDIA H100 PCIe") == 756e12
    assert peak_flops_by_name("NVIDIA A100-SXM4-40GB") == 312e12
    assert peak_flops_by_name("NVIDIA H200") == 989e12
    assert peak_flops_by_name("NVIDIA H200 NVL") == 835e12
    assert peak_flops_by_name("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert peak_flops_by_name("Some New Device") is None
    assert device_peak_flops("cpu") is None
