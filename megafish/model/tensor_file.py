"""Writing safetensors files a tensor at a time.

The library's own `save_file` takes all tensors of a file at once and returns no checksum. Here a file may be larger
than the memory: each tensor is asked for when its turn comes, its bytes are hashed on their way to the disk, and other
threads go on meanwhile. The format: 8 bytes with the length of the header (little-endian), the header in JSON, then the
tensors (https://huggingface.co/docs/safetensors, section Format). The library reads it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from megafish.errors import InputError
from megafish.run import sha256_file

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, made when it is written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]
    """Gives the tensor, of this dtype and shape, on any device."""

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> Entry:
        """An entry for a tensor that is there already."""
        return cls(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Cancelled(Exception):
    """Raised in a writer that is not wanted any more."""


Cancel = Callable[[], bool]
"""Says whether what is being written is not wanted any more."""


def never() -> bool:
    """The Cancel of who waits for the end."""
    return False


def write_tensors(path: Path, entries: Sequence[Entry], cancelled: Cancel = never) -> dict[str, Any]:
    """Write `entries` to `path`, read the file back and return {"bytes": its size, "sha256": hex digest}.

    The file has reached the disk when this returns. Raises InputError when what is read back is not what was written,
    and Cancelled as soon as `cancelled` says so between two tensors.
    """
    # Wider types first, as the library does it: every tensor then lies at a multiple of its item size.
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    digest = hashlib.sha256()
    # A process that is forked meanwhile must not inherit half a file's buffer: no buffering.
    with open(path, "wb", buffering=0) as handle:
        for chunk in chain([_header(ordered)], map(_tensor_bytes, ordered)):
            if cancelled():
                raise Cancelled
            digest.update(chunk)
            _write_all(handle.fileno(), chunk)
        os.fsync(handle.fileno())
    if sha256_file(path) != digest.hexdigest():
        raise InputError(f"{path}: what is read back is not what was written: check the file system and its disk")
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _header(entries: Sequence[Entry]) -> memoryview:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": _CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.bytes],
        }
        at += entry.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return memoryview(len(text).to_bytes(8, "little") + text)


def _tensor_bytes(entry: Entry) -> memoryview:
    tensor = entry.make().detach().cpu().contiguous()
    assert tensor.dtype == entry.dtype and tuple(tensor.shape) == entry.shape, (entry, tensor.dtype, tensor.shape)
    # numpy knows no bfloat16: the bytes are all that is needed.
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names of the tensors of each file, in the order given; at most `limit` bytes a file, or one tensor."""
    files: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if files[-1] and used + size > limit:
            files.append([])
            used = 0
        files[-1].append(name)
        used += size
    return files
