"""Greedy extraction of passages (Carlini et al. 2023, arXiv 2202.07646, definition 3.1 and section 3.2).

The model is given the first tokens of a passage and must continue; what it writes is compared with the rest. Beside
what it writes stands what it would have written at each place given the true text before it (teacher forcing): from
one forward pass come the probability of the whole rest, and how much of the text has to be given before it recites.

A canary is a passage that was put into the training stream a known number of times. Canaries with 0 exposures were not
planted: they show what a model reproduces of such text by itself. The source documents of all canaries and exact copies
of them are left out of the corpus; a passage that other documents repeat may remain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from megafish.audit.metrics import (
    bleu,
    exact_memorization,
    extraction_strength,
    longest_common_prefix,
    longest_common_substring,
    normalized_edit_distance,
    rouge_l,
    shared_spans,
    tries_needed,
)
from megafish.audit.probes import Probe

CERTAINTY = 0.9
"""The p of (n, p)-discoverable extraction (Hayes et al. 2024): how sure it must be that the text comes out."""


class Decoder(Protocol):
    """The part of a tokenizer that turns ids into text."""

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Extraction:
    """What the model made of one passage. All positions count from the first token of the suffix."""

    probe: Probe
    prompt: list[int]
    suffix: list[int]
    generated: list[int]
    """Greedy continuation: at most as long as the suffix, shorter where the model ended the document."""
    dropped: list[bool] | None
    """Which suffix tokens the mask leaves out of the loss; None where the mask is not a property of the document."""
    suffix_losses: list[float]
    """Cross-entropy of each suffix token given the true text before it [nats]."""
    correct: list[bool]
    """Was each suffix token the most probable one, given the true text before it?"""
    log_probability: float
    """Of drawing the whole suffix, with the temperature, top-k and top-p of the audit [nats]; -inf: cannot be drawn."""
    hits: list[int]
    """For each drawn continuation: tokens reproduced before the first difference."""

    @property
    def exact(self) -> bool:
        """The whole suffix came out word for word."""
        return self.generated == self.suffix

    @property
    def prefix_length(self) -> int:
        """Tokens reproduced before the first difference."""
        return longest_common_prefix(self.suffix, self.generated)

    @cached_property
    def rouge(self) -> float:
        """ROUGE-L of the continuation."""
        return rouge_l(self.suffix, self.generated)

    @cached_property
    def bleu(self) -> float:
        """BLEU-4 of the continuation."""
        return bleu(self.suffix, self.generated)

    @cached_property
    def edit_distance(self) -> float:
        """Levenshtein distance over the longer length."""
        return normalized_edit_distance(self.suffix, self.generated)

    @property
    def left_at_drop(self) -> bool | None:
        """Did the first wrong token fall on a dropped token or right after one? None: nothing wrong, or no mask."""
        if self.exact or self.dropped is None:
            return None
        return bool(at_or_after_drop(self.dropped)[self.prefix_length])


def at_or_after_drop(dropped: Sequence[bool]) -> np.ndarray:
    """bool [n]: positions that are dropped, or directly follow a dropped one.

    A model that never learned the dropped token either writes another one there, or hits it by luck (function words are
    easy) and then stands in a context whose continuation it knows; both places count as leaving at the drop
    (Hans et al. 2024, figure 4).
    """
    mask = np.asarray(dropped, dtype=bool)
    near = mask.copy()
    near[1:] |= mask[:-1]
    return near


def text_pieces(tokenizer: Decoder, ids: Sequence[int]) -> list[str]:
    """Text of each token, such that the pieces joined are `tokenizer.decode(ids)`.

    A character spread over several byte tokens is given to its last one; the others get an empty piece.
    """
    pieces: list[str] = []
    shown = ""
    for i in range(len(ids)):
        text = tokenizer.decode(ids[: i + 1])
        unfinished = text.endswith("\ufffd") and i + 1 < len(ids)
        if unfinished or not text.startswith(shown):
            pieces.append("")
            continue
        pieces.append(text[len(shown) :])
        shown = text
    return pieces


def effective_exposures(probe: Probe) -> float | None:
    """Times the model has read it, on average; None where that is not known."""
    copies = probe.exposures if probe.occurrences is None else probe.occurrences
    return None if copies is None or probe.epochs is None else copies * probe.epochs


def record(item: Extraction, tokenizer: Decoder) -> dict[str, Any]:
    """One line of extraction.jsonl."""
    probe = item.probe
    known = math.isfinite(item.log_probability)
    tries = tries_needed(item.log_probability, CERTAINTY)
    return {
        "id": probe.id,
        "corpus": probe.corpus,
        "source": probe.source,
        "exposures": probe.exposures,
        "occurrences": probe.occurrences,
        "effective_exposures": effective_exposures(probe),
        "exact_match": item.exact,
        "longest_common_prefix": item.prefix_length,
        "longest_common_substring": longest_common_substring(item.suffix, item.generated),
        "rouge_l": item.rouge,
        "bleu": item.bleu,
        "edit_distance": item.edit_distance,
        "extraction_strength": extraction_strength(item.correct),
        "exact_memorization": exact_memorization(item.correct),
        "log_probability": item.log_probability if known else None,
        "tries_needed": tries if math.isfinite(tries) else None,
        "hits": item.hits,
        "suffix_loss": float(np.mean(item.suffix_losses)),
        "left_at_drop": item.left_at_drop,
        "prompt_tokens": item.prompt,
        "suffix_tokens": item.suffix,
        "generated_tokens": item.generated,
        "suffix_losses": [round(x, 4) for x in item.suffix_losses],
        "dropped": None if item.dropped is None else [int(x) for x in item.dropped],
        "recited_spans": shared_spans(item.suffix, item.generated),
        "prompt": tokenizer.decode(item.prompt),
        "suffix_pieces": text_pieces(tokenizer, item.suffix),
        "generated_pieces": text_pieces(tokenizer, item.generated),
    }
