"""All operators in one graph of torch.compile, with its own code generator."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.checks import ROWS, check_compiled


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_graph(reduction: str, rows: str, dtype: torch.dtype, device: torch.device) -> None:
    check_compiled(device, dtype, "inductor", reduction, rows)
