"""What the command line names. Imports nothing heavy."""

from __future__ import annotations

from enum import Enum


class Rounding(str, Enum):
    """Grids that weights are rounded to: the nearest value of the grid, read back."""

    bf16 = "bf16"
    """8 significant bits."""
    int8 = "int8"
    """-127 to 127, a scale for each row of a matrix."""
    int4 = "int4"
    """-7 to 7, a scale for each 64 neighbours in a row."""


class ChoiceBy(str, Enum):
    """How a choice is made."""

    text = "text"
    """Each choice is read as the answer: the one with the smallest loss a token."""
    letter = "letter"
    """The choices stand in the question under letters, and the likeliest letter is the choice (WMDP, MMLU)."""
