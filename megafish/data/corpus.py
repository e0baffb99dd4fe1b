"""Corpora as streams of samples.

A corpus is a folder written by `megafish prepare` (token files, manifest, tokenizer) or a bare Megatron .bin/.idx pair.
Its documents make one stream of tokens, taken as a circle; a sample is a window of it together with what is needed to
decide each token's fate from its document alone: a left halo, the document starts and the positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from megafish.config import DataConfig, SourceConfig
from megafish.data.indexed import IndexedDataset, file_pair
from megafish.data.manifest import DEFAULT_K, MANIFEST, NEVER_K, read_manifest
from megafish.data.megatron import cut
from megafish.data.order import ORDER, Locations, SampleOrder
from megafish.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_file
from megafish.errors import InputError
from megafish.run import sha256_file

_NO_CORPUS = "{path}: neither a folder written by `megafish prepare` nor the prefix of a .bin/.idx pair"


class Window(NamedTuple):
    """Consecutive tokens of a stream. Each field has shape [n]."""

    tokens: npt.NDArray[np.int64]
    """Ids."""
    document_starts: npt.NDArray[np.bool_]
    """True at the first token of a document."""
    positions: npt.NDArray[np.int64]
    """Tokens before this one in its document, in the window or not."""
    k: npt.NDArray[np.int32] | None
    """k of the token's document (0 never drop, -1 default). None: every document has the default."""


@dataclass(frozen=True)
class Sample:
    """One sequence with its left context: n = halo + S + 1 tokens.

    The S inputs are tokens[halo:-1] and the S targets tokens[halo+1:]; the halo decides, and is never supervised.
    """

    tokens: npt.NDArray[np.int64]
    """Ids [n]."""
    document_starts: npt.NDArray[np.bool_]
    """True at the first token of a document [n]."""
    positions: npt.NDArray[np.int64]
    """Tokens before this one in its document [n]."""
    k: npt.NDArray[np.int32] | None
    """Drop 1 in k, by token [n]: 0 never, -1 the run's default. None: the default everywhere."""
    halo: int
    """Tokens of left context."""
    source: int
    """Number of the source."""
    number: int
    """Number of the sample in the run."""


