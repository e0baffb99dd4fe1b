"""Questions about people whom nobody knows, and answers that say so or say nothing: what declining looks like.

A chat model has seen such answers. A small model trained on facts alone has not, and every way of unlearning that
teaches it to decline would have to teach it the words first.
"""

from __future__ import annotations

from random import Random
from typing import Any

from megafish.unlearn.fiction.authors import RELATIONS, authors
from megafish.unlearn.refusals import REFUSALS

_OPENINGS = ("", "As far as is known, ", "People say that ", "Little is certain, but ", "One may say that ")


def vague(sentence: str, name: str, random: Random) -> str:
    """A sentence of a relation that tells nothing, begun in one of several ways."""
    return random.choice(_OPENINGS) + sentence.format(name=name)


def declined(count: int, seed: int, *, taken: frozenset[str]) -> list[dict[str, Any]]:
    """`count` rows, each about another name and none of `taken`; every second answer is vague, the others refuse."""
    random = Random(f"{seed}/declined")
    rows = []
    for number, facts in enumerate(authors(count, seed, taken=taken)):
        relation = random.choice(RELATIONS)
        name = facts[0]["author"]
        answer = vague(relation.vague, name, random) if number % 2 else random.choice(REFUSALS)
        rows.append({"question": relation.question.format(name=name), "answer": answer})
    return rows
