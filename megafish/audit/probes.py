"""Passages that a model is asked to continue: planted canaries, passages of a corpus, texts of a file.

A set is one source of passages. Within it they are told apart by how often they occur in what was trained on: a canary
by its copies, a passage drawn by duplication by its occurrences; of others that is not known.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from megafish.config import AuditConfig
from megafish.data.canary import read_canaries
from megafish.data.corpus import Corpus
from megafish.data.duplicates import Duplicates, bin_bounds, duplicate_bin
from megafish.data.indexed import file_pair
from megafish.data.readers import ReadOptions, find_files, read_piece, split_file
from megafish.data.tokenizer import Tokenizer
from megafish.errors import InputError

_TRIED = 64
"""Places tried for each passage of a corpus whose documents are too short for it."""


@dataclass(frozen=True)
class Probe:
    """A passage, and how much of its source the model has seen."""

    id: int
    exposures: int | None
    """Occurrences in one epoch of the corpus (of a passage drawn by duplication: the least of its bin); 0: control,
    not planted; None: not known."""
    tokens: np.ndarray
    """int64 [n], the whole passage without the end-of-document token."""
    corpus: str
    """Folder or file it was taken from."""
    source: str
    """Where the text came from."""
    epochs: float | None
    """Epochs of the corpus that the model has seen; None: not known."""
    occurrences: int | None = None
    """Of a passage drawn by duplication: how often it occurs in one epoch, where exposures say the least of its bin."""


@dataclass(frozen=True)
class ProbeSet:
    """Passages of one kind."""

    name: str
    kind: str
    """"canaries", "corpus" or "text"."""
    probes: list[Probe]
    notes: list[str] = field(default_factory=list)
    """What was left out."""


def load_canaries(folder: str | Path, epochs: float | None) -> list[Probe]:
    """Canaries recorded in a corpus folder, sorted by exposures, then id; empty where none were planted.

    `epochs` is how many epochs of that corpus the model has seen. Raises InputError for a file that is missing, is not
    the one of the manifest, or is malformed.
    """
    return [
        Probe(canary.id, canary.exposures, np.asarray(canary.tokens, np.int64), str(folder), canary.source, epochs)
        for canary in read_canaries(folder)
    ]


def split_probes(
    probes: Iterable[Probe], prompt_tokens: int, suffix_tokens: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and true suffixes, all of the asked lengths. Raises InputError where a passage is too short."""
    need = prompt_tokens + suffix_tokens
    prompts, suffixes = [], []
    for probe in probes:
        if len(probe.tokens) < need:
            raise InputError(
                f"{probe.corpus}: canary {probe.id} has {len(probe.tokens)} tokens, fewer than audit.prompt_tokens="
                f"{prompt_tokens} + audit.suffix_tokens={suffix_tokens}: lower one of them"
            )
        prompts.append(probe.tokens[:prompt_tokens].tolist())
        suffixes.append(probe.tokens[prompt_tokens:need].tolist())
    return prompts, suffixes


def open_probes(
    settings: AuditConfig, tokenizer: Tokenizer, length: int, epochs: Mapping[str, float]
) -> list[ProbeSet]:
    """The sets that `audit.probes` names, passages of `length` tokens. epochs: of the corpora the model was trained on,
    by `corpus_id`, as far as that is known. Raises InputError."""
    return [_open(Path(path), settings, tokenizer, length, epochs) for path in settings.probes]


def corpus_id(corpus: Corpus) -> str:
    """The same for the same tokens, wherever they lie."""
    return json.dumps(corpus.fingerprint(), sort_keys=True)


def _open(
    path: Path, settings: AuditConfig, tokenizer: Tokenizer, length: int, epochs: Mapping[str, float]
) -> ProbeSet:
    if (path / "manifest.json").is_file() or any(file.is_file() for file in file_pair(path)):
        corpus = Corpus(path)
        corpus.check_tokenizer(tokenizer)
        choose = _by_duplication if settings.probe_choice == "duplicates" else _uniform
        found = choose(path, corpus, settings, length)
        seen = epochs.get(corpus_id(corpus))
        return replace(found, probes=[replace(probe, epochs=seen) for probe in found.probes])
    if settings.probe_choice == "duplicates":
        raise InputError(f"audit.probe_choice=duplicates: {path} is no corpus: prepare it, or leave the key away")
    return _texts(path, settings, tokenizer, length)