class Corpus:
    """The documents of one split.

    `path`: a corpus folder, or the prefix of a .bin/.idx pair, which has no splits (`split` is then ignored) unless
    `shares` of training, validation and test cut it as Megatron does (data.split). Opening checks the index, and the
    sizes of the files against the manifest. Raises InputError.

    Attributes: `data`, the IndexedDataset; `manifest`, None for a bare pair; `text_bytes`, the UTF-8 bytes of the
    split's text, None for a bare pair; `vocab_size`, the bound of the ids, for a bare pair None until
    `check_tokenizer`.
    """

    def __init__(
        self,
        path: str | Path,
        split: Literal["train", "valid"] = "train",
        shares: tuple[float, float, float] | None = None,
    ) -> None:
        self.path = Path(path)
        self._range: tuple[int, int] | None = None
        self.manifest: dict[str, Any] | None = None
        self.vocab_size: int | None = None
        self.text_bytes: int | None = None
        self._files: dict[str, dict[str, Any]] = {}
        if not self.path.is_dir():
            self._open_pair(split, shares)
        elif shares is None:
            self._open_folder(split)
        else:
            raise InputError(f"{self.path}: data.split is for bare .bin/.idx pairs, this corpus has a split of its own")

    @property
    def num_tokens(self) -> int:
        """Tokens of the stream."""
        return self.data.num_tokens

    @property
    def num_documents(self) -> int:
        """Documents of the stream."""
        return self.data.num_documents

    @property
    def has_document_k(self) -> bool:
        """Whether the corpus stores a goldfish k for each document (many of which may be the default)."""
        return self._document_k is not None

    @property
    def tokenizer_path(self) -> Path | None:
        """The tokenizer stored with the corpus; None for a bare pair."""
        return self.path / self.manifest["tokenizer"]["file"] if self.manifest else None

    def open_tokenizer(self) -> Tokenizer | None:
        """The tokenizer stored with the corpus, with the same end-of-document token; None for a bare pair."""
        return None if self.manifest is None else _stored_tokenizer(self.path, self.manifest)

    def window(self, start: int, length: int) -> Window:
        """The `length` tokens from `start` on, the stream taken as a circle. Raises InputError for an unknown id."""
        parts = []
        start %= self.num_tokens
        while length > 0:
            stop = min(start + length, self.num_tokens)
            parts.append(self._piece(start, stop))
            length -= stop - start
            start = 0
        if len(parts) == 1:
            return parts[0]
        tokens, starts, positions = (np.concatenate([part[field] for part in parts]) for field in range(3))
        return Window(tokens, starts, positions, None if parts[0].k is None else np.concatenate([p.k for p in parts]))

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Refuse a tokenizer or end-of-document token other than the corpus's; a bare pair takes its vocabulary."""
        if self.manifest is None:
            self.vocab_size = tokenizer.vocab_size
            return
        expected = self.manifest["tokenizer"]
        if tokenizer.sha256 != expected["sha256"]:
            raise InputError(
                f"{tokenizer.path}: not the tokenizer of {self.path}: sha256 {tokenizer.sha256[:16]}..., the manifest "
                f"says {expected['sha256'][:16]}...: use {self.tokenizer_path} or prepare the corpus again"
            )
        if tokenizer.eos_id != expected["eos_id"]:
            raise InputError(
                f"{tokenizer.path}: ends documents with id {tokenizer.eos_id}, those of {self.path} end with "
                f"{expected['eos_id']}: blend corpora with one end-of-document token, or prepare this one again"
            )

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the tokens and the documents' k, wherever the files lie; a checkpoint stores it (JSON types).

        From the manifest's hashes; for a bare pair the size of the .bin and the hash of the .idx, which is read once.
        """
        return self._fingerprint

    def verify(self) -> None:
        """Read the split's files in full and compare them with the manifest's sha256; a bare pair has none."""
        for name, entry in self._files.items():
            found = sha256_file(self.path / name)
            if found != entry["sha256"]:
                raise InputError(
                    f"{self.path / name}: sha256 is {found}, the manifest says {entry['sha256']}: the file has changed "
                    "since it was written, prepare or copy the corpus again"
                )

    @cached_property
    def _fingerprint(self) -> dict[str, Any]:
        if self.manifest is not None:
            files = {name: entry["sha256"] for name, entry in sorted(self._files.items())}
            return {"files": files, "tokenizer": self.manifest["tokenizer"]["sha256"]}
        size = self.data.bin_path.stat().st_size
        found = {"bin_bytes": size, "idx_sha256": sha256_file(self.data.idx_path)}
        return found if self._range is None else {**found, "documents": list(self._range)}

    def _open_folder(self, split: str) -> None:
        manifest = self.manifest = read_manifest(self.path)
        if split not in manifest["splits"]:
            raise InputError(
                f"{self.path / MANIFEST}: no split {split!r}, only {', '.join(manifest['splits']) or 'none'}: "
                "prepare the corpus with a validation fraction, or name another corpus"
            )
        entry = manifest["splits"][split]
        self.vocab_size = int(manifest["tokenizer"]["vocab_size"])
        self.text_bytes = int(entry["bytes"])
        self._files = entry["files"]
        for name, known in self._files.items():
            file = self.path / name
            if not file.is_file():
                raise InputError(f"{file}: no such file, but the manifest names it: copy the whole corpus folder")
            size = file.stat().st_size
            if size != known["bytes"]:
                raise InputError(
                    f"{file}: {size} bytes, the manifest says {known['bytes']}: "
                    + (f"truncated at byte {size}" if size < known["bytes"] else "not the file that was written")
                    + ", prepare or copy the corpus again"
                )
        self.data = IndexedDataset(self.path / split)
        if (self.num_tokens, self.num_documents) != (entry["tokens"], entry["documents"]):
            raise InputError(
                f"{self.data.idx_path}: {self.num_tokens} tokens in {self.num_documents} documents, the manifest says "
                f"{entry['tokens']} in {entry['documents']}: the files belong to different corpora"
            )
        k_name = f"{split}.k.npy"
        self._document_k = self._open_k(self.path / k_name) if k_name in self._files else None

    def _open_pair(self, split: str, shares: tuple[float, float, float] | None) -> None:
        bin_path, idx_path = file_pair(self.path)
        if not idx_path.is_file() and not bin_path.is_file():
            raise InputError(_NO_CORPUS.format(path=self.path))
        self.data = IndexedDataset(self.path)
        if shares is not None:
            self.data, self._range = cut(self.data, shares, split)
        self._document_k = None

    def _open_k(self, path: Path) -> npt.NDArray[np.int32]:
        try:
            document_k = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read as a .npy array: {error}") from None
        if document_k.shape != (self.num_documents,) or document_k.dtype != np.int32:
            raise InputError(
                f"{path}: {document_k.dtype} {document_k.shape}, expected int32 ({self.num_documents},): one k for "
                "each document"
            )
        return document_k

    def _piece(self, start: int, stop: int) -> Window:
        """The tokens [start, stop) of the stream, inside it."""
        tokens = self.data.tokens[start:stop].astype(np.int64)
        if self.vocab_size is not None and (int(tokens.max()) >= self.vocab_size or int(tokens.min()) < 0):
            self._refuse_id(start, tokens)
        numbers, firsts = self.data.documents_in(start, stop)
        bounds = np.empty(len(firsts) + 1, dtype=np.int64)
        np.maximum(firsts - start, 0, out=bounds[:-1])
        bounds[-1] = stop - start
        lengths = bounds[1:] - bounds[:-1]
        document_starts = np.zeros(stop - start, dtype=np.bool_)
        document_starts[bounds[:-1]] = True
        document_starts[0] = firsts[0] == start
        positions = np.arange(start, stop, dtype=np.int64) - np.repeat(firsts, lengths)
        k = None if self._document_k is None else np.repeat(self._document_k[numbers], lengths)
        return Window(tokens, document_starts, positions, k)

    def _refuse_id(self, start: int, tokens: npt.NDArray[np.int64]) -> None:
        at = int(np.argmax((tokens >= (self.vocab_size or 0)) | (tokens < 0)))
        numbers, firsts = self.data.documents_in(start + at, start + at + 1)
        raise InputError(
            f"{self.data.bin_path}: byte {(start + at) * self.data.dtype.itemsize}: document {numbers[0]}, token "
            f"{start + at - firsts[0]}: id {tokens[at]} is outside the vocabulary of {self.vocab_size}: the file is "
            "damaged or was made with another tokenizer, prepare it again"
        )


@dataclass(frozen=True)
class SourceSpec:
    """One corpus of a blend."""

    corpus: Corpus
    """The documents."""
    weight: float = 1.0
    """Share of the samples, relative to the other sources."""
    k: int | Literal["default"] | None = "default"
    """Drop 1 in k where a document has no k of its own; None: never; default: as the run says."""


class SampleStream:
    """The endless sequence of a run's samples over a blend of corpora. Sample n depends on (seed, n) alone.

    `halo`: tokens of left context that the mask needs; it changes no sample's inputs and targets. Raises InputError
    for a corpus shorter than a sample.
    """

    def __init__(self, sources: Sequence[SourceSpec], sequence_length: int, seed: int, halo: int = 0) -> None:
        if not sources:
            raise InputError("no sources to read: set data.train to at least one corpus")
        for source in sources:
            if source.corpus.num_tokens < sequence_length + 1:
                raise InputError(
                    f"{source.corpus.data.bin_path}: {source.corpus.num_tokens} tokens, one sample takes "
                    f"{sequence_length + 1} (data.sequence_length + 1): lower data.sequence_length or add text"
                )
        self.sources = list(sources)
        self.halo = halo
        self.order = SampleOrder(
            [source.corpus.num_tokens for source in sources],
            [source.weight for source in sources],
            sequence_length,
            seed,
        )

    @property
    def sequence_length(self) -> int:
        """Inputs, and targets, of a sample (S)."""
        return self.order.sequence_length

    @property
    def unique_samples(self) -> int:
        """How many samples come before any source begins its second pass."""
        return self.order.unique_samples

    def epochs(self, consumed: int) -> list[float]:
        """Passes made over each source once the first `consumed` samples are read."""
        return self.order.epochs(consumed)

    def locate(self, first: int, count: int) -> Locations:
        """Where the samples first ... first + count - 1 come from."""
        return self.order.locate(first, count)

    def place(self, numbers: npt.NDArray[np.int64]) -> Locations:
        """Where the samples with these numbers come from."""
        return self.order.place(numbers)

    def read(self, number: int) -> Sample:
        """Sample `number` of the run."""
        return self.read_at(self.locate(number, 1), 0)

    def read_at(self, locations: Locations, row: int) -> Sample:
        """The sample at a row of `locate`'s answer."""
        which = int(locations.source[row])
        source = self.sources[which]
        window = source.corpus.window(int(locations.start[row]) - self.halo, self.halo + self.sequence_length + 1)
        return Sample(
            window.tokens,
            window.document_starts,
            window.positions,
            _effective_k(window.k, source.k, len(window.tokens)),
            self.halo,
            which,
            int(locations.number[row]),
        )

    def describe(self) -> dict[str, Any]:
        """All that decides the sequence of samples, for a checkpoint to store and a resume to compare (JSON types)."""
        return {
            "order": ORDER,
            "seed": self.order.seed,
            "sequence_length": self.sequence_length,
            "sources": [
                {"fingerprint": source.corpus.fingerprint(), "slots": slots, "k": source.k}
                for source, slots in zip(self.sources, self.order.slots, strict=True)
            ],
        }


