"""The goldfish mask and the index of kept rows on a GPU: a million tokens with NumPy's bits."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.checks import MASKS, check_mask


@pytest.mark.parametrize("rows", [1, 250])
@pytest.mark.parametrize("options", MASKS)
def test_a_million_tokens(options: str, rows: int, device: torch.device) -> None:
    check_mask(device, 1_000_000, rows, MASKS[options])
