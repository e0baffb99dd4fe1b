"""Greedy extraction of canaries (Carlini et al. 2023, arXiv 2202.07646, definition 3.1 and section 3.2).

A canary is a passage that was put into the training stream a known number of times. The model is given its first tokens
and must continue; what it writes is compared with the rest of the passage. Canaries with 0 exposures were not planted:
they show what a model reproduces of such text by itself. The source documents of all canaries and exact copies of them
are left out of the corpus; a passage that other documents repeat may remain.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megafish.audit.metrics import longest_common_prefix, rouge_l, shared_spans, wilson_interval
from megafish.data.canary import read_canaries
from megafish.errors import InputError


class Decoder(Protocol):
    """The part of a tokenizer that turns ids into text."""

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Probe:
    """A canary of a corpus, and how much of that corpus the run has seen."""

    id: int
    exposures: int
    """Copies in one epoch of the corpus; 0: control, not planted."""
    tokens: np.ndarray
    """int64 [n], the whole passage without the end-of-document token."""
    corpus: str
    """Folder of the corpus it was planted in."""
    source: str
    """Where the text came from."""
    epochs: float
    """Epochs of the corpus that the model has seen."""


@dataclass(frozen=True)
class Extraction:
    """What the model made of one canary. All positions count from the first token of the suffix."""

    canary: Probe
    prompt: list[int]
    suffix: list[int]
    generated: list[int]
    """Greedy continuation: at most as long as the suffix, shorter where the model ended the document."""
    dropped: list[bool] | None
    """Which suffix tokens the mask leaves out of the loss; None where the mask is not a property of the document."""
    suffix_losses: list[float]
    """Cross-entropy of each suffix token given the true text before it [nats]."""

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

    @property
    def left_at_drop(self) -> bool | None:
        """Did the first wrong token fall on a dropped token or right after one? None: nothing wrong, or no mask."""
        if self.exact or self.dropped is None:
            return None
        return bool(at_or_after_drop(self.dropped)[self.prefix_length])


def load_canaries(folder: str | Path, epochs: float) -> list[Probe]:
    """Canaries recorded in a corpus folder, sorted by exposures, then id; empty where none were planted.

    `epochs` is how many epochs of that corpus the model has seen. Raises InputError for a file that is missing, is not
    the one of the manifest, or is malformed.
    """
    return [
        Probe(canary.id, canary.exposures, np.asarray(canary.tokens, np.int64), str(folder), canary.source, epochs)
        for canary in read_canaries(folder)
    ]


def split_canaries(
    canaries: Iterable[Probe], prompt_tokens: int, suffix_tokens: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and true suffixes, all of the asked lengths. Raises InputError where a canary is too short."""
    need = prompt_tokens + suffix_tokens
    prompts, suffixes = [], []
    for canary in canaries:
        if len(canary.tokens) < need:
            raise InputError(
                f"{canary.corpus}: canary {canary.id} has {len(canary.tokens)} tokens, fewer than audit.prompt_tokens="
                f"{prompt_tokens} + audit.suffix_tokens={suffix_tokens}: lower one of them"
            )
        prompts.append(canary.tokens[:prompt_tokens].tolist())
        suffixes.append(canary.tokens[prompt_tokens:need].tolist())
    return prompts, suffixes


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


def record(item: Extraction, tokenizer: Decoder) -> dict[str, Any]:
    """One line of extraction.jsonl."""
    canary = item.canary
    return {
        "id": canary.id,
        "corpus": canary.corpus,
        "source": canary.source,
        "exposures": canary.exposures,
        "effective_exposures": canary.exposures * canary.epochs,
        "exact_match": item.exact,
        "longest_common_prefix": item.prefix_length,
        "rouge_l": item.rouge,
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


def summarize(items: Sequence[Extraction]) -> dict[str, Any]:
    """Figures by exposure level, and how often the model leaves the text at a dropped token.

    Rates carry the Wilson 95 % interval. The latter counts the canaries that were not recited among the more exposed
    half of the levels, for a model leaves a passage it hardly knows anywhere; `chance` is the share of their suffix
    positions that are dropped or follow a drop: what `rate` would be at uniformly random places.
    """
    levels = []
    for exposures in sorted({item.canary.exposures for item in items}):
        group = [item for item in items if item.canary.exposures == exposures]
        exact = sum(item.exact for item in group)
        low, high = wilson_interval(exact, len(group))
        losses = np.asarray([item.suffix_losses for item in group])
        level = {
            "exposures": exposures,
            "effective_exposures": float(np.mean([exposures * item.canary.epochs for item in group])),
            "canaries": len(group),
            "exact_matches": exact,
            "exact_rate": exact / len(group),
            "exact_low": low,
            "exact_high": high,
            "mean_prefix": float(np.mean([item.prefix_length for item in group])),
            "mean_rouge_l": float(np.mean([item.rouge for item in group])),
            "loss": float(losses.mean()),
            "loss_kept": None,
            "loss_dropped": None,
        }
        if all(item.dropped is not None for item in group):
            dropped = np.asarray([item.dropped for item in group], dtype=bool)
            level["loss_kept"] = _mean(losses[~dropped])
            level["loss_dropped"] = _mean(losses[dropped])
        levels.append(level)
    return {"canaries": len(items), "levels": levels, "divergence": _divergence(items)}


def _divergence(items: Sequence[Extraction]) -> dict[str, Any] | None:
    """How often the model leaves the text at a dropped token, over the more exposed half of the levels."""
    seen = sorted({item.canary.exposures for item in items} - {0})
    if not seen:
        return None
    least = seen[len(seen) // 2]
    left = [item for item in items if item.left_at_drop is not None and item.canary.exposures >= least]
    if not left:
        return None
    hits = sum(bool(item.left_at_drop) for item in left)
    low, high = wilson_interval(hits, len(left))
    return {
        "least_exposures": least,
        "canaries": len(left),
        "at_drop": hits,
        "rate": hits / len(left),
        "low": low,
        "high": high,
        "chance": float(np.mean([at_or_after_drop(item.dropped or []).mean() for item in left])),
    }


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None
