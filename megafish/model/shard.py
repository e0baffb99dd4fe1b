"""Which part of a full parameter this process holds under tensor parallelism.

The parallel layers mark their parameters, and whoever must see whole ones (checkpoints, export) reads the mark. A fused
projection is cut part by part (queries, keys and values apart), so a shard may be several ranges of one dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shard:
    """Ranges of one dimension of a full parameter, in the order in which they lie in the part held here."""

    dim: int
    ranges: tuple[tuple[int, int], ...]
    """Half-open, in rows (dim 0) or columns (dim 1) of the full parameter."""
    full_shape: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the part."""
        size = sum(end - begin for begin, end in self.ranges)
        return (*self.full_shape[: self.dim], size, *self.full_shape[self.dim + 1 :])

    def take(self, full: torch.Tensor) -> torch.Tensor:
        """The part of `full`, a new tensor of `shape`."""
        assert tuple(full.shape) == self.full_shape, (full.shape, self.full_shape)
        return torch.cat([full.narrow(self.dim, begin, end - begin) for begin, end in self.ranges], self.dim)

    def put(self, part: torch.Tensor, full: torch.Tensor) -> None:
        """Write the part to its places in `full`."""
        assert tuple(part.shape) == self.shape and tuple(full.shape) == self.full_shape, (part.shape, full.shape)
        at = 0
        for begin, end in self.ranges:
            full.narrow(self.dim, begin, end - begin).copy_(part.narrow(self.dim, at, end - begin))
            at += end - begin


def mark(parameter: torch.nn.Parameter, shard: Shard) -> torch.nn.Parameter:
    """The parameter, known from here on as this shard of a full one (to DeepSpeed as well)."""
    assert tuple(parameter.shape) == shard.shape, (parameter.shape, shard)
    parameter.tensor_shard = shard  # type: ignore[attr-defined]
    # DeepSpeed counts a parameter without this flag once among the tensor-parallel processes.
    parameter.model_parallel = True  # type: ignore[attr-defined]
    return parameter


def shard_of(parameter: torch.Tensor) -> Shard | None:
    """What `mark` said; None for a parameter that every tensor-parallel process holds whole."""
    return getattr(parameter, "tensor_shard", None)
