"""Words that make a run of a second or two."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def settings(corpus: Path) -> list[str]:
    return [
        "tiny",
        f"data.train={corpus}",
        "model={num_layers: 2, hidden_size: 64, num_heads: 4, num_kv_heads: 2, intermediate_size: 128}",
        "data.sequence_length=64",
        "train.precision=fp32",
        "train.device=cpu",
        "train.global_batch_size=8",
        "train.micro_batch_size=2",
        "train.steps=20",
        "eval={interval: null, sequences: 8, dropped_sequences: 0}",
    ]
