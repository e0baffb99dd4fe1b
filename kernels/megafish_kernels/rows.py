"""Which rows of a batch a loss works on: a mask's rows as an index and a count, without asking the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class KeptRows(NamedTuple):
    """The rows of a flattened batch that are kept: `index[:count]`."""

    index: Tensor  # type: ignore[assignment]  # not the tuple's method
    """int32 [N]: the kept rows, ascending, and then 0 to the end: row 0 may be read there, but it means nothing."""
    count: Tensor | int  # type: ignore[assignment]
    """int32, 0-d: how many rows are kept, on the device of `index`. An int where the host knows it: all of `index`."""


def compact_rows(keep: Tensor) -> KeptRows:
    """The rows where `keep` is True, in ascending order. The host never waits: shapes do not depend on values.

    Args:
        keep: bool [...], flattened in row-major order to N rows; N below 2^31.

    Returns:
        KeptRows on the device of `keep`.

    Raises:
        ValueError: `keep` is not bool, or has too many rows.
    """
    if keep.dtype != torch.bool:
        raise ValueError(f"keep: expected bool, got {keep.dtype}")
    if keep.numel() >= 2**31:
        raise ValueError(f"keep: {keep.numel()} rows; an int32 index holds fewer than 2^31")
    return _compact_torch(keep.reshape(-1))


def _compact_torch(keep: Tensor) -> KeptRows:
    row = torch.arange(keep.numel(), device=keep.device)
    rank = keep.cumsum(0)
    count = keep.sum()
    # Rows left out go behind the kept ones, each to a place of its own: a scatter without collisions is deterministic.
    place = torch.where(keep, rank - 1, count + row - rank)
    index = torch.empty(keep.shape, dtype=torch.int32, device=keep.device)
    index.scatter_(0, place, torch.where(keep, row, 0).int())
    return KeptRows(index, count.int())
