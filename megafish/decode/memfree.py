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
_PREFIX, _GROW = 256, 16
"""Candidates looked up at first where any number may be wanted, and how many times as many next."""


class MemFree:
    """A filter in use, with its counts.

    Attributes: `filter`; `tokens`, tokens chosen; `rejected`, steps at which the likeliest token was blocked.
    """

    def __init__(self, filter: NgramFilter) -> None:
        self.filter = filter
        self.tokens = 0
        self.rejected = 0


class Context:
    """The last n - 1 tokens of each row of a batch: what the next token completes an n-gram with."""

    def __init__(self, filter: NgramFilter, texts: Sequence[Sequence[int]]) -> None:
        self.filter = filter
        width = filter.n - 1
        self._tokens = np.zeros((len(texts), width), dtype=np.int64)
        self._seen = np.array([len(text) for text in texts], dtype=np.int64)
        for row, text in enumerate(texts):
            last = text[-width:]
            self._tokens[row, width - len(last) :] = last

    def append(self, tokens: torch.Tensor) -> None:
        """The next token of each row: int64 [b]."""
        self._tokens = np.concatenate([self._tokens[:, 1:], tokens.cpu().numpy()[:, None]], axis=1)
        self._seen += 1

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        self._tokens, self._seen = self._tokens[rows], self._seen[rows]

    def open(self) -> torch.Tensor:
        """Numbers of the rows that end in the beginning of an n-gram, int64 [m]: after the others any token may
        follow."""
        found = self.filter.begins(self._tokens) & (self._seen >= self._tokens.shape[1])
        return torch.from_numpy(found.nonzero()[0])

    def blocked(self, candidates: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Which tokens may not follow in these rows, of those that are `open`: int64 [m, c], rows int64 [m] -> bool
        [m, c]."""
        found = self.filter.contains_next(self._tokens[rows.cpu().numpy()], candidates.cpu().numpy())
        return torch.from_numpy(found).to(candidates.device)


def first_allowed(logits: torch.Tensor, count: int, blocked: Blocked) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` likeliest tokens that are not blocked, of equal ones the first: logits fp32 [b, V] -> (logits [b,
    count], ids [b, count]); -inf and -1 where there are fewer.

    Candidates are looked up from the likeliest on, and only as many as it takes.
    """
    vocab = logits.shape[1]
    width = min(count + _FIRST, vocab)
    while True:
        values, ids = likeliest(logits, width)
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


def draw_allowed(
    logits: torch.Tensor, temperature: float, top_p: float | None, uniform: torch.Tensor, blocked: Blocked
) -> torch.Tensor:
    """Draw from softmax(logits / temperature) without the blocked tokens, limited to the smallest set whose probability
    reaches top_p: logits fp32 [b, V], uniform float64 [b] in [0, 1) -> ids int64 [b], -1 where all are blocked.

    By inversion of the cumulative distribution from the likeliest token on. Only as many candidates are looked up as
    decide the draw: how much of what is left is allowed lies between none and all of it, and where both ends give the
    same token, that is the one.
    """
    vocab = logits.shape[1]
    values, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    chances = torch.softmax(values.double() / temperature, dim=-1)
    free = torch.zeros_like(ids[:, :0], dtype=torch.bool)
    width = min(_PREFIX, vocab)
    while True:
        free = torch.cat([free, ~blocked(ids[:, free.shape[1] : width])], dim=1)
        cumulative = (chances[:, :width] * free).cumsum(-1)
        known = cumulative[:, -1:]
        unknown = chances[:, width:].sum(-1, keepdim=True)
        low, high = (_place(cumulative, total, top_p, uniform) for total in (known, known + unknown))
        if width == vocab or bool(((low == high) & (high < width)).all()):
            break
        width = min(_GROW * width, vocab)
    # A product just below the whole may be rounded up to it: then it is the last allowed token.
    last = torch.where(free, torch.arange(width, device=free.device), 0).amax(-1, keepdim=True)
    place = torch.where(low < width, low, last)
    return torch.where(free.gather(1, place), ids.gather(1, place), -1).squeeze(1)


def _place(cumulative: torch.Tensor, total: torch.Tensor, top_p: float | None, uniform: torch.Tensor) -> torch.Tensor:
    """Where a draw falls if the allowed tokens have the probability `total` [b, 1] in all: int64 [b, 1]; the width of
    `cumulative` [b, width] where that is behind it. It grows with `total`."""
    width = cumulative.shape[1]
    if top_p is None:
        return torch.searchsorted(cumulative, uniform[:, None] * total, right=True)
    last = (cumulative < top_p * total).sum(-1, keepdim=True)
    mass = cumulative.gather(1, last.clamp(max=width - 1))
    place = torch.searchsorted(cumulative, uniform[:, None] * mass, right=True).minimum(last)
    return torch.where(last < width, place, width)


def likeliest(logits: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `width` likeliest tokens by falling logit, of equal ones by rising id: (logits [b, width], ids)."""
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

    After a beginning of an n-gram it looks up the whole vocabulary, since all scores are asked for; megafish's own
    generation looks up the likeliest ones alone.
    """
    from transformers import LogitsProcessor

    class MemFreeLogitsProcessor(LogitsProcessor):
        """input_ids int64 [b, s], scores fp32 [b, V] -> scores [b, V]."""

        def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
            context = Context(filter, input_ids[:, 1 - filter.n :].tolist())
            rows = context.open().to(scores.device)
            ids = torch.arange(scores.shape[1], device=scores.device).expand(len(rows), -1)
            found = scores.clone()
            found[rows] = scores[rows].masked_fill(context.blocked(ids, rows), -torch.inf)
            return found

    return MemFreeLogitsProcessor()
