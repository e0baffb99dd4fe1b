"""Token files in Megatron's .bin/.idx layout: memory-mapped reading, checked on opening, and atomic writing.

The .bin holds the token ids of all sequences, one after the other. The .idx, little-endian and without padding, holds:

    0    magic "MMIDIDX\\0\\0"                      9 bytes
    9    version 1                                uint64
    17   code of the token dtype                  uint8
    18   S, number of sequences                   uint64
    26   D, number of documents + 1               uint64
    34   lengths of the sequences [tokens]        int32  [S]
    ..   byte offsets of the sequences in .bin    int64  [S]
    ..   first sequence of each document, then S  int64  [D]

(Megatron-LM, megatron/core/datasets/indexed_dataset.py.) A document is one sequence or several, or none at all.
"""

from __future__ import annotations

import mmap
import os
import struct
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megafish.errors import InputError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
# Token ids are integers. Megatron's codes 6 and 7 are floats (which gpt-neox numbers the other way round).
DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("<u1"),
    2: np.dtype("<i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}

# Rows of the index checked or written at one time: bounds the memory (8 MiB an array) and stays vectorised.
_BLOCK = 1 << 20


def optimal_dtype(vocab_size: int) -> np.dtype[Any]:
    """Smallest dtype that Megatron chooses for a vocabulary: uint16 below 65,500 ids, otherwise int32."""
    return DTYPES[8] if vocab_size < 65500 else DTYPES[4]


def file_pair(prefix: str | Path) -> tuple[Path, Path]:
    """Paths of the .bin and the .idx of a prefix; a path with either extension stands for its prefix."""
    text = os.fspath(prefix)
    text = text[:-4] if text.endswith((".bin", ".idx")) else text
    return Path(text + ".bin"), Path(text + ".idx")


class IndexedDataset:
    """The documents of one .bin/.idx pair as one stream of tokens, memory-mapped.

    Opening checks the header, the sizes of both files, every sequence's offset and every document's index, so that a
    truncated or damaged file is refused by name and byte offset before a token is read. Raises InputError.

    Attributes: `dtype` of the ids; `tokens`, the whole stream [num_tokens] (a view of the file); `num_tokens`,
    `num_documents`, `num_sequences`; `one_sequence_each`, whether that is what every document is; `bin_path`,
    `idx_path`.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.bin_path, self.idx_path = file_pair(prefix)
        bin_map, bin_bytes = _map(self.bin_path)
        if isinstance(bin_map, mmap.mmap) and hasattr(mmap, "MADV_RANDOM"):
            # Samples are read in random order: reading ahead would fetch up to 128 KiB for each 4 KiB used.
            bin_map.madvise(mmap.MADV_RANDOM)
        idx_map, idx_bytes = _map(self.idx_path)
        if idx_bytes < HEADER.size:
            raise InputError(
                f"{self.idx_path}: {idx_bytes} bytes, the header alone takes {HEADER.size}: the file is truncated, "
                "write it again"
            )
        magic, version, code, num_sequences, num_entries = HEADER.unpack_from(idx_map)
        if magic != MAGIC:
            raise InputError(f"{self.idx_path}: byte 0: magic {magic!r}, expected {MAGIC!r}: not a Megatron .idx file")
        if version != VERSION:
            raise InputError(f"{self.idx_path}: byte 9: version {version}, only version {VERSION} is known")
        if code not in DTYPES:
            raise InputError(
                f"{self.idx_path}: byte 17: dtype code {code} is not an integer type (known: "
                + ", ".join(f"{known} {dtype.name}" for known, dtype in DTYPES.items())
                + ")"
            )
        expected = HEADER.size + 12 * num_sequences + 8 * num_entries
        if idx_bytes != expected:
            raise InputError(
                f"{self.idx_path}: {idx_bytes} bytes, its header (byte 18: {num_sequences} sequences, byte 26: "
                f"{num_entries} document entries) asks for {expected}: truncated or damaged, write it again"
            )
        if num_entries < 1:
            raise InputError(f"{self.idx_path}: byte 26: no document entries, even an empty file has one")
        self.dtype = DTYPES[code]
        self.num_sequences = int(num_sequences)
        self.num_documents = int(num_entries) - 1
        self._lengths = np.frombuffer(idx_map, "<i4", self.num_sequences, HEADER.size)
        self._pointer_offset = HEADER.size + 4 * self.num_sequences
        self._pointers = np.frombuffer(idx_map, "<i8", self.num_sequences, self._pointer_offset)
        self._document_offset = self._pointer_offset + 8 * self.num_sequences
        self._documents = np.frombuffer(idx_map, "<i8", self.num_documents + 1, self._document_offset)
        self._first_byte = 0
        stream_bytes = self._check_pointers()
        self.one_sequence_each = self._check_documents()
        if bin_bytes != stream_bytes:
            raise InputError(
                f"{self.bin_path}: {bin_bytes} bytes, {self.idx_path.name} describes {stream_bytes}: "
                + ("truncated" if bin_bytes < stream_bytes else "not the file of this index")
                + f" at byte {min(bin_bytes, stream_bytes)}, write or copy the pair again"
            )
        self.num_tokens = stream_bytes // self.dtype.itemsize
        self.tokens: npt.NDArray[Any] = np.frombuffer(bin_map, self.dtype, self.num_tokens)

    def __len__(self) -> int:
        return self.num_documents

    def part(self, first: int, last: int) -> IndexedDataset:
        """The documents [first, last) as a stream of their own (views of the same files), of one sequence each."""
        assert self.one_sequence_each and 0 <= first <= last <= self.num_documents, (first, last)
        start, stop = self._start(first), self._start(last)
        part = copy(self)
        part._lengths, part._pointers = self._lengths[first:last], self._pointers[first:last]
        part._first_byte = self._first_byte + start * self.dtype.itemsize
        part.num_documents = part.num_sequences = last - first
        part.tokens, part.num_tokens = self.tokens[start:stop], stop - start
        return part

    def bounds(self, document: int) -> tuple[int, int]:
        """First token of a document and the one after its last, as offsets into the stream."""
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} of {self.num_documents}")
        return self._start(document), self._start(document + 1)

    def document(self, document: int) -> npt.NDArray[Any]:
        """Token ids of a document, all its sequences together [n] (a view of the file)."""
        start, stop = self.bounds(document)
        return self.tokens[start:stop]

    def documents_in(self, start: int, stop: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Documents that share a token with the stream's [start, stop): their numbers and first tokens, both int64 [m].

        Empty documents are left out. Takes O(log documents + m) time: nothing is kept in memory.
        """
        assert 0 <= start < stop <= self.num_tokens, (start, stop, self.num_tokens)
        # The last of the documents that start at or before `start` is the one with tokens there: empty ones that start
        # at the same token stand before it.
        if self.one_sequence_each:
            itemsize, base = self.dtype.itemsize, self._first_byte
            first = bisect_right(self._pointers, base + start * itemsize) - 1
            last = bisect_left(self._pointers, base + stop * itemsize, lo=first)
            starts = (self._pointers[first:last] - base) // itemsize
        else:
            everything = range(self.num_documents)
            first = bisect_right(everything, start, key=self._start) - 1
            last = bisect_left(everything, stop, lo=first, key=self._start)
            starts = np.array([self._start(document) for document in range(first, last)], dtype=np.int64)
        numbers = np.arange(first, last)
        empty = starts[1:] == starts[:-1]
        if empty.any():
            keep = np.append(~empty, True)
            numbers, starts = numbers[keep], starts[keep]
        return numbers, starts

    def _start(self, document: int) -> int:
        sequence = document if self.one_sequence_each else int(self._documents[document])
        if sequence == self.num_sequences:
            return self.num_tokens
        return (int(self._pointers[sequence]) - self._first_byte) // self.dtype.itemsize

    def _check_pointers(self) -> int:
        """Check lengths and byte offsets; returns the bytes that the .bin must hold."""
        total = 0
        for begin in range(0, self.num_sequences, _BLOCK):
            lengths = self._lengths[begin : begin + _BLOCK].astype(np.int64)
            if lengths.min() < 0:
                bad = begin + int(np.argmax(lengths < 0))
                raise InputError(
                    f"{self.idx_path}: byte {HEADER.size + 4 * bad}: sequence {bad} has length {self._lengths[bad]}: "
                    "damaged, write it again"
                )
            ends = np.cumsum(lengths) * self.dtype.itemsize + total
            pointers = self._pointers[begin : begin + _BLOCK]
            wrong = pointers != np.concatenate(([total], ends[:-1]))
            if wrong.any():
                row = int(np.argmax(wrong))
                bad, previous = begin + row, total if row == 0 else int(ends[row - 1])
                raise InputError(
                    f"{self.idx_path}: byte {self._pointer_offset + 8 * bad}: sequence {bad} starts at byte "
                    f"{self._pointers[bad]}, the lengths before it make {previous}: damaged, write it again"
                )
            total = int(ends[-1])
        return total

    def _check_documents(self) -> bool:
        """Check the document indices; returns whether every document is exactly one sequence."""
        previous, one_each = 0, self.num_documents == self.num_sequences
        for begin in range(0, self.num_documents + 1, _BLOCK):
            block = self._documents[begin : begin + _BLOCK]
            wrong = np.diff(block, prepend=previous) < 0
            if begin == 0:
                wrong[0] = block[0] != 0
            if wrong.any():
                entry = begin + int(np.argmax(wrong))
                self._refuse_document(entry, f"at least {self._documents[entry - 1]}" if entry else "0")
            one_each = one_each and bool(np.array_equal(block, np.arange(begin, begin + len(block))))
            previous = int(block[-1])
        if previous != self.num_sequences:
            self._refuse_document(self.num_documents, f"{self.num_sequences}, the number of sequences")
        return one_each

    def _refuse_document(self, entry: int, expected: str) -> None:
        raise InputError(
            f"{self.idx_path}: byte {self._document_offset + 8 * entry}: document entry {entry} is "
            f"{self._documents[entry]}, expected {expected}: damaged, write it again"
        )


class IndexedWriter:
    """Writes documents to a new .bin/.idx pair; a context manager.

    The files appear under their names only when the block ends without an exception, and are removed otherwise. Memory:
    8 bytes a document. `vocab_size`, where given, is the bound that every id is checked against.
    """

    def __init__(self, prefix: str | Path, dtype: npt.DTypeLike, *, vocab_size: int | None = None) -> None:
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in CODES:
            raise InputError(f"dtype {np.dtype(dtype).name}: token ids need one of {', '.join(d.name for d in CODES)}")
        self.bin_path, self.idx_path = file_pair(prefix)
        self._parts = [path.with_name(path.name + ".part") for path in (self.bin_path, self.idx_path)]
        limit = int(np.iinfo(self.dtype).max) + 1
        self._limit = limit if vocab_size is None else min(limit, vocab_size)
        self._bound = f"{self.dtype.name} holds" if self._limit == limit else "the vocabulary has"
        self._lengths = array("i")
        self._counts = array("i")
        self._tokens = 0
        try:
            self._file: BinaryIO = open(self._parts[0], "wb")  # noqa: SIM115 - closed by __exit__
        except OSError as error:
            raise InputError(f"{self.bin_path}: cannot be written: {error.strerror}") from None

    @property
    def num_documents(self) -> int:
        """Documents appended so far."""
        return len(self._counts)

    @property
    def num_tokens(self) -> int:
        """Tokens appended so far."""
        return self._tokens

    def append(self, tokens: npt.ArrayLike, *, sequence_lengths: Sequence[int] | None = None) -> None:
        """Append one document: integer ids [n], in one sequence or in sequences of the given lengths (sum n)."""
        ids = np.asarray(tokens)
        number = self.num_documents
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise InputError(f"document {number}: token ids must be a 1-D integer array, found {ids.dtype} {ids.shape}")
        if ids.size and (int(ids.max()) >= self._limit or int(ids.min()) < 0):
            position = int(np.argmax((ids >= self._limit) | (ids < 0)))
            raise InputError(
                f"{self.bin_path}: document {number}, position {position}: id {ids[position]} is outside the "
                f"{self._limit} ids that {self._bound}: use the tokenizer of this corpus or a wider dtype"
            )
        lengths = [ids.size] if sequence_lengths is None else list(sequence_lengths)
        if sum(lengths) != ids.size or min(lengths, default=0) < 0:
            raise InputError(f"document {number}: sequence lengths {lengths} do not add up to its {ids.size} tokens")
        if max(lengths, default=0) > np.iinfo(np.int32).max:
            raise InputError(
                f"document {number}: {ids.size} tokens in one sequence, the layout holds 2^31 - 1: split it"
            )
        self._file.write(np.ascontiguousarray(ids, dtype=self.dtype).data)
        self._lengths.extend(lengths)
        self._counts.append(len(lengths))
        self._tokens += ids.size

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            # After a failure only: a finished pair has been renamed away.
            self._file.close()
            for part in self._parts:
                part.unlink(missing_ok=True)

    def _finish(self) -> None:
        _sync(self._file)
        with open(self._parts[1], "wb") as index:
            index.write(HEADER.pack(MAGIC, VERSION, CODES[self.dtype], len(self._lengths), len(self._counts) + 1))
            lengths = np.frombuffer(self._lengths, dtype=np.int32)
            index.write(lengths.astype("<i4", copy=False).data)
            _write_sums(index, lengths, self.dtype.itemsize, exclusive=True)
            index.write(struct.pack("<q", 0))
            _write_sums(index, np.frombuffer(self._counts, dtype=np.int32), 1, exclusive=False)
            _sync(index)
        # The index goes last and an old one first: at no time does an index stand beside another pair's tokens.
        self.idx_path.unlink(missing_ok=True)
        os.replace(self._parts[0], self.bin_path)
        os.replace(self._parts[1], self.idx_path)


def _write_sums(file: BinaryIO, values: npt.NDArray[np.int32], scale: int, *, exclusive: bool) -> None:
    """Write the running sums of `values` x `scale` as int64, in blocks."""
    total = 0
    for begin in range(0, len(values), _BLOCK):
        sums = np.cumsum(values[begin : begin + _BLOCK], dtype=np.int64) * scale + total
        file.write(np.concatenate(([total], sums[:-1])).astype("<i8").data if exclusive else sums.astype("<i8").data)
        total = int(sums[-1])


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _map(path: Path) -> tuple[mmap.mmap | bytes, int]:
    """Read-only mapping of a file and its size; an empty file cannot be mapped and comes as empty bytes."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                return b"", 0
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file (a corpus is a pair of .bin and .idx)") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    return mapping, size