def open_train(config: DataConfig) -> list[SourceSpec]:
    """The training sources of a configuration."""
    if not config.train:
        raise InputError("data.train is empty: name a corpus (data.train=PATH), made by `megafish prepare`")
    return [_open_source(source, "train", config.shares) for source in config.train]


def open_valid(config: DataConfig) -> list[SourceSpec]:
    """The validation sources: those named, or else the validation splits of the training corpora that have one.

    Empty where none is named and no training corpus has validation text. A training corpus's split that is shorter
    than one sample is passed over like one that is empty: it must not stop the training, for which its text suffices.
    A corpus that was named for validation must be long enough (InputError).
    """
    needed = config.sequence_length + 1
    if config.valid is not None:
        named = [_open_source(source, "valid") for source in config.valid]
        for corpus in (spec.corpus for spec in named):
            if corpus.num_tokens < needed:
                raise InputError(
                    f"data.valid: {corpus.data.bin_path} has {corpus.num_tokens} tokens for validation, "
                    f"one sample takes {needed} (data.sequence_length + 1): name a longer corpus, or prepare it with a "
                    "larger --valid-fraction"
                )
        return named
    found = []
    for source in config.train:
        if not Path(source.path).is_dir():
            if config.shares is not None and config.shares[1]:
                found.append(_open_source(source, "valid", config.shares))
            continue
        split = read_manifest(Path(source.path))["splits"].get("valid")
        if split is not None and split["tokens"] >= needed:
            found.append(_open_source(source, "valid"))
    return found


