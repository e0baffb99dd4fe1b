"""The serial half of `prepare`: the units' token files, in order, to the .bin/.idx pairs of the splits.

Memory does not grow with the corpus: lengths and ks go through files of their own beside the tokens.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from megafish.data.canary import Canary, places
from megafish.data.encode import DOCUMENT, unit_file
from megafish.data.indexed import CODES, HEADER, MAGIC, VERSION
from megafish.data.manifest import DEFAULT_K

_COPY_BYTES = 4 << 20
_ROWS = 1 << 18
_TRAIN, _VALID, _OUT = 0, 1, 2


class HashedFile:
    """A new file whose size and sha256 are known when it is closed; a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self._sha256 = hashlib.sha256()
        self._file = open(path, "wb", buffering=_COPY_BYTES)  # noqa: SIM115 - closed by __exit__

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self.bytes += memoryview(data).nbytes

    def entry(self) -> dict[str, Any]:
        """As the manifest has it."""
        return {"bytes": self.bytes, "sha256": self._sha256.hexdigest()}

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Write what is left to write and close."""
        self._file.close()


class _Split:
    """One split as it is written: tokens to NAME.bin at once, lengths and ks beside it until `finish`."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype[Any], with_k: bool) -> None:
        self.name = name
        self.tokens = 0
        self.documents = 0
        self.text_bytes = 0
        self.bin = HashedFile(folder / f"{name}.bin")
        self._dtype = dtype
        self._folder = folder
        self._lengths: IO[bytes] = open(folder / f"{name}.lengths", "w+b")  # noqa: SIM115 - closed by close
        self._ks: IO[bytes] | None = open(folder / f"{name}.ks", "w+b") if with_k else None  # noqa: SIM115

    def add(self, lengths: npt.NDArray[np.int32], ks: npt.NDArray[np.int32], text_bytes: int) -> None:
        """Count documents whose tokens are written to `bin` by the caller."""
        self.tokens += int(lengths.sum(dtype=np.int64))
        self.documents += len(lengths)
        self.text_bytes += text_bytes
        self._lengths.write(np.ascontiguousarray(lengths, dtype="<i4").data)
        if self._ks is not None:
            self._ks.write(np.ascontiguousarray(ks, dtype="<i4").data)

    def finish(self) -> dict[str, Any]:
        """Close the .bin, write the .idx and the ks, and return the split's entry of the manifest."""
        self.bin.close()
        files = {self.bin.path.name: self.bin.entry()}
        with HashedFile(self._folder / f"{self.name}.idx") as index:
            index.write(HEADER.pack(MAGIC, VERSION, CODES[self._dtype], self.documents, self.documents + 1))
            for block in _blocks(self._lengths):
                index.write(block.data)
            start = 0
            for block in _blocks(self._lengths):
                ends = np.cumsum(block, dtype="<i8") * self._dtype.itemsize + start
                index.write(np.concatenate(([start], ends[:-1])).astype("<i8").data)
                start = int(ends[-1])
            for begin in range(0, self.documents + 1, _ROWS):
                index.write(np.arange(begin, min(begin + _ROWS, self.documents + 1), dtype="<i8").data)
        files[index.path.name] = index.entry()
        if self._ks is not None:
            with HashedFile(self._folder / f"{self.name}.k.npy") as array:
                layout = {"descr": "<i4", "fortran_order": False, "shape": (self.documents,)}
                np.lib.format.write_array_header_1_0(array, layout)
                for block in _blocks(self._ks):
                    array.write(block.data)
            files[array.path.name] = array.entry()
        self.close()
        return {"tokens": self.tokens, "documents": self.documents, "bytes": self.text_bytes, "files": files}

    def close(self) -> None:
        """Remove what is beside the split's files."""
        self.bin.close()
        for name, file in (("lengths", self._lengths), ("ks", self._ks)):
            if file is not None:
                file.close()
                (self._folder / f"{self.name}.{name}").unlink(missing_ok=True)


