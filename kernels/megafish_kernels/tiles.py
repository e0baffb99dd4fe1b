"""How the loss's Triton kernels cut up their work: tiles, a plain table by architecture and shape, which `override`
replaces; splits of the vocabulary; and the columns whose logits are kept.

The tiles of the table compile without spills for their architecture (`python -m megafish_kernels.report` prints the
figures). None has been timed: they follow from registers, shared memory and arithmetic intensity alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

LOGITS_BYTES = 2**30
"""Of logits kept for the backward and of a slab of those that are not, if the caller names no budget."""
SLAB_COLUMNS = 8192
"""Most columns of a slab."""
GROUP = 8
"""Blocks of rows that programs which run together share, so that their operands stay in the cache."""
# Programs that the forward starts at least, by splitting the vocabulary: a few for each of a GPU's 108 to 148 SMs.
_PROGRAMS = 512


@dataclass(frozen=True)
class Tile:
    """A program's share of a matrix product: `rows` x `columns` of the result, `inner` of the sum at a time."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    """Loads under way at one time."""

    def launch(self) -> dict[str, Any]:
        """The options of a kernel's start."""
        return {
            "BM": self.rows,
            "BN": self.columns,
            "BK": self.inner,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


@dataclass(frozen=True)
class LossTiles:
    """One tile for each kernel of the loss that multiplies."""

    forward: Tile
    """Logits and their figures; rows are tokens, columns are ids."""
    gradient: Tile
    """Logits anew and their gradient; rows are tokens, columns are ids."""
    product: Tile
    """The gradients of hidden states and weight."""


_AMPERE = LossTiles(Tile(128, 128, 32, 8, 4), Tile(128, 128, 64, 8, 3), Tile(128, 128, 32, 8, 4))
_HOPPER = LossTiles(Tile(128, 128, 64, 8, 4), Tile(128, 128, 64, 8, 4), Tile(128, 128, 64, 8, 4))
_FEW_ROWS = LossTiles(Tile(64, 128, 64, 4, 3), Tile(64, 128, 64, 4, 3), Tile(64, 128, 32, 4, 4))
_SINGLE = LossTiles(Tile(64, 64, 32, 4, 3), Tile(64, 64, 32, 8, 3), Tile(64, 64, 32, 4, 3))

TABLE: dict[tuple[int, str], LossTiles] = {
    (80, "half"): _AMPERE,
    (90, "half"): _HOPPER,
    (100, "half"): _HOPPER,
    (80, "half, few rows"): _FEW_ROWS,
    (90, "half, few rows"): _FEW_ROWS,
    (100, "half, few rows"): _FEW_ROWS,
    (80, "single"): _SINGLE,
    (90, "single"): _SINGLE,
    (100, "single"): _SINGLE,
}
"""(architecture, shape class): tiles. A class is the width of the numbers, "single" for fp32 and "half" for fp16 and
bf16, and of the latter "few rows" up to 512 kept tokens."""

_override: ContextVar[LossTiles | None] = ContextVar("megafish_kernels_tiles", default=None)


def loss_tiles(architecture: int, itemsize: int, rows: int) -> LossTiles:
    """The tiles for an architecture (80, 86, 90, ...), bytes of a number, and kept tokens at most."""
    given = overriding()
    if given is not None:
        return given
    known = max((arch for arch, _ in TABLE if arch <= architecture), default=80)
    kind = "single" if itemsize == 4 else "half, few rows" if rows <= 512 else "half"
    return TABLE[known, kind]


def overriding() -> LossTiles | None:
    """The tiles of the override that this is called in, None outside any."""
    return _override.get()


@contextmanager
def override(tiles: LossTiles | None) -> Iterator[None]:
    """Within, the calls of the loss use these tiles for all shapes and architectures, and so do their backwards,
    wherever these run (those of a torch.compile graph use them where the forward computes the gradients: see
    `compiled`). None is the table again.
    """
    token = _override.set(tiles)
    try:
        yield
    finally:
        _override.reset(token)


def vocabulary_splits(tile: Tile, capacity: int, columns: int) -> tuple[int, int]:
    """(splits of the vocabulary, tiles of columns in each but the last) of a forward over that many rows."""
    tiles, blocks = _ceil_div(columns, tile.columns), _ceil_div(capacity, tile.rows)
    each = _ceil_div(tiles, min(tiles, _ceil_div(_PROGRAMS, blocks)))
    return _ceil_div(tiles, each), each


def _ceil_div(value: int, by: int) -> int:
    return -(-value // by)


def kept_columns(capacity: int, columns: int, itemsize: int, logits_bytes: int | None) -> tuple[int, int]:
    """(columns whose logits the forward keeps, columns of a slab for the others) within the budget of bytes.

    All columns are kept if they fit. Otherwise a slab comes out of the budget first, at least 128 columns wide.
    """
    budget = LOGITS_BYTES if logits_bytes is None else logits_bytes
    fitting = budget // max(1, capacity * itemsize)
    if fitting >= columns:
        return columns, 0
    slab = max(128, min(SLAB_COLUMNS, fitting) // 128 * 128)
    return max(0, fitting - slab) // 256 * 256, slab
