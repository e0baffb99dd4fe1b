from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megafish.audit.losses import held_out, kept_and_dropped, sequence_losses
from megafish.config import ModelConfig
from megafish.data.loader import IGNORE, Batch
from megafish.model.transformer import Transformer


class Known(nn.Module):
    """A "model" whose loss on target t is t / 10, and garbage where nothing is predicted."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, tokens: Tensor, *, targets: Tensor, per_token: bool, **_: object) -> Tensor:
        assert per_token and not torch.is_grad_enabled()
        return torch.where(targets == IGNORE, math.nan, targets / 10)


def batch(targets: list[list[int]], drop: list[list[int]]) -> Batch:
    wanted = torch.tensor(targets)
    bounds = torch.arange(0, wanted.numel() + 1, wanted.shape[1], dtype=torch.int32)
    return Batch(
        torch.zeros_like(wanted), wanted, torch.tensor(drop, dtype=torch.bool), bounds, wanted.shape[1], [], 0, 0
    )


def test_kept_and_dropped() -> None:
    batches = [batch([[10, 20, IGNORE], [30, IGNORE, 50]], [[0, 1, 0], [0, 0, 1]]), batch([[70, 80]], [[0, 0]])]
    result = kept_and_dropped(Known(), batches)
    assert (result["tokens_kept"], result["tokens_dropped"]) == (4, 2)
    assert result["loss_kept"] == pytest.approx((1 + 3 + 7 + 8) / 4)
    assert result["loss_dropped"] == pytest.approx((2 + 5) / 2)


def test_kept_and_dropped_where_nothing_is_dropped() -> None:
    result = kept_and_dropped(Known(), [batch([[10, 20]], [[0, 0]])])
    assert (
        result["loss_dropped"] is None and result["tokens_dropped"] == 0 and result["loss_kept"] == pytest.approx(1.5)
    )


def test_held_out() -> None:
    sizes = np.zeros(100, dtype=np.int64)
    sizes[[10, 20, 30]] = [1, 3, 4]
    # Id 40 is a special token: no bytes, but its loss counts.
    result = held_out(Known(), [batch([[10, 20], [30, IGNORE]], [[0, 1], [0, 0]]), batch([[40]], [[0]])], sizes)
    assert result is not None
    assert result["tokens"] == 4 and result["loss"] == pytest.approx(10 / 4)
    assert result["bits_per_byte"] == pytest.approx(10 / math.log(2) / 8)
    assert held_out(Known(), [], sizes) is None
    assert held_out(Known(), [batch([[IGNORE]], [[0]])], sizes) is None


def test_sequence_losses_read_each_sequence_as_its_own_document() -> None:
    model = Transformer(
        ModelConfig(num_layers=2, hidden_size=32, num_heads=2, intermediate_size=48, init_std=0.3), 50, seed=1
    ).eval()
    sequences = torch.randint(0, 50, (5, 9), generator=torch.Generator().manual_seed(0)).tolist()
    got = [row for rows in sequence_losses(model, sequences, batch_size=2) for row in rows]
    assert [len(row) for row in got] == [8] * 5
    for ids, row in zip(sequences, got, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]]))[0, :, :50].double()
        expected = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        assert row == pytest.approx(expected.tolist(), abs=1e-5)
