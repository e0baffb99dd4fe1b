"""Optimizer state on disk, in pieces that any layout of processes can read.

Each process writes what it owns, one safetensors file: for each parameter a range of the flattened parameter, once for
the fp32 master weight and once for each tensor that the optimizer keeps of it. index.json says which file holds which
range. A process of another layout maps the files into its memory and reads the ranges that it needs. Nothing is
gathered, nothing converted, nothing unpickled.

optimizer/rank_00000.safetensors    tensors STATE/PARAMETER, 1-D: master, exp_avg, exp_avg_sq, ...
optimizer/index.json                {"parameters": {PARAMETER: {"shape", "states", "scalars", "shards", "pieces"}}}

A tensor-parallel process owns ranges of its part of the parameter (`Shard`), which stands in the index; where the parts
now wanted are others, the parameter is put together first, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megafish.errors import InputError
from megafish.model.shard import Shard
from megafish.model.tensor_file import Cancel, Entry, never, write_tensors
from megafish.run import read_json

FOLDER = "optimizer"
INDEX = "index.json"
MASTER = "master"
"""State name of the fp32 weights."""

_OPEN_FILES = 64  # of possibly thousands; a process may open 1,024 by default


@dataclass(frozen=True)
class Scalar:
    """A number that the optimizer keeps of a parameter, such as its steps."""

    value: float
    is_tensor: bool
    """Whether the optimizer keeps it as a tensor of no dimension, or as a Python number."""


@dataclass(frozen=True)
class Piece:
    """Elements begin ... end - 1 of a flattened parameter, and what the optimizer keeps of them."""

    parameter: str
    shape: tuple[int, ...]
    """Of the full parameter."""
    shard: Shard | None
    """Which part of it is flattened here; None: the whole."""
    begin: int
    end: int
    states: dict[str, torch.Tensor]
    """1-D views of end - begin elements each."""
    scalars: dict[str, Scalar]


def write_pieces(folder: Path, rank: int, pieces: Sequence[Piece], cancelled: Cancel = never) -> dict[str, Any]:
    """Write this process's file below `folder`; returns its receipt: {"files": checksums, "pieces": for the index}."""
    name = f"rank_{rank:05d}.safetensors"
    entries = [
        Entry.of(f"{state}/{piece.parameter}", tensor) for piece in pieces for state, tensor in piece.states.items()
    ]
    sums = write_tensors(folder / FOLDER / name, entries, cancelled)
    return {
        "files": {f"{FOLDER}/{name}": sums},
        "pieces": [
            {
                "parameter": piece.parameter,
                "shape": list(piece.shape),
                "states": sorted(piece.states),
                "scalars": {key: [scalar.value, scalar.is_tensor] for key, scalar in sorted(piece.scalars.items())},
                "shard": None if piece.shard is None else [piece.shard.dim, [list(r) for r in piece.shard.ranges]],
                "piece": [name, piece.begin, piece.end],
            }
            for piece in pieces
        ],
    }


