"""The grids that weights are rounded to. Imports nothing heavy: the command line names them."""

from __future__ import annotations

from enum import Enum


class Rounding(str, Enum):
    """To the nearest value, and read back from it."""

    bf16 = "bf16"
    """8 significant bits."""
    int8 = "int8"
    """-127 to 127, a scale for each row of a matrix."""
    int4 = "int4"
    """-7 to 7, a scale for each 64 neighbours in a row."""