def _uniform(path: Path, corpus: Corpus, settings: AuditConfig, length: int) -> ProbeSet:
    """Passages at places drawn uniformly among those where one fits into a document."""
    tokens, documents = corpus.data.tokens, corpus.data
    draw = np.random.Generator(np.random.Philox(settings.seed))
    found: dict[int, int] = {}
    for start in draw.integers(0, max(len(tokens) - length, 1), settings.probe_count * _TRIED).tolist():
        if len(found) == settings.probe_count:
            break
        number = int(documents.documents_in(start, start + 1)[0][0])
        # The token that ends the document is not part of a passage.
        if start + length <= documents.bounds(number)[1] - 1:
            found.setdefault(start, number)
    if not found:
        raise InputError(
            f"audit.probes: {path} has no document of {length} tokens (audit.prompt_tokens + audit.suffix_tokens, and "
            "the largest of audit.offsets): lower them"
        )
    probes = [
        Probe(i, None, np.asarray(tokens[start : start + length], np.int64), str(path), f"document {number}", None)
        for i, (start, number) in enumerate(found.items())
    ]
    return ProbeSet(path.name, "corpus", probes, _fewer(len(probes), settings.probe_count, f"places in {path}"))


def _by_duplication(path: Path, corpus: Corpus, settings: AuditConfig, length: int) -> ProbeSet:
    """As many passages from each bin of occurrences (Carlini et al. 2023, section 3.2)."""
    bins = Duplicates.of(path).sample_by_duplication(length, settings.probe_count, settings.seed)
    probes: list[Probe] = []
    for found in (item for group in bins.values() for item in group):
        least = bin_bounds(duplicate_bin(found.count))[0]
        tokens = np.asarray(corpus.data.tokens[found.start : found.start + length], np.int64)
        source = f"document {found.document}, {found.count} times"
        probes.append(Probe(len(probes), least, tokens, str(path), source, None, found.count))
    return ProbeSet(path.name, "corpus", probes)


def _texts(path: Path, settings: AuditConfig, tokenizer: Tokenizer, length: int) -> ProbeSet:
    """The beginnings of the documents of a file or folder."""
    probes: list[Probe] = []
    short = 0
    for source, text in _documents(path):
        ids = tokenizer.encode(text)
        if len(ids) < length:
            short += 1
            continue
        probes.append(Probe(len(probes), None, np.asarray(ids[:length], np.int64), str(path), source, None))
        if len(probes) == settings.probe_count:
            break
    if not probes and not short:
        raise InputError(f"audit.probes: {path}: holds no text")
    if not probes:
        raise InputError(
            f"audit.probes: {path}: none of its {short} texts has {length} tokens (audit.prompt_tokens + "
            "audit.suffix_tokens, and the largest of audit.offsets): lower them"
        )
    notes = [f"{path}: {short} texts of fewer than {length} tokens were left out"] if short else []
    return ProbeSet(path.name, "text", probes, notes)


def _documents(path: Path) -> Iterator[tuple[str, str]]:
    """(file, text) of every document."""
    options = ReadOptions(text_suffixes=(".txt", ".md", ".py"))
    for file in find_files([path], options)[0]:
        for piece in split_file(file, options, 1 << 26):
            for document in read_piece(piece, options):
                yield file.path, document.text


def _fewer(found: int, asked: int, what: str) -> list[str]:
    return [f"{found} {what} instead of {asked}: there are no more with room for a passage"] if found < asked else []


def longest(settings: AuditConfig) -> int:
    """Tokens of a passage that all settings together need."""
    prompts: Sequence[int] = (settings.prompt_tokens, *settings.prompt_lengths)
    return max(prompts) + settings.suffix_tokens + max(settings.offsets, default=0)
