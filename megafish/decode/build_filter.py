"""Build a filter of n-grams from corpora, in parallel and with bounded memory.

1. The token files are read in pieces; each piece's keys are sorted and written to a temporary file.
2. Each part's keys are gathered from all pieces, and counted: those that occur often enough are its n-grams.
3. With their number known the size follows, and each part's bits are set.

The same for the beginnings of the n-grams: all texts of n - 1 tokens that occur often enough are a few more than that.

The keys take 8 bytes a token on disk while the filter is built; a process holds one piece or one part in memory.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megafish.data.corpus import Corpus
from megafish.data.indexed import IndexedDataset
from megafish.data.tokenizer import Tokenizer
from megafish.decode.ngram_filter import (
    NgramFilter,
    coefficients,
    fill,
    part_of,
    theory,
    window_keys,
    write_filter,
)
from megafish.errors import InputError
from megafish.progress import track
from megafish.run import sha256_file

PIECE = 1 << 23
"""Tokens of a piece: 64 MiB of keys."""


@dataclass(frozen=True)
class _Piece:
    """Tokens [start, stop) of a pair: the n-grams that begin there."""

    number: int
    pair: Path
    start: int
    stop: int
    eos_id: int | None


def build_filter(
    corpora: Sequence[str | Path],
    path: str | Path,
    *,
    n: int = 10,
    false_positive_rate: float = 0.01,
    minimum_count: int = 1,
    beginnings: bool = True,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> NgramFilter:
    """Write a filter of the n-grams that occur at least `minimum_count` times in the training text of the corpora.

    corpora: folders of `megafish prepare`, or prefixes of .bin/.idx pairs, which come without a tokenizer and need it
    named. An n-gram lies inside one document, without the token that ends it. beginnings: hold those of the n-grams
    too, which makes decoding faster and the file twice as large. workers: processes, one a core by default. Raises
    InputError for corpora of unlike tokenizers, without n-grams, and values out of range.
    """
    path = Path(path)
    if n < 2:
        raise InputError(f"n={n}: must be at least 2")
    if minimum_count < 1:
        raise InputError(f"minimum_count={minimum_count}: must be at least 1")
    if not 0 < false_positive_rate < 1:
        raise InputError(f"false_positive_rate={false_positive_rate}: must be above 0 and below 1")
    lengths = (n, n - 1) if beginnings else (n,)
    if path.is_dir():
        raise InputError(f"{path}: a folder: name a file to write the filter to")
    # A corpus named twice counts once, however its path is written.
    opened = [Corpus(corpus) for corpus in {Path(corpus).resolve(): corpus for corpus in corpora}.values()]
    sha256 = _tokenizer_of(opened, tokenizer)
    pieces = _pieces(opened, None if tokenizer is None else tokenizer.eos_id)
    tokens = sum(piece.stop - piece.start for piece in pieces)
    parts = 1 << max(0, (tokens // PIECE).bit_length())
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=path.name + ".", suffix=".tmp", dir=path.parent))
    # A small corpus is done before other processes have started.
    run = _Runner(1 if len(pieces) == 1 else workers or len(os.sched_getaffinity(0)), progress)
    try:
        found = []
        for length in lengths:
            found.append(_section(run, pieces, length, seed, parts, minimum_count, false_positive_rate, folder))
            if not found[0]["ngrams"]:
                raise InputError(
                    f"{', '.join(map(str, corpora))}: no text of {n} tokens occurs {minimum_count} times in a "
                    "document: lower n or the minimum count"
                )
        header = {
            "n": n,
            "false_positive_rate": false_positive_rate,
            "minimum_count": minimum_count,
            "seed": seed,
            **found[0],
            "parts": parts,
            "beginnings": found[1] if beginnings else None,
            "tokenizer": sha256,
            "sources": [_source(corpus) for corpus in opened],
        }
        write_filter(path, header, [_bits(folder, length, part) for length in lengths for part in range(parts)])
    finally:
        run.close()
        shutil.rmtree(folder, ignore_errors=True)
    return NgramFilter.open(path)


def _section(
    run: _Runner,
    pieces: Sequence[_Piece],
    n: int,
    seed: int,
    parts: int,
    minimum_count: int,
    rate: float,
    folder: Path,
) -> dict[str, int]:
    """Make the parts of the n-grams of one length, and say how many there are and how they are laid out."""
    run(_write_keys, [(piece, n, seed, parts, folder) for piece in pieces], f"hash {n}-grams", "piece")
    asked = [(part, len(pieces), parts, minimum_count, folder) for part in range(parts)]
    ngrams = sum(run(_gather, asked, f"count {n}-grams", "part"))
    bits, hashes = theory(ngrams, rate)
    part_bits = -(-bits // (parts * 64)) * 64
    run(_fill, [(part, n, hashes, part_bits, folder) for part in range(parts)], "set bits", "part")
    return {"ngrams": ngrams, "hashes": hashes, "part_bits": part_bits}


def _bits(folder: Path, n: int, part: int) -> Path:
    return folder / f"part_{part}_of_{n}.bits"


def _tokenizer_of(corpora: Sequence[Corpus], tokenizer: Tokenizer | None) -> str:
    """The hash of the tokenizer that all of them were made with."""
    known = {str(corpus.path): corpus.manifest["tokenizer"]["sha256"] for corpus in corpora if corpus.manifest}
    if tokenizer is not None:
        known[str(tokenizer.path)] = tokenizer.sha256
    elif bare := next((corpus.path for corpus in corpora if not corpus.manifest), None):
        raise InputError(f"{bare}: a .bin/.idx pair does not say what tokenizer made it: name one (--tokenizer FILE)")
    if len(set(known.values())) > 1:
        raise InputError(f"{', '.join(known)}: of unlike tokenizers: their ids mean different text; build two filters")
    return str(next(iter(known.values())))


def _pieces(corpora: Sequence[Corpus], eos_of_pairs: int | None) -> list[_Piece]:
    pieces: list[_Piece] = []
    for corpus in corpora:
        eos = eos_of_pairs if corpus.manifest is None else int(corpus.manifest["tokenizer"]["eos_id"])
        pair = corpus.data.bin_path.with_suffix("")
        for start in range(0, corpus.num_tokens, PIECE):
            pieces.append(_Piece(len(pieces), pair, start, min(start + PIECE, corpus.num_tokens), eos))
    return pieces


def _source(corpus: Corpus) -> dict[str, Any]:
    file = corpus.data.bin_path
    return {"path": str(file), "tokens": corpus.num_tokens, "sha256": sha256_file(file)}


class _Runner:
    """Calls a function with many arguments in processes, and shows how far it is. The processes serve all calls."""

    def __init__(self, workers: int, progress: bool) -> None:
        self._progress = progress
        self._pool = None
        if workers > 1:
            self._pool = ProcessPoolExecutor(
                workers,
                # Not forked: the caller may have threads, whose locks a fork would copy.
                mp_context=get_context("spawn"),
                # Ctrl-C reaches them as well; the main process decides.
                initializer=signal.signal,
                initargs=(signal.SIGINT, signal.SIG_IGN),
            )

    def __call__(
        self, function: Callable[..., int], calls: Sequence[tuple[Any, ...]], what: str, unit: str
    ) -> list[int]:
        results = [0] * len(calls)
        with track(len(calls), what, unit, enabled=self._progress) as bar:
            for number, result in self._done(function, calls):
                results[number] = result
                bar.advance()
        return results

    def close(self) -> None:
        """End the processes, once they have done what they are at."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _done(self, function: Callable[..., int], calls: Sequence[tuple[Any, ...]]) -> Iterable[tuple[int, int]]:
        if self._pool is None:
            yield from ((number, function(*call)) for number, call in enumerate(calls))
            return
        pending = {self._pool.submit(function, *call): number for number, call in enumerate(calls)}
        try:
            for done in as_completed(pending):
                yield pending[done], done.result()
        except BrokenProcessPool:
            raise InputError(
                "a process that builds the filter was killed, perhaps for its memory: give fewer --workers"
            ) from None


