"""What answers mean, by models that read: does one contradict another, does it name a thing in other words.

ReLearn (Xu et al. 2025, arXiv 2502.11190, section 2.3) judges answers by an entailment model and by embeddings. Any
that sentence-transformers loads will do, from a folder, or by its name where the Hugging Face hub can be reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megafish.errors import InputError
from megafish.unlearn import metrics

SAME = 0.8
"""Cosine from which on two names mean the same (ReLearn's)."""
LABELS = ("entailment", "neutral", "contradiction")


class Semantics:
    """An entailment model (nli) and a model of embeddings; either may be missing."""

    def __init__(self, nli: str | None, embeddings: str | None, *, device: str, batch_size: int = 32) -> None:
        """Raises InputError for a model that cannot be loaded, an entailment model with other labels, and a model that
        was not made for embeddings."""
        self.nli, self.embeddings, self._batch = nli, embeddings, batch_size
        self._reads = self._embeds = None
        if nli is not None:
            self._reads = _load("--nli", "CrossEncoder", nli, device)
            self._labels = _labels(self._reads, nli)
        if embeddings is not None:
            self._embeds = _load("--embeddings", "SentenceTransformer", embeddings, device)

    def relations(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        """Of each (premise, hypothesis) one of LABELS."""
        assert self._reads is not None
        if not pairs:
            return []
        scores = self._reads.predict(list(pairs), batch_size=self._batch, show_progress_bar=False)
        return [self._labels[number] for number in np.argmax(scores, axis=1)]

    def similarities(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Cosine of the embeddings of each pair of texts."""
        if not pairs:
            return []
        first, second = (self._embed([pair[side] for pair in pairs]) for side in (0, 1))
        return [float(value) for value in (first * second).sum(axis=1)]

    def names(self, answer: str, values: Sequence[str]) -> list[bool]:
        """Of each value whether a run of the answer's words, of its number of words or one more or less, means it."""
        words = metrics.words_of(answer)
        counts = [len(metrics.words_of(value)) for value in values]
        sizes = {size for count in counts for size in (count - 1, count, count + 1) if 1 <= size <= len(words)}
        runs = [" ".join(words[at : at + size]) for size in sorted(sizes) for at in range(len(words) - size + 1)]
        if not runs or not values:
            return [False] * len(values)
        found = self._embed([*runs, *(value.lower() for value in values)])
        cosines = found[: len(runs)] @ found[len(runs) :].T
        lengths = np.array([len(run.split()) for run in runs])
        return [bool((cosines[abs(lengths - count) <= 1, number] >= SAME).any()) for number, count in enumerate(counts)]

    def _embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [texts, D], of length 1."""
        assert self._embeds is not None
        found = self._embeds.encode(
            list(texts), batch_size=self._batch, show_progress_bar=False, normalize_embeddings=True
        )
        return np.asarray(found, dtype=np.float32)


def _labels(reads: Any, name: str) -> list[str]:
    """The labels of an entailment model, in the order of its outputs."""
    found = {} if reads.model is None else reads.model.config.id2label
    labels = [str(found[number]).lower() for number in sorted(found)]
    if sorted(labels) != sorted(LABELS):
        raise InputError(
            f"--nli {name}: its labels are {', '.join(labels) or 'none'}, expected {', '.join(LABELS)} (id2label in "
            "config.json): name an entailment model"
        )
    return labels


def _load(option: str, kind: str, name: str, device: str) -> Any:
    try:
        import sentence_transformers
        from sentence_transformers.util import is_sentence_transformer_model
    except ImportError:
        raise InputError(
            f"{option} needs sentence-transformers, which is not installed: pip install 'megafish[judges]'"
        ) from None
    try:
        loaded = getattr(sentence_transformers, kind)(name, device=device)
        # Of any other model the library would make one, by a mean that the model was never trained for.
        fits = kind == "CrossEncoder" or is_sentence_transformer_model(name)
    except Exception as error:  # of the hub, of transformers, of a tokenizer's library, of a damaged file
        first = str(error).strip().partition("\n")[0][:200]
        raise InputError(
            f"{option} {name}: no model of this kind could be loaded ({error.__class__.__name__}: {first}): name its "
            "folder, or a name that the Hugging Face hub knows"
        ) from None
    if not fits:
        raise InputError(f"{option} {name}: no model of embeddings (it has no modules.json): name one that is")
    return loaded