def make_index(receipts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The content of index.json, from the receipts of all processes. Every element must be there once."""
    parameters: dict[str, dict[str, Any]] = {}
    for receipt in receipts:
        for entry in receipt["pieces"]:
            name = entry["parameter"]
            same = {key: entry[key] for key in ("shape", "states", "scalars")}
            known = parameters.setdefault(name, {**same, "shards": [], "pieces": []})
            assert all(known[key] == value for key, value in same.items()), (name, known, same)
            if entry["shard"] not in known["shards"]:
                known["shards"].append(entry["shard"])
            known["pieces"].append([known["shards"].index(entry["shard"]), *entry["piece"]])
    for name, known in parameters.items():
        _check_cover(name, known)
    ordered = {name: parameters[name] for name in sorted(parameters)}
    return {"format": "megafish-optimizer", "version": 1, "parameters": ordered}


def _check_cover(name: str, known: dict[str, Any]) -> None:
    """The pieces of each shard follow each other without gap or overlap, and the shards make up the parameter."""
    known["pieces"].sort(key=lambda piece: (piece[0], piece[2]))
    held: list[tuple[int, int]] = []
    dim = 0
    for number, stored in enumerate(known["shards"]):
        shard = _shard(stored, known["shape"])
        at = 0
        for _, file, begin, end in (piece for piece in known["pieces"] if piece[0] == number):
            assert begin == at and end > begin, (name, file, begin, at)
            at = end
        assert at == torch.Size(known["shape"] if shard is None else shard.shape).numel(), (name, at)
        held += [(0, known["shape"][0])] if shard is None else list(shard.ranges)
        dim = dim if shard is None else shard.dim
    held.sort()
    assert held[0][0] == 0 and held[-1][1] == known["shape"][dim], (name, held)
    assert all(before[1] == after[0] for before, after in pairwise(held)), (name, held)


def _shard(stored: list[Any] | None, shape: Sequence[int]) -> Shard | None:
    if stored is None:
        return None
    dim, ranges = stored
    return Shard(dim, tuple((begin, end) for begin, end in ranges), tuple(shape))


class StateReader:
    """The optimizer state of a checkpoint, by parameter and range.

    `folder`: the checkpoint. `index`: content of index.json, default what is in the folder. Raises InputError for what
    is missing, damaged or does not fit.
    """

    def __init__(self, folder: Path, index: dict[str, Any] | None = None) -> None:
        self.folder = folder / FOLDER
        self.index = read_json(self.folder / INDEX) if index is None else index
        self.parameters: dict[str, dict[str, Any]] = self.index["parameters"]
        self._open = lru_cache(maxsize=_OPEN_FILES)(self._open_file)
        self._whole: tuple[str, str, torch.Tensor] | None = None

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the full parameter."""
        return tuple(self._entry(name)["shape"])

    def states(self, name: str) -> list[str]:
        """Names of the tensors that are kept of a parameter, the fp32 weight among them."""
        return list(self._entry(name)["states"])

    def scalars(self, name: str) -> dict[str, Scalar]:
        """Numbers that the optimizer keeps of a parameter."""
        return {key: Scalar(*stored) for key, stored in self._entry(name)["scalars"].items()}

    def read(self, name: str, state: str, shard: Shard | None, begin: int, end: int) -> torch.Tensor:
        """Elements begin ... end - 1 of a parameter's flattened part `shard` (None: of the whole parameter). 1-D."""
        entry = self._entry(name)
        for number, stored in enumerate(entry["shards"]):
            if _shard(stored, entry["shape"]) == shard:
                return self._range(name, state, number, begin, end)
        whole = self.whole(name, state)
        return (whole if shard is None else shard.take(whole)).reshape(-1)[begin:end]

    def whole(self, name: str, state: str) -> torch.Tensor:
        """A full parameter's state, in its shape. The last one is kept for the next call."""
        if self._whole is None or self._whole[:2] != (name, state):
            entry = self._entry(name)
            parts = []
            for number, stored in enumerate(entry["shards"]):
                shard = _shard(stored, entry["shape"])
                shape = torch.Size(entry["shape"] if shard is None else shard.shape)
                parts.append((shard, self._range(name, state, number, 0, shape.numel()).view(shape)))
            if parts[0][0] is None:
                full = parts[0][1]
            else:
                full = torch.empty(entry["shape"], dtype=parts[0][1].dtype)
                for shard, part in parts:
                    assert shard is not None, (name, entry["shards"])
                    shard.put(part, full)
            self._whole = (name, state, full)
        return self._whole[2]

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """InputError unless the checkpoint is of a model with exactly these parameters (full shapes)."""
        other = sorted(shapes.keys() ^ self.parameters.keys())
        if other:
            where = "the checkpoint" if other[0] in self.parameters else "the model"
            raise InputError(
                f"{self.folder}: {len(other)} parameters differ ({other[0]} is in {where} alone): the checkpoint is of "
                "another model (section model)"
            )
        for name, shape in shapes.items():
            if self.shape(name) != shape:
                raise InputError(
                    f"{self.folder}: {name} has shape {list(self.shape(name))}, the model needs {list(shape)}: the "
                    "checkpoint is of another model (section model, or another tokenizer)"
                )

    def _entry(self, name: str) -> dict[str, Any]:
        if name not in self.parameters:
            raise InputError(f"{self.folder}: holds no parameter {name}: the checkpoint is of another model")
        return self.parameters[name]

    def _range(self, name: str, state: str, shard: int, begin: int, end: int) -> torch.Tensor:
        """Elements begin ... end - 1 of one stored shard, from all files that hold some of them."""
        parts = []
        for number, file, first, last in self._entry(name)["pieces"]:
            low, high = max(begin, first), min(end, last)
            if number == shard and low < high:
                try:
                    parts.append(self._open(file).get_slice(f"{state}/{name}")[low - first : high - first])
                except (SafetensorError, OSError) as error:
                    raise InputError(f"{self.folder / file}: cannot be read ({error}): the file is damaged") from None
        assert sum(map(len, parts)) == end - begin, (name, state, begin, end)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _open_file(self, file: str) -> Any:
        return safe_open(self.folder / file, framework="pt")


@dataclass(frozen=True)
class Weights:
    """The model's weights, and how each is made from what is trained."""

    shapes: dict[str, tuple[int, ...]]
    """Of all full parameters."""
    read: Callable[[StateReader, str], torch.Tensor]
    """A full parameter in fp32, by its name, from the trained ones on disk."""


def trained(reader: StateReader, name: str) -> torch.Tensor:
    """A parameter that is trained itself."""
    return reader.whole(name, MASTER)
