"""A few steps of megafish's own model in bf16 on a GPU, beside fp32 on the CPU: with flash-attn, torch's kernel for
packed documents, or scaled_dot_product_attention, whichever model/attention.py chooses here."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.model_checks import check_decoding, check_model


@pytest.mark.parametrize(
    ("packed", "window", "tied"), [(False, None, False), (True, None, False), (True, 16, False), (True, None, True)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_steps(dtype: torch.dtype, packed: bool, window: int | None, tied: bool, device: torch.device) -> None:
    check_model(device, dtype, packed, window, tied)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_decoding(dtype: torch.dtype, device: torch.device) -> None:
    check_decoding(device, dtype)
