"""Kernels that ship nowhere: good and bad examples for the compiler's gates. Imported where triton compiles."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from megafish_kernels.report import Workload
from megafish_kernels.triton_runtime import launch


@triton.jit
def standin_product(a, b, c, m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # type: ignore[no-untyped-def]
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, k, BK):
        left = tl.load(a + rows[:, None] * k + inner[None, :] + start, mask=rows[:, None] < m, other=0)
        right = tl.load(b + columns[:, None] * k + inner[None, :] + start, mask=columns[:, None] < n, other=0)
        total = tl.dot(left, right.T, total)
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    tl.store(c + rows[:, None] * n + columns[None, :], total.to(c.dtype.element_ty), mask=inside)


@triton.jit
def standin_copy(x, y, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n), mask=at < n)


def _product(size: int, columns: int, warps: int, stages: int) -> Any:
    def start(arch: int) -> None:
        x = torch.empty(size, size, dtype=torch.bfloat16, device="meta")
        options = {"BM": 128, "BN": columns, "BK": 64, "num_warps": warps, "num_stages": stages}
        launch(standin_product, (size // 128, size // columns), x, x, x, size, size, size, **options)

    return start


def _copies(arch: int) -> None:
    # Two lengths with one specialization: compiled once. A third, not divisible by 16, is another one.
    for size in (4096, 8192, 4097):
        x = torch.empty(size, dtype=torch.float32, device="meta")
        launch(standin_copy, (-(-size // 1024),), x, x, size, BLOCK=1024, num_warps=4)


WORKLOADS = {
    "standin_good": Workload("", _product(1024, 128, 8, 3)),
    "standin_spilling": Workload("", _product(1024, 256, 4, 3)),
    "standin_large": Workload("", _product(1024, 128, 8, 12)),
    "standin_copy": Workload("", _copies),
}
PRODUCTS = {"standin_product", "standin_copy"}
"""standin_copy is none: what the gate has to find."""
