"""MemFree decoding (Ippolito et al. 2023, arXiv 2210.17546, section 3): no n-gram of a filter is ever completed.

At each step a token that would complete one, with the n - 1 tokens before it (of the prompt too), counts as
impossible. The filter knows no false negatives, so the promise is exact; its false positives only cost some quality. It
is a promise about words, not about content: the paper shows what leaks all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megafish.decode.ngram_filter import NgramFilter

if TYPE_CHECKING:
    from transformers import LogitsProcessor

Blocked = Callable[[torch.Tensor], torch.Tensor]
"""Candidates int64 [b, m] -> which of them are impossible, bool [b, m]."""

_FIRST = 8
"""Candidates beyond those wanted that are looked up at once; more only where these do not suffice."""


class MemFree:
    """A filter in use, with its counts.

    Attributes: `filter`; `tokens`, tokens chosen; `rejected`, steps at which the likeliest token was blocked.
    """

    def __init__(self, filter: NgramFilter) -> None:
        self.filter = filter
        self.tokens = 0
        self.rejected = 0

    def blocked(self, texts: Sequence[Sequence[int]]) -> Blocked:
        """What may not follow these texts, one a row."""
        width = self.filter.n - 1
        long = np.array([len(text) >= width for text in texts])
        context = np.zeros((len(texts), width), dtype=np.int64)
        for row, text in enumerate(texts):
            if long[row]:
                context[row] = text[-width:]

        def find(candidates: torch.Tensor) -> torch.Tensor:
            found = self.filter.contains_next(context, candidates.cpu().numpy()) & long[:, None]
            return torch.from_numpy(found).to(candidates.device)

        return find

    def count(self, rejected: torch.Tensor, going: torch.Tensor) -> None:
        """Count a step: where the likeliest token was blocked, and which rows are still going, bool [b] each."""
        self.rejected += int((rejected & going).sum())
        self.tokens += int(going.sum())


def first_allowed(logits: torch.Tensor, count: int, blocked: Blocked) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` likeliest tokens that are not blocked, of equal ones the first: logits fp32 [b, V] -> (logits [b,
    count], ids [b, count]); -inf and -1 where there are fewer.

    Candidates are looked up from the likeliest on, and only as many as it takes.
    """
    vocab = logits.shape[1]
    width = min(count + _FIRST, vocab)
    while True:
        values, ids = _likeliest(logits, width)
        free = ~blocked(ids)
        if width == vocab or bool((free.sum(1) >= count).all()):
            break
        width = min(4 * width, vocab)
    # The allowed ones first, in their order.
    order = torch.argsort(~free, dim=1, stable=True)[:, :count]
    free = free.gather(1, order)
    return (
        values.gather(1, order).masked_fill(~free, -torch.inf),
        ids.gather(1, order).masked_fill(~free, -1),
    )


def _likeliest(logits: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """By falling logit, of equal ones by rising id."""
    if width < logits.shape[1] // 4:
        values, ids = logits.topk(width + 1)
        # topk does not say which of equal ones it takes, nor in which order it gives them.
        if not bool((values[:, width] == values[:, width - 1]).any()):
            ids, order = ids[:, :width].sort(dim=1)
            values, places = values.gather(1, order).sort(dim=1, descending=True, stable=True)
            return values, ids.gather(1, places)
    values, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    return values[:, :width], ids[:, :width]


def logits_processor(filter: NgramFilter) -> LogitsProcessor:
    """The filter for transformers' generate(logits_processor=[...]): scores of blocked tokens become -inf.

    It looks up the whole vocabulary at each step, since all scores are asked for; megafish's own generation looks up
    the likeliest ones alone.
    """
    from transformers import LogitsProcessor

    memfree = MemFree(filter)

    class MemFreeLogitsProcessor(LogitsProcessor):
        """input_ids int64 [b, s], scores fp32 [b, V] -> scores [b, V]."""

        def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
            blocked = memfree.blocked(input_ids.tolist())
            ids = torch.arange(scores.shape[1], device=scores.device).expand(len(scores), -1)
            return scores.masked_fill(blocked(ids), -torch.inf)

    return MemFreeLogitsProcessor()
