"""Texts for membership inference: beginnings of documents the model was trained on, and of held-out documents.

`megafish prepare` parts the two by a hash of the document, so they are of one distribution; what an attack tells apart
is what the training left behind. Canaries and texts that stand on both sides are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from megafish.audit.probes import Probe
from megafish.data.corpus import SampleStream, SourceSpec

_MOST = 1_000_000

Text = tuple[int, ...]


@dataclass(frozen=True)
class Members:
    """Texts of one length [tokens]."""

    members: list[Text]
    non_members: list[Text]
    notes: list[str] = field(default_factory=list)
    """Why there are fewer than asked for."""


def choose_members(
    stream: SampleStream, valid: Sequence[SourceSpec], canaries: Sequence[Probe], *, consumed: int, count: int,
    length: int, seed: int,
) -> Members:  # fmt: skip
    """Up to `count` texts of `length` tokens of each kind: members from the first `consumed` samples of the stream."""
    planted = {tuple(probe.tokens[:length].tolist()) for probe in canaries}
    draw = np.random.Generator(np.random.Philox(seed))
    held_out = _take(_beginnings(valid, length, draw), count, planted)
    # After a whole pass every document was read; before, only those known to lie in the samples that were.
    whole = min(stream.epochs(consumed)) >= 1
    read = _beginnings(stream.sources, length, draw) if whole else _trained_on(stream, consumed, length, draw)
    members = _take(read, count, planted | held_out)
    known = "" if whole else " and are known to have been read"
    notes = [
        f"{len(found)} {what} for membership inference instead of {count}: no more have {length} tokens "
        f"(audit.membership_tokens){more}"
        for found, what, more in ((members, "training documents", known), (held_out, "validation documents", ""))
        if len(found) < count
    ]
    # The two sides are sets for the sake of what stands in both; sorted, so that an audit is repeatable.
    return Members(sorted(members), sorted(held_out), notes)


def _take(texts: Iterator[Text], count: int, without: set[Text]) -> set[Text]:
    found: set[Text] = set()
    for text in texts:
        if len(found) == count:
            break
        if text not in without:
            found.add(text)
    return found


def _trained_on(stream: SampleStream, consumed: int, length: int, draw: np.random.Generator) -> Iterator[Text]:
    """Documents that begin, and go on for `length` tokens, within a sample the model has read."""
    for number in _in_random_order(consumed, draw):
        sample = stream.read(number)
        tokens, starts = sample.tokens[sample.halo :], np.flatnonzero(sample.document_starts[sample.halo :])
        for start, end in pairwise([*starts.tolist(), len(tokens)]):
            if end - start > length:  # with one to spare: the token that ends a document is not part of a text
                yield tuple(tokens[start : start + length].tolist())


def _beginnings(sources: Sequence[SourceSpec], length: int, draw: np.random.Generator) -> Iterator[Text]:
    for source in sources:
        data = source.corpus.data
        for number in _in_random_order(data.num_documents, draw):
            start, end = data.bounds(number)
            if end - start > length:
                yield tuple(data.tokens[start : start + length].astype(np.int64).tolist())


def _in_random_order(size: int, draw: np.random.Generator) -> list[int]:
    """The numbers below `size`; of more than a million a million draws, which may repeat."""
    order = draw.permutation(size) if size <= _MOST else draw.integers(0, size, _MOST)
    found: list[int] = order.tolist()
    return found
