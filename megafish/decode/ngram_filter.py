"""A Bloom filter of the n-grams of a corpus (Bloom 1970): no n-gram that is in it is ever missed.

An n-gram's key is the multilinear hash of its ids, c[0] + sum of c[j] (x[j] + 1) mod 2^64 with the first outputs of
splitmix64(seed), sent through splitmix64's finalizer. The bits are cut into 2^s equal parts. The upper s bits of the
key choose the part, so that parts are filled independently; the place of bit i in it is (key + i step) mod 2^64 mod
bits, where step is the finalizer of the inverted key, made odd (Kirsch and Mitzenmacher 2006).

Beside the n-grams stand their beginnings, n - 1 tokens each, in a section of their own: where a text does not end in
one of them, no token can complete an n-gram, and none needs to be looked up. That is so at nearly all steps of a model
that does not recite.

A file: the magic, the length of a header (uint64, little-endian), the header in JSON, zeros up to a multiple of 64
bytes, the parts of the n-grams, those of the beginnings. It is memory-mapped.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megafish.data.tokenizer import Tokenizer
from megafish.errors import InputError
from megafish_kernels.goldfish import goldfish_coefficients, mix_numpy

MAGIC = b"MFNGRAMS"
FORMAT, VERSION = "megafish-ngrams", 2
HEADER_KEYS = ("n", "seed", "hashes", "parts", "part_bits", "beginnings", "tokenizer")
"""What is read of a header."""
ALIGNMENT = 64
_FEW = 1024
"""Keys up to which the number of calls is what a lookup costs."""

Keys = npt.NDArray[np.uint64]


class NgramFilter:
    """The n-grams of a corpus, opened from a file.

    Attributes: `path`; `n`, tokens of an n-gram; `header`, what the file says of itself (see build_filter).
    """

    def __init__(self, path: Path, header: dict[str, Any], bits: npt.NDArray[np.uint8]) -> None:
        self.path = path
        self.header = header
        self.n: int = header["n"]
        size = _bytes_of(header, header)
        self._ngrams = _Section(bits[:size], header["parts"], header["part_bits"], header["hashes"])
        self._beginnings: _Section | None = None
        if (own := header["beginnings"]) is not None:
            self._beginnings = _Section(bits[size:], header["parts"], own["part_bits"], own["hashes"])
        self._multipliers = coefficients(header["seed"], self.n)

    @classmethod
    def open(cls, path: str | Path) -> NgramFilter:
        """Map a file that `megafish filter` wrote. Raises InputError where it is missing, damaged or of a newer
        version."""
        path = Path(path)
        if path.is_dir():
            raise InputError(f"{path}: a folder, no filter: build one of a corpus by megafish filter {path} --to FILE")
        if not path.is_file():
            raise InputError(f"{path}: no such file: build a filter (megafish filter CORPUS --to {path})")
        with open(path, "rb") as file:
            start = file.read(16)
            length = int.from_bytes(start[8:], "little")
            text = file.read(length) if start[:8] == MAGIC and length < 1 << 24 else b""
        try:
            header = json.loads(text)
            known = (header["format"], header["version"])
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}: not a filter of n-grams, or damaged: build it again") from None
        if known != (FORMAT, VERSION):
            raise InputError(f"{path}: {known[0]} version {known[1]}, this program reads {FORMAT} version {VERSION}")
        if missing := [key for key in HEADER_KEYS if key not in header]:
            raise InputError(f"{path}: its header has no {missing[0]}: it is damaged; build it again")
        offset, size = data_offset(length), _bytes_of(header, header) + _bytes_of(header, header["beginnings"])
        if path.stat().st_size != offset + size:
            raise InputError(
                f"{path}: {path.stat().st_size} bytes, its header asks for {offset + size}: it was cut off; build it "
                "again"
            )
        return cls(path, header, np.memmap(path, dtype=np.uint8, mode="r", offset=offset, shape=(size,)))

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Refuse to filter the ids of another tokenizer (InputError): they are other text."""
        if tokenizer.sha256 != self.header["tokenizer"]:
            raise InputError(
                f"{self.path}: was built of the ids of another tokenizer than {tokenizer.path}: build it of a corpus "
                "prepared with the model's own"
            )

    def contains(self, ngrams: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Are these n-grams in it? int [..., n] -> bool [...]. True for all that are, and for few others by chance."""
        found = np.asarray(ngrams, dtype=np.int64)
        # Always with an axis before: NumPy warns of the overflow of a single number, which is meant here.
        return self._ngrams.holds(ngram_keys(found.reshape(-1, self.n), self._multipliers)).reshape(found.shape[:-1])

    def contains_next(self, context: npt.ArrayLike, candidates: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Would a candidate complete an n-gram? context int [b, n - 1], candidates int [b, m] -> bool [b, m].

        For certain where it would; by chance for others, of contexts that `begins` knows.
        """
        before = partial_keys(np.asarray(context, dtype=np.int64), self._multipliers)
        last = np.asarray(candidates, dtype=np.int64).astype(np.uint64) + np.uint64(1)
        return self._ngrams.holds(mix_numpy(before[:, None] + last * self._multipliers[self.n]))

    def begins(self, context: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Is this the beginning of an n-gram: int [b, n - 1] -> bool [b]. True for all that are, and for few others by
        chance; for all where the filter was built without beginnings."""
        tokens = np.asarray(context, dtype=np.int64)
        if self._beginnings is None:
            return np.ones(len(tokens), dtype=np.bool_)
        return self._beginnings.holds(ngram_keys(tokens, self._multipliers[: self.n]))


class _Section:
    """Parts of bits [parts * part_bits / 8], and how keys are looked up in them."""

    def __init__(self, bits: npt.NDArray[np.uint8], parts: int, part_bits: int, hashes: int) -> None:
        # A plain view: each access to a memmap itself makes another one, which takes as long as a lookup.
        self._bits = np.asarray(bits)
        self._parts, self._part_bits, self._hashes = parts, part_bits, hashes

    def holds(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """For each key whether it is in it: True for all that are, and for few others by chance."""
        flat = keys.ravel()
        found = np.ones(len(flat), dtype=np.bool_)
        base = part_of(flat, self._parts).astype(np.int64) * (self._part_bits // 8)
        step = steps(flat)
        # Half the bits are set: after each hash half of those that are not in it are known, and not looked at again. Of
        # few keys all hashes are looked up at once, which takes fewer calls.
        together = self._hashes if len(flat) <= _FEW else 1
        left = np.arange(len(flat))
        for first in range(0, self._hashes, together):
            numbers = np.arange(first, first + together, dtype=np.uint64)
            place = place_of(flat[left, None], step[left, None], numbers, self._part_bits)
            byte = self._bits[base[left, None] + (place >> np.uint64(3)).astype(np.int64)]
            hit = ((byte >> (place & np.uint64(7)).astype(np.uint8)) & 1).all(axis=1)
            found[left[~hit]] = False
            left = left[hit]
        return found.reshape(keys.shape)


def _bytes_of(header: dict[str, Any], section: dict[str, Any] | None) -> int:
    """Size of a section, which is the header itself for the n-grams."""
    return 0 if section is None else int(header["parts"] * section["part_bits"] // 8)


def theory(ngrams: int, rate: float) -> tuple[int, int]:
    """(bits, hash functions) that a false positive rate takes: -N ln p / (ln 2)^2, and bits / N ln 2."""
    bits = math.ceil(-ngrams * math.log(rate) / math.log(2) ** 2)
    return bits, max(1, round(bits / max(ngrams, 1) * math.log(2)))


def coefficients(seed: int, n: int) -> Keys:
    """c[0] ... c[n]."""
    return np.array(goldfish_coefficients(seed, n), dtype=np.uint64)


def partial_keys(tokens: npt.NDArray[np.int64], c: Keys) -> Keys:
    """The sum over the tokens [..., m] so far, before it is mixed: uint64 [...]."""
    shifted = tokens.astype(np.uint64) + np.uint64(1)
    return np.asarray(shifted @ c[1 : tokens.shape[-1] + 1] + c[:1])


def ngram_keys(ngrams: npt.NDArray[np.int64], c: Keys) -> Keys:
    """Keys of n-grams [..., n]: uint64 [...]."""
    assert ngrams.shape[-1] == len(c) - 1, (ngrams.shape, len(c))
    return mix_numpy(partial_keys(ngrams, c))


def window_keys(tokens: npt.NDArray[Any], c: Keys) -> Keys:
    """Keys of all n-grams of consecutive tokens [m]: uint64 [m - n + 1]."""
    n = len(c) - 1
    shifted = tokens.astype(np.uint64) + np.uint64(1)
    total = np.full(len(tokens) - n + 1, c[0], dtype=np.uint64)
    for j in range(n):
        total += c[j + 1] * shifted[j : j + len(total)]
    return mix_numpy(total)


def part_of(keys: Keys, parts: int) -> Keys:
    """Number of the part of each key; parts: a power of two."""
    shift = 64 - (parts.bit_length() - 1)
    return keys >> np.uint64(shift) if parts > 1 else np.zeros_like(keys)


def steps(keys: Keys) -> Keys:
    """The step from hash to hash of each key."""
    return mix_numpy(~keys) | np.uint64(1)


def place_of(keys: Keys, step: Keys, number: int | Keys, bits: int) -> Keys:
    """Place of bit `number` of each key within its part."""
    return np.asarray((keys + np.asarray(number, dtype=np.uint64) * step) % np.uint64(bits))


def fill(keys: Keys, hashes: int, bits: int) -> npt.NDArray[np.uint8]:
    """The part with these keys: uint8 [bits / 8]."""
    part = np.zeros(bits // 8, dtype=np.uint8)
    step = steps(keys)
    for number in range(hashes):
        place = place_of(keys, step, number, bits)
        np.bitwise_or.at(
            part, (place >> np.uint64(3)).astype(np.int64), np.uint8(1) << (place & np.uint64(7)).astype(np.uint8)
        )
    return part


def data_offset(header_length: int) -> int:
    """Where the bits begin."""
    return -(-(16 + header_length) // ALIGNMENT) * ALIGNMENT


def write_filter(path: Path, header: dict[str, Any], parts: Sequence[Path]) -> None:
    """Write the file beside and rename it: header, then the parts, each in a file of its own."""
    text = json.dumps({"format": FORMAT, "version": VERSION, **header}).encode()
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "wb") as file:
        file.write((MAGIC + len(text).to_bytes(8, "little") + text).ljust(data_offset(len(text)), b"\0"))
        for part in parts:
            file.write(part.read_bytes())
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
