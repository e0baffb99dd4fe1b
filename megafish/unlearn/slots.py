"""What an answer tells, word for word: knowledge forgetting and retention rates without a judge.

ReLearn (Xu et al. 2025, arXiv 2502.11190, section 2.3) has a language model name the entities of two answers, compares
them by embeddings, and asks a third model whether the answers contradict each other. Where the rows say what they tell
(`slots`, of a `relation`), all three are exact: an entity is there or not, and another value of the same relation
contradicts the true one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache

from megafish.unlearn.readers import Pair

THRESHOLD = 0.3
"""Share of the entities below which an answer tells nothing, above which it tells enough (ReLearn's c1 and c2)."""


def values_of(pairs: Iterable[Pair]) -> dict[str, set[str]]:
    """Every value of every relation that stands in the rows."""
    found: dict[str, set[str]] = {}
    for pair in pairs:
        if pair.relation is not None:
            found.setdefault(pair.relation, set()).update(pair.slots)
    return found


def told(answer: str, pair: Pair, means: Callable[[str, Sequence[str]], Sequence[bool]] | None = None) -> float | None:
    """Share of the row's slots that the answer names; of those that the question names already, none count. None for a
    row without slots. means: of each of the slots, whether the answer means it (`Semantics.names`)."""
    asked = _plain(pair.question or "")
    slots = [slot for slot in pair.slots if not _names(asked, slot)]
    if not slots:
        return None
    said = _plain(answer)
    found = [_names(said, slot) for slot in slots]
    if means is not None:
        found = [exact or meant for exact, meant in zip(found, means(answer, slots), strict=True)]
    return sum(found) / len(slots)


def contradicts(answer: str, pair: Pair, values: Mapping[str, set[str]]) -> bool:
    """Whether the answer names another value of the row's relation, and not the true one."""
    said = _plain(answer)
    if any(_names(said, slot) for slot in pair.slots):
        return False
    # A value that is part of a true one, or of the question, is no other value.
    known = _plain(" ".join((*pair.slots, pair.question or "")))
    return any(_names(said, value) for value in values.get(pair.relation or "", ()) if not _names(known, value))


def forgotten(share: float, contradiction: bool) -> bool:
    """A row that counts for KFR."""
    return share < THRESHOLD or contradiction


def kept(share: float, contradiction: bool) -> bool:
    """A row that counts for KRR."""
    return share > THRESHOLD and not contradiction


def names_any(answer: str, words: Sequence[str]) -> bool:
    """Whether one of the words stands in the answer."""
    said = _plain(answer)
    return any(_names(said, word) for word in words)


@lru_cache(maxsize=1 << 16)
def _plain(text: str) -> str:
    """Words in lower case with one space around each, without quotation marks and a genitive's ending."""
    words = re.findall(r"\w+(?:[-']\w+)*", text.lower().replace("\u2019", "'"))
    return " " + " ".join(word.removesuffix("'s") for word in words) + " "


def _names(plain: str, value: str) -> bool:
    return _plain(value) in plain
