"""Hashes of weights against Python's integers, and who is named when they differ."""

from __future__ import annotations

import pytest
import torch

from megafish.train import replicas
from megafish.train.replicas import compare, tensor_hash


def oracle(tensor: torch.Tensor) -> int:
    """The same sum in Python's own integers."""
    size = tensor.element_size()
    raw = bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())
    total = 0
    for place in range(tensor.numel()):
        value = int.from_bytes(raw[place * size : (place + 1) * size], "little", signed=True)
        weight = (place % replicas._CHUNK + 1 + place // replicas._CHUNK * replicas._CHUNK) * 0x9E3779B97F4A7C15 % 2**64
        signed = weight - 2**64 if weight >= 2**63 else weight
        total += value * ((signed ^ (signed >> 29)) | 1)
    total %= 2**64
    return total - 2**64 if total >= 2**63 else total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_hash_is_the_sum_it_says(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(7, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = int(tensor_hash(tensor))
    assert whole == oracle(tensor)
    assert int(tensor_hash(tensor.t())) == oracle(tensor.t().contiguous())
    monkeypatch.setattr(replicas, "_CHUNK", 10)
    assert int(tensor_hash(tensor)) == whole, "independent of the chunks"


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, torch.int32), (torch.bfloat16, torch.int16)])
def test_every_single_bit_and_every_exchange_shows(dtype: torch.dtype, bits: torch.dtype) -> None:
    tensor = torch.randn(40, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = int(tensor_hash(tensor))
    for place in range(0, 40, 3):
        for bit in range(torch.iinfo(bits).bits):
            flipped = tensor.clone()
            flipped.view(bits)[place] ^= torch.tensor(1, dtype=bits) << bit
            assert int(tensor_hash(flipped)) != whole, (place, bit)
        exchanged = tensor.clone()
        exchanged[[place, (place + 7) % 40]] = tensor[[(place + 7) % 40, place]]
        assert int(tensor_hash(exchanged)) != whole
    assert int(tensor_hash(-torch.zeros(3, dtype=dtype))) != int(tensor_hash(torch.zeros(3, dtype=dtype)))


def test_the_odd_one_out_is_named_where_most_agree() -> None:
    alike = [0] * 4
    table = torch.tensor([[1, 5], [1, 5], [2, 5], [1, 5]])
    assert compare(["a", "b"], table, alike) == "a differs between the processes (suspect: rank 2)"
    table[2, 1], table[3, 1] = 6, 7
    assert compare(["a", "b"], table, alike) == "a, b differ between the processes (suspect: ranks 0, 1, 2, 3)"
    two = torch.tensor([[1, 2, 3, 4], [0, 0, 0, 0]])
    assert compare(list("abcd"), two, [0, 0]) == (
        "a, b, c and 1 more differ between the processes (suspect: ranks 0, 1)"
    )


def test_only_processes_with_the_same_shard_are_compared() -> None:
    table = torch.tensor([[1, 8], [2, 9], [1, 8], [2, 9], [1, 8], [3, 9]])
    shards = [0, 1, 0, 1, 0, 1]
    assert compare(["a", "b"], table, shards) == "a differs between the processes (suspect: rank 5)"
    assert compare(["a", "b"], table[:4], shards[:4]) is None
