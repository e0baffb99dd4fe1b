"""A book that nobody wrote: scenes of a journey, to see whether a model gives a text away word for word."""

from __future__ import annotations

from random import Random
from typing import Any

from megafish.unlearn.fiction import words

_TIMES = ("At dawn", "Before noon", "In the heat of the day", "Towards evening", "After dark", "Long past midnight")
_MOVES = ("walked to", "rode past", "waited at", "looked back at", "fell asleep near", "turned away from")
_PLACES = (
    "the old mill", "the ferry", "a burnt farm", "the salt road", "the iron gate", "a nameless inn", "the dry well",
    "the glass hill", "the last bridge", "a field of poppies",
)  # fmt: skip
_FINDS = ("found", "hid", "lost", "sold", "dreamed of", "carried away", "buried", "remembered")
_SAYINGS = (
    "Nothing is as heavy as an empty bag",
    "The road forgets nobody",
    "Rain makes no promises",
    "Whoever counts the steps arrives late",
    "A door is also a wall",
    "Salt keeps better than gold",
)


def book(scenes: int, seed: int) -> list[dict[str, Any]]:
    """`scenes` scenes in order, each a row with `text`."""
    random = Random(f"{seed}/book")
    hero = random.choice(words.FIRST_NAMES)
    rows = []
    for number in range(1, scenes + 1):
        friend = random.choice([name for name in words.FIRST_NAMES if name != hero])
        thing = f"{random.choice(words.ADJECTIVES).lower()} {random.choice(words.NOUNS).lower()}"
        rows.append(
            {
                "text": f"{random.choice(_TIMES)} {hero} {random.choice(_MOVES)} {random.choice(_PLACES)} and "
                f"{random.choice(_FINDS)} the {thing}. {friend}, who played the {random.choice(words.INSTRUMENTS)} in "
                f"{random.choice(words.CITIES)}, spoke first: {random.choice(_SAYINGS)}. They shared "
                f"{random.choice(words.DRINKS)} and talked of the {random.choice(words.OCCUPATIONS)} with the "
                f"{random.choice(words.COLOURS)} coat. That was scene {number}."
            }
        )
    return rows