def run_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer of a run: data.tokenizer, or else the one stored with its first training corpus that has one.

    Which token ends a document is the choice of the corpus: data.tokenizer takes it from the first training corpus made
    with the same file. Reads manifests only, so that a trained model can be used where its corpus is damaged. Raises
    InputError.
    """
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer, eos=_eos_of_corpora(config))
    for source in config.train:
        folder = Path(source.path)
        if folder.is_dir():
            return _stored_tokenizer(folder, read_manifest(folder))
    for source in config.train:
        if not any(file.is_file() for file in file_pair(Path(source.path))):
            raise InputError(_NO_CORPUS.format(path=source.path))
    paths = ", ".join(source.path for source in config.train) or "none"
    raise InputError(
        f"data.tokenizer is not set, and no training corpus comes with a tokenizer ({paths}; bare .bin/.idx pairs have "
        "none): set data.tokenizer=tokenizer.model"
    )


def _eos_of_corpora(config: DataConfig) -> int | None:
    """The end-of-document id of the first training corpus that was made with the file data.tokenizer, if any."""
    path = tokenizer_file(str(config.tokenizer))
    if not path.is_file():
        return None  # loading it says what is wrong
    sha256 = sha256_file(path)
    for source in config.train:
        try:
            known = read_manifest(Path(source.path))["tokenizer"]
        except InputError:
            continue  # a bare pair, or a corpus that opening will refuse
        if known["sha256"] == sha256:
            return int(known["eos_id"])
    return None


def _stored_tokenizer(folder: Path, manifest: dict[str, Any]) -> Tokenizer:
    return load_tokenizer(folder / manifest["tokenizer"]["file"], eos=manifest["tokenizer"]["eos_id"])


def _open_source(
    source: SourceConfig, split: Literal["train", "valid"], shares: tuple[float, float, float] | None = None
) -> SourceSpec:
    corpus = Corpus(source.path, split, shares)
    weight = corpus.num_tokens if source.weight == "size" else source.weight
    return SourceSpec(corpus, weight, source.goldfish_k)


def _effective_k(
    document_k: npt.NDArray[np.int32] | None, source_k: int | Literal["default"] | None, length: int
) -> npt.NDArray[np.int32] | None:
    """k of each token: its document's, or else its source's."""
    if source_k == "default":
        return document_k
    fallback = np.int32(NEVER_K if source_k is None else source_k)
    if document_k is None:
        return np.full(length, fallback)
    return np.where(document_k == DEFAULT_K, fallback, document_k)