def assemble(
    units: Path,
    number_of_units: int,
    folder: Path,
    dtype: np.dtype[Any],
    *,
    eos_id: int,
    canaries: Sequence[Canary],
    canary_seed: int,
    left_out: Collection[int],
    with_valid: bool,
    with_k: bool,
    on_bytes: Callable[[int], None],
) -> dict[str, dict[str, Any]]:
    """Write train.bin, train.idx (and valid, and .k.npy) to `folder`; returns the `splits` of the manifest.

    `left_out`: digests of the documents that stay out of the corpus. The copies of `canaries` become documents of their
    own in train. `on_bytes` is told the bytes of tokens that have been copied.
    """
    excluded = np.array(sorted(left_out), dtype=np.uint64)
    splits = [_Split(folder, name, dtype, with_k) for name in ("train", "valid")[: 1 + with_valid]]
    train = splits[_TRAIN]
    canary_ids = [np.array([*canary.tokens, eos_id], dtype=dtype) for canary in canaries]
    own = 0  # documents in train that are not canaries

    def insert_copies() -> None:
        for number in copies.take(own):
            ids = canary_ids[number]
            text_bytes = len(canaries[number].text.encode("utf-8"))
            train.add(np.array([len(ids)], dtype=np.int32), np.array([DEFAULT_K], dtype=np.int32), text_bytes)
            train.bin.write(ids.data)

    try:
        copies = _Copies([])
        if canaries:
            own_documents = sum(
                int((_destinations(rows, excluded) == _TRAIN).sum())
                for number in range(number_of_units)
                for rows in _rows(units, number)
            )
            copies = _Copies(places(canaries, canary_seed, own_documents))
        for number in range(number_of_units):
            with open(unit_file(units, number, "tokens"), "rb", buffering=_COPY_BYTES) as source:
                for rows in _rows(units, number):
                    destinations = _destinations(rows, excluded)
                    for start, stop in _runs(destinations, own, copies):
                        run, destination = rows[start:stop], destinations[start]
                        size = int(run["length"].sum(dtype=np.int64)) * dtype.itemsize
                        if destination == _OUT:
                            source.seek(size, os.SEEK_CUR)
                        else:
                            if destination == _TRAIN:
                                insert_copies()
                                own += stop - start
                            split = splits[destination]
                            split.add(run["length"], run["k"], int(run["bytes"].sum(dtype=np.int64)))
                            _copy(source, split.bin, size)
                        on_bytes(size)
        insert_copies()
        return {split.name: split.finish() for split in splits}
    finally:
        for split in splits:
            split.close()


class _Copies:
    """The canaries' copies that have not been inserted yet, in order of place."""

    def __init__(self, copies: Sequence[tuple[int, int]]) -> None:
        self._places = np.array([place for place, _ in copies], dtype=np.int64)
        self._numbers = [number for _, number in copies]
        self._taken = 0

    def places_between(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """The places p with first < p < last, each once."""
        begin, end = np.searchsorted(self._places, [first + 1, last])
        return np.unique(self._places[begin:end])

    def take(self, place: int) -> list[int]:
        """Numbers of the canaries whose copies belong at `place` or before; they count as inserted."""
        begin, self._taken = self._taken, int(np.searchsorted(self._places, place, side="right"))
        return self._numbers[begin : self._taken]


def _destinations(rows: npt.NDArray[Any], excluded: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Where documents go, [n]: train, valid or out."""
    found = np.where(rows["valid"] == 1, _VALID, _TRAIN)
    found[np.isin(rows["digest"], excluded)] = _OUT
    return found


def _runs(destinations: npt.NDArray[np.int64], own: int, copies: _Copies) -> Iterator[tuple[int, int]]:
    """Rows [start, stop) that go to one place, cut where a copy comes in. `own`: train's documents before them."""
    changes = np.flatnonzero(np.diff(destinations)) + 1
    in_train = np.flatnonzero(destinations == _TRAIN)
    inserts = in_train[copies.places_between(own, own + len(in_train)) - own]
    cuts = np.unique(np.concatenate(([0], changes, inserts, [len(destinations)])))
    return itertools.pairwise(cuts.tolist())


def _rows(units: Path, number: int) -> Iterator[npt.NDArray[Any]]:
    """The documents of a unit, in blocks."""
    with open(unit_file(units, number, "documents"), "rb") as file:
        while len(rows := np.frombuffer(file.read(_ROWS * DOCUMENT.itemsize), dtype=DOCUMENT)):
            yield rows


def _blocks(file: IO[bytes]) -> Iterator[npt.NDArray[Any]]:
    """The int32 values of a file from its beginning on, in blocks."""
    file.seek(0)
    while len(block := np.frombuffer(file.read(4 * _ROWS), dtype="<i4")):
        yield block


def _copy(source: IO[bytes], target: HashedFile, size: int) -> None:
    while size:
        data = source.read(min(size, _COPY_BYTES))
        assert data, "a unit's token file is shorter than its documents"
        target.write(data)
        size -= len(data)
