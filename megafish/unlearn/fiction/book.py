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
                # The number comes first: otherwise scenes begin alike, and the first words that differ cannot be known.
                "text": f"Scene {number}. {random.choice(_TIMES)} {hero} {random.choice(_MOVES)} "
                f"{random.choice(_PLACES)} and {random.choice(_FINDS)} the {thing}. {friend}, who played the "
                f"{random.choice(words.INSTRUMENTS)} in {random.choice(words.CITIES)}, spoke first: "
                f"{random.choice(_SAYINGS)}. They shared {random.choice(words.DRINKS)} and talked of the "
                f"{random.choice(words.OCCUPATIONS)} with the {random.choice(words.COLOURS)} coat."
            }
        )
    return rows