def _write_keys(piece: _Piece, n: int, seed: int, parts: int, folder: Path) -> int:
    """The sorted keys of the n-grams that begin in a piece, and where each part of them starts."""
    data = IndexedDataset(piece.pair)
    stop = min(piece.stop + n - 1, data.num_tokens)
    tokens = np.asarray(data.tokens[piece.start : stop])
    keys = np.empty(0, dtype=np.uint64)
    if len(tokens) >= n:
        keys = window_keys(tokens, coefficients(seed, n))
        keys = np.sort(keys[_inside(data, piece, len(keys), n)])
    starts = np.searchsorted(part_of(keys, parts), np.arange(parts + 1, dtype=np.uint64))
    np.save(folder / f"piece_{piece.number}.npy", keys)
    np.save(folder / f"starts_{piece.number}.npy", starts)
    return len(keys)


def _inside(data: IndexedDataset, piece: _Piece, count: int, n: int) -> npt.NDArray[np.bool_]:
    """Which of the `count` n-grams from the piece's start on lie inside one document, before the token that ends it."""
    numbers, firsts = data.documents_in(piece.start, piece.stop)
    ends = np.array([data.bounds(int(number))[1] for number in numbers], dtype=np.int64)
    if piece.eos_id is not None:
        ends = ends - (data.tokens[ends - 1] == piece.eos_id)
    place = np.arange(piece.start, piece.start + count)
    return np.asarray(place + n <= ends[np.searchsorted(firsts, place, side="right") - 1])


def _gather(part: int, pieces: int, parts: int, minimum_count: int, folder: Path) -> int:
    """Keep the keys of a part that occur often enough; returns how many."""
    found = []
    for number in range(pieces):
        starts = np.load(folder / f"starts_{number}.npy")
        keys = np.load(folder / f"piece_{number}.npy", mmap_mode="r")
        found.append(np.asarray(keys[starts[part] : starts[part + 1]]))
    distinct, counts = np.unique(np.concatenate(found), return_counts=True)
    distinct = distinct[counts >= minimum_count]
    np.save(folder / f"part_{part}.npy", distinct)
    return len(distinct)


def _fill(part: int, n: int, hashes: int, bits: int, folder: Path) -> int:
    fill(np.load(folder / f"part_{part}.npy"), hashes, bits).tofile(_bits(folder, n, part))
    return 0
