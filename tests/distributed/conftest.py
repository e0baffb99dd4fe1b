"""Runs of several real processes over gloo, as a user starts them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.helpers import Launch, start

SHAPE = "{num_layers: 2, hidden_size: 64, num_heads: 4, num_kv_heads: 2, intermediate_size: 128}"


@pytest.fixture
def settings(corpus: Path) -> list[str]:
    """Overrides of the tiny preset for a run of a second or two."""
    return [
        f"data.train={corpus}",
        f"model={SHAPE}",
        "data.sequence_length=64",
        "train.precision=fp32",
        "train.global_batch_size=8",
        "train.micro_batch_size=2",
        "optimizer.lr=2e-3",
        "eval={interval: 5, sequences: 8, dropped_sequences: 8}",
        "audit={prompt_tokens: 16, suffix_tokens: 8}",
    ]


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """`start` of tests.helpers in this test's folder."""
    return partial(start, tmp_path)
