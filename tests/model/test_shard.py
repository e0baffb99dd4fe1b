"""Shards of parameters: take and put are each other's inverse, over any cut."""

from __future__ import annotations

import pytest
import torch

from megafish.model.shard import Shard, mark, shard_of


@pytest.mark.parametrize("dim", [0, 1])
def test_parts_of_a_fused_parameter_make_it_whole_again(dim: int) -> None:
    shape = (12, 5) if dim == 0 else (5, 12)
    full = torch.arange(60.0).reshape(shape)
    # Two processes; queries are 0..8, keys 8..10, values 10..12.
    shards = [
        Shard(dim, ((0, 4), (8, 9), (10, 11)), shape),
        Shard(dim, ((4, 8), (9, 10), (11, 12)), shape),
    ]
    again = torch.full(shape, -1.0)
    for shard in shards:
        part = shard.take(full)
        assert tuple(part.shape) == shard.shape
        shard.put(part, again)
    assert torch.equal(again, full)
    rows = shards[1].take(full).movedim(dim, 0)
    assert torch.equal(rows[4], full.movedim(dim, 0)[9])


def test_a_mark_is_read_back() -> None:
    shard = Shard(0, ((2, 4),), (4, 3))
    parameter = mark(torch.nn.Parameter(torch.zeros(2, 3)), shard)
    assert shard_of(parameter) is shard
    assert shard_of(torch.nn.Parameter(torch.zeros(2, 3))) is None
