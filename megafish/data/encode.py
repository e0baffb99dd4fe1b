"""The parallel half of `prepare`: documents of one unit of input to token ids, in files of its own.

Runs in worker processes: imports neither torch nor anything heavy.

A finished unit is three files: NUMBER.tokens (ids of all documents, each with its end-of-document token),
NUMBER.documents (an array of `DOCUMENT`) and NUMBER.json, written last: a unit without it has not been done. It holds
the checksums of the others, so that nobody has to wait for the disk: what a crash of the machine has spoilt is noticed
when the run is continued, and done again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from megafish.data.canary import CanaryConfig, Candidate, CandidateKeeper
from megafish.data.indexed import optimal_dtype
from megafish.data.manifest import DEFAULT_K
from megafish.data.readers import Document, Piece, ReadOptions, read_piece
from megafish.data.tokenizer import Tokenizer
from megafish.errors import InputError

DOCUMENT = np.dtype([("length", "<i4"), ("bytes", "<u4"), ("k", "<i4"), ("valid", "u1"), ("digest", "<u8")])
"""A document of a unit: its tokens (with end-of-document), UTF-8 bytes, k, whether it is validation, identity."""

_BATCH_CHARS = 1 << 20
_BATCH_DOCUMENTS = 4096
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class EncodeOptions:
    """What the ids of a document depend on, beside its text and the tokenizer."""

    read: ReadOptions
    valid_fraction: float
    split_seed: int
    canaries: CanaryConfig | None


@dataclass(frozen=True)
class Unit:
    """What a finished unit holds."""

    tokens: int
    documents: int
    own_k: int
    """Documents with a goldfish k of their own."""
    pieces: list[int]
    """Documents of each of its pieces."""


def encode_unit(
    folder: Path,
    number: int,
    pieces: Sequence[Piece],
    tokenizer: Tokenizer,
    options: EncodeOptions,
    on_bytes: Callable[[int], None],
) -> Unit:
    """Read and encode the documents of `pieces` and leave the unit's files in `folder`.

    `on_bytes` is told the bytes of input that are done. Memory: a batch of about 1 MiB of text, or one document.
    Raises InputError for what is wrong with the input, OSError for what is wrong with `folder`.
    """
    keeper = None
    if options.canaries is not None and options.canaries.file is None:
        keeper = CandidateKeeper(options.canaries, tokenizer)
    encoder = _Encoder(tokenizer, options, keeper)
    counts = [0] * len(pieces)
    names = [unit_file(folder, number, kind) for kind in ("tokens", "documents", "json")]
    beside = [name.with_name(f"{name.name}.{os.getpid()}.tmp") for name in names]
    try:
        with open(beside[0], "wb") as tokens_file, open(beside[1], "wb") as documents_file:
            # Text that has been encoded stands for bytes of input: of compressed files no more is known.
            total, reported = sum(piece.size for piece in pieces), 0
            for batch in _batches(pieces, options.read, counts):
                encoder.write(batch, tokens_file, documents_file)
                done = min(total, reported + sum(len(document.text) for document, _ in batch))
                on_bytes(done - reported)
                reported = done
            on_bytes(total - reported)
        unit = Unit(encoder.tokens, encoder.documents, encoder.own_k, counts)
        candidates = keeper.candidates() if keeper is not None else []
        summary = {**vars(unit), "crc32": encoder.crc32, "candidates": [vars(candidate) for candidate in candidates]}
        beside[2].write_text(json.dumps(summary), encoding="utf-8")
        for source, target in zip(beside, names, strict=True):
            os.replace(source, target)
        return unit
    finally:
        for path in beside:
            path.unlink(missing_ok=True)


def unit_file(folder: Path, number: int, kind: str) -> Path:
    """Path of one of a unit's files: tokens, documents or json."""
    return folder / f"{number:08d}.{kind}"


def finished_unit(folder: Path, number: int) -> Unit | None:
    """The unit if all of its files are there and as they were written, else None."""
    try:
        summary = json.loads(unit_file(folder, number, "json").read_text(encoding="utf-8"))
        for kind, crc in summary["crc32"].items():
            if _crc32(unit_file(folder, number, kind)) != crc:
                return None
        return Unit(summary["tokens"], summary["documents"], summary["own_k"], summary["pieces"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that were killed have left of their units."""
    for path in folder.glob("*.tmp"):
        path.unlink(missing_ok=True)


def unit_candidates(folder: Path, number: int) -> list[Candidate]:
    """The passages of a finished unit that may become canaries."""
    summary = json.loads(unit_file(folder, number, "json").read_text(encoding="utf-8"))
    return [Candidate(**candidate) for candidate in summary["candidates"]]


def text_hash(data: bytes, seed: int) -> tuple[int, int]:
    """Two independent 64-bit hashes of a document's UTF-8 text: one decides its split, one is its identity."""
    digest = hashlib.blake2b(data, digest_size=16, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


@contextmanager
def disk(folder: Path) -> Iterator[None]:
    """Turn the failures of writing below `folder` into one line for the user."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise InputError(
                f"{folder}: no space left on the disk; free some and start again: what is done is kept"
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise InputError(f"{folder}: cannot be written ({error.strerror})") from None
        raise


class _Encoder:
    """Turns batches of documents into rows of the unit's files."""

    def __init__(self, tokenizer: Tokenizer, options: EncodeOptions, keeper: CandidateKeeper | None) -> None:
        self.tokens = 0
        self.documents = 0
        self.own_k = 0
        self.crc32 = {"tokens": 0, "documents": 0}
        self._tokenizer = tokenizer
        self._options = options
        self._keeper = keeper
        self._threshold = round(options.valid_fraction * 2**64)
        self._dtype = optimal_dtype(tokenizer.vocab_size)
        self._end = np.array([tokenizer.eos_id], dtype=np.int32)

    def write(self, batch: list[tuple[Document, str]], tokens_file: IO[bytes], documents_file: IO[bytes]) -> None:
        encoded = self._tokenizer.encode_batch([document.text for document, _ in batch])
        rows = np.empty(len(batch), dtype=DOCUMENT)
        stream: list[npt.NDArray[Any]] = []
        for row, ((document, path), ids) in enumerate(zip(batch, encoded, strict=True)):
            data = document.text.encode("utf-8")
            split, digest = text_hash(data, self._options.split_seed)
            rows[row] = (len(ids) + 1, len(data), document.k, split < self._threshold, digest)
            stream += (ids, self._end)
            if self._keeper is not None:
                self._keeper.offer(digest, ids, path)
        tokens = np.concatenate(stream).astype(self._dtype)
        tokens_file.write(tokens.data)
        documents_file.write(rows.data)
        self.crc32["tokens"] = zlib.crc32(tokens.data, self.crc32["tokens"])
        self.crc32["documents"] = zlib.crc32(rows.data, self.crc32["documents"])
        self.tokens += len(tokens)
        self.documents += len(batch)
        self.own_k += int((rows["k"] != DEFAULT_K).sum())


def _crc32(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def _batches(pieces: Sequence[Piece], options: ReadOptions, counts: list[int]) -> Iterator[list[tuple[Document, str]]]:
    """The documents of the pieces with their files, some at a time; `counts`: those of each piece, counted here."""
    batch: list[tuple[Document, str]] = []
    chars = 0
    for number, piece in enumerate(pieces):
        for document in read_piece(piece, options):
            counts[number] += 1
            batch.append((document, piece.file.path))
            chars += len(document.text)
            if chars >= _BATCH_CHARS or len(batch) >= _BATCH_DOCUMENTS:
                yield batch
                batch, chars = [], 0
    if batch:
        yield batch
