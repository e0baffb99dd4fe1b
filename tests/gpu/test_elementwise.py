"""rms_norm, rotary and swiglu on a GPU against float64, at the widths of models."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.checks import check_norm, check_rotary, check_swiglu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("width", [64, 128, 1000, 2048, 4096, 8192, 16384, 32768])
def test_rms_norm(width: int, residual: bool, dtype: torch.dtype, device: torch.device) -> None:
    check_norm(device, dtype, 300, width, residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 64), (32, 8, 128), (9, 3, 96), (8, 4, 256)])
def test_rotary(
    heads: int, kv_heads: int, head_dim: int, fused: bool, dtype: torch.dtype, device: torch.device
) -> None:
    check_rotary(device, dtype, 500, heads, kv_heads, head_dim, fused)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [96, 1000, 8192, 14336])
def test_swiglu(width: int, dtype: torch.dtype, device: torch.device) -> None:
    check_swiglu(device, dtype, 300, width)
