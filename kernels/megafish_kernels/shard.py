"""A vocabulary-parallel head: each rank of a group holds some rows of the weight, and all see the same tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed both; the old names warn.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Shard:
    """This rank's place in the group."""

    group: dist.ProcessGroup
    offset: int
    """Id of the weight's first row."""
    sequence_sharded: bool
    """Each rank has an equal part of the hidden states, in the order of ranks along the first dimension."""

    @property
    def size(self) -> int:
        """Ranks in the group."""
        return dist.get_world_size(self.group)

    def gather_figures(self, figures: Tensor) -> Tensor:
        """[F, n] -> [T, F, n], the figures of all ranks, in one collective."""
        count, rows = figures.shape
        gathered = figures.new_empty(self.size * count, rows)
        _all_gather(gathered, figures.contiguous(), group=self.group)
        return gathered.view(self.size, count, rows)

    def gather_rows(self, hidden: Tensor) -> Tensor:
        """Hidden states [N / T, D] of each rank -> [N, D]; the same tensor if all ranks have them already."""
        if not self.sequence_sharded:
            return hidden
        gathered = hidden.new_empty(self.size * hidden.shape[0], hidden.shape[1])
        _all_gather(gathered, hidden.contiguous(), group=self.group)
        return gathered

    def add_up(self, gradient: Tensor) -> None:
        """Add the ranks' shares of a gradient, in place, for all of them."""
        dist.all_reduce(gradient, group=self.group)

    def add_up_own(self, gradient: Tensor) -> Tensor:
        """Shares [N, D] of a gradient -> the sum of all ranks' for this rank's rows [N / T, D]."""
        own = gradient.new_empty(gradient.shape[0] // self.size, gradient.shape[1])
        _reduce_scatter(own, gradient, group=self.group)
        return own


def own_columns(vocab_size: int, offset: int, rows: int) -> int:
    """How many of this rank's rows of the weight are real ids, the rest being padding."""
    return min(max(vocab_size - offset, 0), rows)
