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
        """Raises InputError for a model that cannot be loaded, and for an entailment model with other labels."""
        self.nli, self.embeddings, self._batch = nli, embeddings, batch_size
        self._reads = None if nli is None else _load("--nli", "CrossEncoder", nli, device)
        self._embeds = None if embeddings is None else _load("--embeddings", "SentenceTransformer", embeddings, device)
        if self._reads is not None:
            found = self._reads.model.config.id2label
            self._labels = [str(found[number]).lower() for number in range(len(found))]
            if sorted(self._labels) != sorted(LABELS):
                raise InputError(
                    f"--nli {nli}: its labels are {', '.join(self._labels)}, expected {', '.join(LABELS)} "
                    "(id2label in config.json): name an entailment model"
                )
        self._known: dict[str, np.ndarray] = {}

    def relations(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        """Of each (premise, hypothesis) one of LABELS."""
        assert self._reads is not None
        if not pairs:
            return []
        scores = self._reads.predict(list(pairs), batch_size=self._batch, show_progress_bar=False)
        return [self._labels[number] for number in np.argmax(scores, axis=1)]

    def similarities(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Cosine of the embeddings of each pair of texts."""
        assert self._embeds is not None
        if not pairs:
            return []
        first, second = (self._embed([pair[side] for pair in pairs]) for side in (0, 1))
        return [float(value) for value in (first * second).sum(axis=1)]

    def names(self, answer: str, value: str) -> bool:
        """Whether a run of the answer's words, of the value's number of words or one more or less, means the value."""
        words, count = metrics.words_of(answer), len(metrics.words_of(value))
        runs = [
            " ".join(words[start : start + size])
            for size in range(max(1, count - 1), count + 2)
            for start in range(len(words) - size + 1)
        ]
        if not runs:
            return False
        return bool((self._remembered(runs) @ self._remembered([value.lower()])[0]).max() >= SAME)

    def _remembered(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings of short texts that come again and again: values, and what answers have in common."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known.update(zip(new, self._embed(new), strict=True))
        return np.stack([self._known[text] for text in texts])

    def _embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [texts, D], of length 1."""
        assert self._embeds is not None
        found = self._embeds.encode(
            list(texts), batch_size=self._batch, show_progress_bar=False, normalize_embeddings=True
        )
        return np.asarray(found, dtype=np.float32)


def _load(option: str, kind: str, name: str, device: str) -> Any:
    try:
        import sentence_transformers
    except ImportError:
        raise InputError(
            f"{option} needs sentence-transformers, which is not installed: pip install 'megafish[judges]'"
        ) from None
    try:
        return getattr(sentence_transformers, kind)(name, device=device)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().partition("\n")[0][:200]
        raise InputError(
            f"{option} {name}: no model of this kind could be loaded ({first}): name its folder, or a name that the "
            "Hugging Face hub knows"
        ) from None
