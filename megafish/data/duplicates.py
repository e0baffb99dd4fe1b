"""What a corpus repeats: n-grams and how often they occur, from a suffix array of its token file.

The array is built by tokengrams (EleutherAI, Rust, in parallel, memory-mapped): the positions of all tokens as uint64,
sorted by the text that begins there. It lies beside the corpus, 8 bytes a token, and is read in blocks. An n-gram
counts where it lies inside one document, without the token that ends it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megafish.data.corpus import Corpus
from megafish.data.indexed import IndexedDataset
from megafish.errors import InputError
from megafish.progress import track
from megafish.run import read_json, sha256_file, write_atomic
from megafish_kernels.goldfish import mix_numpy

Ints = npt.NDArray[np.int64]

FORMAT, VERSION = "megafish-suffixes", 1
BLOCK = 1 << 22
"""Positions of the array looked at in one go: some 200 MiB."""


@dataclass(frozen=True)
class Occurrence:
    """A distinct n-gram."""

    start: int
    """Place of its first occurrence in the token file."""
    document: int
    """The document of that place."""
    count: int
    """Its occurrences."""


@dataclass(frozen=True)
class Passage:
    """A repeated n-gram with what stands around all of its occurrences."""

    start: int
    document: int
    count: int
    length: int
    """Tokens."""


class Duplicates:
    """The repeated n-grams of one split of a corpus. `data`: its tokens."""

    def __init__(self, data: IndexedDataset, suffixes: Path, eos_id: int | None) -> None:
        self.data = data
        self.eos_id = eos_id
        self._suffixes = np.memmap(suffixes, dtype="<u8", mode="r")
        starts = np.array([data.bounds(number)[0] for number in range(data.num_documents)], dtype=np.int64)
        self._starts = starts
        self._ends = self._text_ends(np.append(starts[1:], data.num_tokens))

    @classmethod
    def of(
        cls, path: str | Path, split: str = "train", folder: str | Path | None = None, *, progress: bool = True
    ) -> Duplicates:
        """Open the split of a corpus folder, or a .bin/.idx pair; the suffix array is built where there is none.

        folder: where the array lies (default: beside the token file). Raises InputError for a corpus that is not there,
        an array of other tokens, and where tokengrams is not installed and is needed.
        """
        corpus = Corpus(path, "valid" if split == "valid" else "train")
        data = corpus.data
        place = Path(folder) if folder is not None else data.bin_path.parent
        suffixes = place / f"{data.bin_path.stem}.suffixes"
        described = suffixes.with_name(suffixes.name + ".json")
        if described.is_file():
            _check(described, suffixes, data)
        else:
            _build(data, suffixes, described, progress)
        eos = None if corpus.manifest is None else int(corpus.manifest["tokenizer"]["eos_id"])
        return cls(data, suffixes, eos)

    def groups(self, length: int, minimum: int = 1, *, block: int = BLOCK, progress: bool = False) -> Iterator[Ints]:
        """Distinct n-grams of `length` tokens that occur at least `minimum` times, in blocks of int64 [m, 2]: place of
        the first occurrence, and occurrences. Memory: a block."""
        if length < 1:
            raise InputError(f"length={length}: must be at least 1")
        last = np.empty(0, dtype=np.int64)  # one occurrence of the n-gram that may go on in the next block
        first, count = -1, 0
        with track(len(self._suffixes), "count repetitions", "token", enabled=progress) as bar:
            for begin in range(0, len(self._suffixes), block):
                positions = np.asarray(self._suffixes[begin : begin + block], dtype=np.int64)
                positions = np.concatenate([last, positions[self._fits(positions, length)]])
                bar.advance(min(block, len(self._suffixes) - begin))
                if not len(positions):
                    continue
                heads = np.flatnonzero(np.append(True, ~self._same(positions[:-1], positions[1:], length)))
                counts = np.diff(np.append(heads, len(positions)))
                firsts = np.minimum.reduceat(positions, heads)
                if len(last):  # was counted in the block before
                    counts[0] += count - 1
                    firsts[0] = min(int(firsts[0]), first)
                found = np.stack([firsts[:-1], counts[:-1]], axis=1)
                first, count, last = int(firsts[-1]), int(counts[-1]), positions[-1:]
                yield found[found[:, 1] >= minimum]
        if count >= max(minimum, 1):
            yield np.array([[first, count]], dtype=np.int64)

    def count(self, ngrams: Sequence[Sequence[int]]) -> list[int]:
        """Occurrences of each n-gram."""
        return [len(self.places(ngram)) for ngram in ngrams]

    def places(self, ngram: Sequence[int]) -> Ints:
        """Where an n-gram occurs, ascending: by two binary searches of the array."""
        wanted = tuple(int(token) for token in ngram)
        if not wanted:
            raise InputError("an empty n-gram occurs everywhere: give at least one token")
        low, high = self._bisect(wanted, right=False), self._bisect(wanted, right=True)
        positions = np.asarray(self._suffixes[low:high], dtype=np.int64)
        return np.sort(positions[self._fits(positions, len(wanted))])

    def sample_by_duplication(self, length: int, per_bin: int, seed: int) -> dict[int, list[Occurrence]]:
        """Up to `per_bin` distinct n-grams of each bin of occurrences, 2^(n/4) <= count < 2^((n+1)/4), by n.

        (Carlini et al. 2023, section 3.2.) Drawn uniformly, as a function of the seed and the tokens alone. Raises
        InputError where no document has `length` tokens.
        """
        kept: dict[int, Ints] = {}
        for found in self.groups(length):
            order = np.argsort(_mixed(found[:, 0], seed), kind="stable")
            counts, place = np.unique(found[:, 1], return_inverse=True)
            bins = np.array([duplicate_bin(count) for count in counts.tolist()], dtype=np.int64)[place]
            for number in np.unique(bins).tolist():
                own = found[order[bins[order] == number]][:per_bin]
                both = np.concatenate([kept[number], own]) if number in kept else own
                kept[number] = both[np.argsort(_mixed(both[:, 0], seed), kind="stable")][:per_bin]
        if not kept:
            raise InputError(f"{self.data.bin_path}: no document has {length} tokens: ask for shorter passages")
        return {
            number: [Occurrence(int(start), self._document(int(start)), int(count)) for start, count in kept[number]]
            for number in sorted(kept)
        }

    def most_repeated(self, length: int, top: int) -> list[Passage]:
        """The passages of at least `length` tokens that occur most often, each at the greatest length at which it does.

        What lies inside a passage listed before, and occurs as often, is left out.
        """
        best = np.empty((0, 2), dtype=np.int64)
        wanted = max(1000, top * 20 * length)  # a passage of n tokens has n - length + 1 n-grams
        for found in self.groups(length, minimum=2):
            best = np.concatenate([best, found])
            best = best[np.lexsort((best[:, 0], -best[:, 1]))][:wanted]
        passages: list[Passage] = []
        for start, count in best.tolist():
            if len(passages) == top:
                break
            if any(p.count == count and p.start <= start <= p.start + p.length - length for p in passages):
                continue
            passages.append(self._extended(start, count, length))
        return passages

    def histogram(self, length: int) -> dict[int, tuple[int, int]]:
        """(distinct n-grams, their occurrences) by bin of occurrences."""
        totals: dict[int, tuple[int, int]] = {}
        for found in self.groups(length):
            counts, many = np.unique(found[:, 1], return_counts=True)
            for count, distinct in zip(counts.tolist(), many.tolist(), strict=True):
                number = duplicate_bin(count)
                before = totals.get(number, (0, 0))
                totals[number] = (before[0] + distinct, before[1] + distinct * count)
        return dict(sorted(totals.items()))

    def _extended(self, start: int, count: int, length: int) -> Passage:
        """The longest passage around an n-gram that occurs wherever the n-gram does."""
        tokens = self.data.tokens
        places = self.places(tokens[start : start + length].tolist())
        documents = np.searchsorted(self._starts, places, side="right") - 1
        before, after = int((places - self._starts[documents]).min()), int((self._ends[documents] - places).min())
        left, right = 0, length
        while left < before and len(np.unique(tokens[places - left - 1])) == 1:
            left += 1
        while right < after and len(np.unique(tokens[places + right])) == 1:
            right += 1
        return Passage(start - left, self._document(start), count, left + right)

    def _fits(self, positions: Ints, length: int) -> npt.NDArray[np.bool_]:
        """Does an n-gram that begins there end inside its document?"""
        document = np.searchsorted(self._starts, positions, side="right") - 1
        return np.asarray(positions + length <= self._ends[document])

    def _same(self, a: Ints, b: Ints, length: int) -> npt.NDArray[np.bool_]:
        """Do the n-grams at these pairs of places agree? Most pairs part after a few tokens."""
        tokens = self.data.tokens
        alike = np.arange(len(a))
        for offset in range(length):
            alike = alike[tokens[a[alike] + offset] == tokens[b[alike] + offset]]
        result = np.zeros(len(a), dtype=np.bool_)
        result[alike] = True
        return result

    def _bisect(self, wanted: tuple[int, ...], *, right: bool) -> int:
        low, high = 0, len(self._suffixes)
        while low < high:
            middle = (low + high) // 2
            at = int(self._suffixes[middle])
            found = tuple(self.data.tokens[at : at + len(wanted)].tolist())
            if found < wanted or (right and found == wanted):
                low = middle + 1
            else:
                high = middle
        return low

    def _document(self, start: int) -> int:
        return int(np.searchsorted(self._starts, start, side="right")) - 1

    def _text_ends(self, ends: Ints) -> Ints:
        """Where the text of each document ends: before the token that ends it."""
        if self.eos_id is None or not len(ends):
            return ends
        filled = ends > self._starts
        last = self.data.tokens[np.maximum(ends - 1, 0)]
        return np.asarray(ends - (filled & (last == self.eos_id)))


def _build(data: IndexedDataset, suffixes: Path, described: Path, progress: bool) -> None:
    """Sort all positions and write the array, then what it is of."""
    if importlib.util.find_spec("tokengrams") is None:
        raise InputError("tokengrams is not installed, which sorts a corpus: pip install 'tokengrams>=0.3.3'")
    if data.dtype.itemsize not in (2, 4):
        raise InputError(
            f"{data.bin_path}: tokens of {data.dtype.name}: a suffix array is built of uint16 and int32 alone; prepare "
            "the corpus again"
        )
    if not data.num_tokens:
        raise InputError(f"{data.bin_path}: has no tokens")
    from tokengrams import MemmapIndex

    suffixes.parent.mkdir(parents=True, exist_ok=True)
    beside = suffixes.with_name(suffixes.name + ".tmp")
    if progress:
        print(f"sorting the {data.num_tokens:,} tokens of {data.bin_path}", file=sys.stderr, flush=True)
    try:
        # Which width the ids have it takes from the size of the vocabulary.
        with _output_on_stderr():
            MemmapIndex.build(str(data.bin_path), str(beside), 2**16 if data.dtype.itemsize == 2 else 2**17)
    except (RuntimeError, OSError) as error:
        raise InputError(f"{beside}: cannot be written ({error}): name another folder for the array") from None
    os.replace(beside, suffixes)
    write_atomic(described, json.dumps(_description(data), indent=1) + "\n")


@contextmanager
def _output_on_stderr() -> Iterator[None]:
    """tokengrams prints how far it is on standard output, past Python, where results stand."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _description(data: IndexedDataset) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "tokens": data.num_tokens,
        "dtype": data.dtype.name,
        "sha256": sha256_file(data.bin_path),
    }


