"""The index of kept rows against nonzero()."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megafish_kernels import KeptRows, compact_rows


def check(keep: torch.Tensor, backend: Any) -> KeptRows:
    rows = compact_rows(keep, backend=backend)
    kept = keep.reshape(-1).nonzero()[:, 0].int()
    assert isinstance(rows, KeptRows)
    assert rows.index.dtype == rows.count.dtype == torch.int32
    assert rows.index.shape == (keep.numel(),) and rows.count.shape == ()
    assert rows.index.device == rows.count.device == keep.device
    assert int(rows.count) == len(kept)
    assert torch.equal(rows.index[: len(kept)], kept) and not rows.index[len(kept) :].any()
    return rows


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("size", [0, 1, 2, 255, 256, 257, 1000])
def test_rows_are_those_of_nonzero(size: int, backend: Any, triton_device: torch.device) -> None:
    draws = torch.rand(size, generator=torch.Generator().manual_seed(size)).to(triton_device)
    for share in (0.0, 0.02, 0.5, 0.98, 1.0):
        keep = draws < share
        first = check(keep, backend)
        again = check(keep, backend)
        assert torch.equal(first.index, again.index)
    check(torch.arange(size, device=triton_device) < size // 2, backend)
    check(torch.arange(size, device=triton_device) >= size // 2, backend)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_batches_count_in_row_major_order(backend: Any, triton_device: torch.device) -> None:
    keep = (torch.rand(3, 5, 40, generator=torch.Generator().manual_seed(0)) < 0.4).to(triton_device)
    check(keep, backend)
    check(keep.transpose(0, 2), backend)
    check(keep[:, :, 1::3], backend)
    check(keep[:, :0], backend)
    check(keep[0, 0, 0], backend)
    check(keep[:1, 0, :1].expand(7, 9), backend)


def test_a_step_needs_no_answer_from_the_device() -> None:
    # Meta tensors have no values: whoever asked for one would raise.
    rows = compact_rows(torch.empty((4, 7), dtype=torch.bool, device="meta"))
    assert rows.index.shape == (28,) and rows.count.shape == ()


def test_in_one_graph() -> None:
    compiled = torch.compile(compact_rows, fullgraph=True, backend="aot_eager")
    keep = torch.rand(6, 50, generator=torch.Generator().manual_seed(1)) < 0.5
    expected = compact_rows(keep)
    assert all(torch.equal(got, want) for got, want in zip(compiled(keep), expected, strict=True))


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"keep: expected bool, got torch\.int64"):
        compact_rows(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="keep: expected a tensor, got list"):
        compact_rows([True])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keep: 2147483648 rows"):
        compact_rows(torch.empty(2**31, dtype=torch.bool, device="meta"))
    with pytest.raises(ValueError, match="backend: 'cuda' is not one of"):
        compact_rows(torch.ones(3, dtype=torch.bool), backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='backend: "triton" cannot run on meta'):
        compact_rows(torch.empty(3, dtype=torch.bool, device="meta"), backend="triton")
