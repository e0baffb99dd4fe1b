"""Files that the safetensors library reads back to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megafish.model.tensor_file import Cancelled, Entry, shards, write_tensors
from megafish.run import sha256_file


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "odd": torch.randn(7, generator=generator).bfloat16(),
        "matrix": torch.randn(5, 3, generator=generator),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "none": torch.empty(0, 4),
        "number": torch.tensor(3, dtype=torch.int64),
        "transposed": torch.randn(4, 6, generator=generator).t(),
    }
    path = tmp_path / "file.safetensors"
    sums = write_tensors(path, [Entry.of(name, tensor) for name, tensor in tensors.items()])
    assert sums == {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape, name
        assert torch.equal(bits(read[name]), bits(tensor)), name


def test_writing_stops_between_two_tensors(tmp_path: Path) -> None:
    asked = []

    def cancelled() -> bool:
        return len(asked) == 2

    def make() -> torch.Tensor:
        asked.append(True)
        return torch.zeros(3)

    entries = [Entry(name, torch.float32, (3,), make) for name in "abcd"]
    with pytest.raises(Cancelled):
        write_tensors(tmp_path / "file", entries, cancelled)
    assert len(asked) == 2


def test_files_are_filled_in_order() -> None:
    assert shards({"a": 4, "b": 4, "c": 4, "d": 20, "e": 1}, 8) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert shards({"a": 4}, 100) == [["a"]]
