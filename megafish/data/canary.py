"""Canaries: passages put into a corpus a known number of times, so that what a model recites can be counted.

A passage is a run of tokens of a document that is then left out of the corpus, with every other document of the same
text: each exposure of a canary is one that was inserted. (Carlini et al. 2019; the levels follow Hans et al. 2024.)
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megafish.data.tokenizer import Tokenizer
from megafish.errors import InputError
from megafish.run import read_json, sha256_file

_OFFSETS_TRIED = 8


@dataclass(frozen=True)
class CanaryConfig:
    """Which passages are inserted, and how often."""

    count: int = 8
    """Passages for each number of exposures."""
    tokens: int = 128
    """Length of a passage [tokens]."""
    exposures: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32, 64, 128)
    """Copies of each passage in the training split. 0: left out, the control group."""
    seed: int = 0
    """Seed of the choice of passages and of their places."""
    file: str | None = None
    """A file of passages to choose from instead of the corpus's own documents (text files: parted by blank lines)."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"canaries: count={self.count} must be at least 1")
        if self.tokens < 2:
            raise InputError(f"canaries: tokens={self.tokens} must be at least 2")
        levels = self.exposures
        if not levels or any(level < 0 for level in levels) or len(set(levels)) < len(levels):
            raise InputError(f"canaries: exposures={list(levels)} must be different numbers of at least 0")
        if not 0 <= self.seed < 2**64:
            raise InputError(f"canaries: seed={self.seed} must be at least 0 and below 2^64")

    @property
    def total(self) -> int:
        """Passages over all levels."""
        return self.count * len(self.exposures)


@dataclass(frozen=True)
class Candidate:
    """A passage that may become a canary. The smallest priorities are taken."""

    priority: int
    digest: int
    """Identity of its document's text."""
    tokens: list[int]
    text: str
    source: str
    """File of the document."""


@dataclass(frozen=True)
class Canary:
    """A line of canaries.jsonl."""

    id: int
    exposures: int
    tokens: list[int]
    text: str
    source: str

    def record(self) -> dict[str, Any]:
        """As written to canaries.jsonl."""
        return asdict(self)


class CandidateKeeper:
    """Keeps the `config.total` candidates of smallest priority among the documents offered.

    The priority of a document is a keyed hash of its text, so the choice does not depend on how the corpus is cut up,
    and merging the choices of parts gives the choice of the whole.
    """

    def __init__(self, config: CanaryConfig, tokenizer: Tokenizer) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._heap: list[tuple[int, int]] = []  # (-priority, digest): the worst kept comes first
        self._kept: dict[int, Candidate] = {}

    def offer(self, digest: int, tokens: npt.NDArray[np.int32], source: str) -> None:
        """Consider a document: identity of its text, its ids [n] without end-of-document, its file."""
        config = self._config
        if len(tokens) < config.tokens or digest in self._kept:
            return
        priority = _hash64(config.seed, "choice", digest)
        full = len(self._heap) == config.total
        if full and priority >= -self._heap[0][0]:
            return
        passage = self._passage(digest, tokens)
        if passage is None:
            return
        if full:
            _, worst = heapq.heappop(self._heap)
            del self._kept[worst]
        heapq.heappush(self._heap, (-priority, digest))
        self._kept[digest] = Candidate(priority, digest, passage[0], passage[1], source)

    def candidates(self) -> list[Candidate]:
        """The kept ones, by priority."""
        return sorted(self._kept.values(), key=lambda candidate: candidate.priority)

    def _passage(self, digest: int, tokens: npt.NDArray[np.int32]) -> tuple[list[int], str] | None:
        """A run of tokens that is whole characters; None where a few tries find none."""
        room = len(tokens) - self._config.tokens + 1
        for attempt in range(_OFFSETS_TRIED if self._config.file is None else 1):
            start = 0 if self._config.file is not None else _hash64(self._config.seed, "offset", digest, attempt) % room
            ids = tokens[start : start + self._config.tokens].tolist()
            text = self._tokenizer.decode(ids)
            if "\ufffd" not in text:
                return ids, text
        return None


def read_canaries(folder: str | Path) -> list[Canary]:
    """Canaries recorded in a corpus folder, sorted by exposures, then id; empty where none were planted.

    Raises InputError for a file that is missing, is not the one of the manifest, or is malformed.
    """
    manifest_file = Path(folder) / "manifest.json"
    # A bare Megatron .bin/.idx pair has no manifest, and so no canaries on record.
    entry = read_json(manifest_file).get("canaries") if manifest_file.is_file() else None
    if not entry:
        return []
    path = Path(folder) / entry["file"]
    if not path.is_file():
        raise InputError(f"{path}: the corpus's canaries are missing: restore the file or prepare the corpus again")
    if sha256_file(path) != entry.get("sha256"):
        raise InputError(
            f"{path}: not the file that the manifest names (sha256): restore it or prepare the corpus again"
        )
    canaries = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                item = json.loads(line)
                tokens = np.asarray(item["tokens"], dtype=np.int64).tolist()
                text, source = (str(item.get(key, "")) for key in ("text", "source"))
                canary = Canary(int(item["id"]), int(item["exposures"]), tokens, text, source)
            except (ValueError, KeyError, TypeError):
                raise InputError(
                    f"{path}:{number}: not a canary: restore the file or prepare the corpus again"
                ) from None
            canaries.append(canary)
    return sorted(canaries, key=lambda canary: (canary.exposures, canary.id))


def choose(candidates: Iterable[Candidate], config: CanaryConfig) -> tuple[list[Canary], set[int]]:
    """The canaries out of the candidates of all parts, and the digests of the documents they are from.

    Raises InputError where there are too few, saying how many there are.
    """
    distinct: dict[int, Candidate] = {}
    for candidate in candidates:
        # Of two documents with the same text the first one is the source, as within a unit.
        distinct.setdefault(candidate.digest, candidate)
        if len(distinct) > 2 * config.total:  # memory must not grow with the number of parts
            distinct = {kept.digest: kept for kept in _best(distinct, config)}
    ranked = _best(distinct, config)
    if len(ranked) < config.total:
        where = config.file if config.file is not None else "the corpus"
        raise InputError(
            f"canaries: {config.count} passages at {len(config.exposures)} exposure levels need {config.total} "
            f"different documents of at least {config.tokens} tokens, {where} has {len(ranked)}: ask for fewer or "
            "shorter ones"
        )
    canaries = [
        Canary(number, config.exposures[number // config.count], chosen.tokens, chosen.text, chosen.source)
        for number, chosen in enumerate(ranked)
    ]
    return canaries, {chosen.digest for chosen in ranked}


def places(canaries: Sequence[Canary], seed: int, documents: int) -> list[tuple[int, int]]:
    """Where the copies go: (document before which it is inserted, 0 to `documents`; id of the canary), in order."""
    scattered = [
        (_hash64(seed, "place", canary.id, copy) % (documents + 1), _hash64(seed, "tie", canary.id, copy), canary.id)
        for canary in canaries
        for copy in range(canary.exposures)
    ]
    return [(place, number) for place, _, number in sorted(scattered)]


def _best(candidates: dict[int, Candidate], config: CanaryConfig) -> list[Candidate]:
    return sorted(candidates.values(), key=lambda candidate: candidate.priority)[: config.total]


def _hash64(seed: int, purpose: str, *values: int) -> int:
    data = b"".join(value.to_bytes(8, "little") for value in values)
    key = seed.to_bytes(8, "little") + purpose.encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=key).digest(), "little")