def _check(described: Path, suffixes: Path, data: IndexedDataset) -> None:
    """Refuse an array that is not of these tokens."""
    found = read_json(described)
    if found != _description(data):
        raise InputError(
            f"{described}: the suffix array is not of {data.bin_path} as it is now: delete {suffixes.name} and "
            f"{described.name}, and it is built again"
        )
    size = suffixes.stat().st_size if suffixes.is_file() else 0
    if size != 8 * data.num_tokens:
        raise InputError(
            f"{suffixes}: {size} bytes instead of {8 * data.num_tokens}: it was cut off; delete {described.name}, and "
            "it is built again"
        )


def _mixed(values: Ints, seed: int) -> npt.NDArray[np.uint64]:
    """Pseudo-random numbers that depend on (seed, value)."""
    return mix_numpy(mix_numpy(values.astype(np.uint64)) + np.uint64(seed % 2**64))


def duplicate_bin(count: int) -> int:
    """The n with 2^(n/4) <= count < 2^((n+1)/4): bins of repetitions (Carlini et al. 2023, section 3.2)."""
    if count < 1:
        raise ValueError(f"count={count} must be at least 1")
    # In whole numbers: n is the largest with 2^n <= count^4.
    return (count**4).bit_length() - 1


def bin_bounds(number: int) -> tuple[int, int]:
    """Smallest and largest whole count of a bin; the smallest is the larger one where no whole number lies in it."""
    return _root4_up(2**number), _root4_up(2 ** (number + 1)) - 1


def _root4_up(value: int) -> int:
    """Least whole number whose fourth power is at least `value`."""
    root = math.isqrt(math.isqrt(value))
    return root if root**4 >= value else root + 1
