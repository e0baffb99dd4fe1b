"""The processes of a run as a mesh: tensor parallelism fastest, then sequence parallelism, then data parallelism.

rank = (data * sequence degree + sequence) * tensor degree + tensor, so that those who exchange most are neighbours and
share a node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache

import numpy as np
import torch.distributed as dist

from megafish.errors import InputError
from megafish.model.shard import Shard


@dataclass(frozen=True)
class Axis:
    """This process's place among those along one axis of the mesh."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    """The processes along the axis, in the order of their ranks. None where nothing is cut: all processes."""

    def cut(self, shape: Sequence[int], dim: int, parts: Sequence[int] | None = None) -> Shard | None:
        """This process's share of a parameter of `shape`, cut along `dim`; None where the axis has one process.

        parts: sizes along `dim` of what is fused in it (default: one part), each of which is cut evenly.
        """
        if self.size == 1:
            return None
        ranges, start = [], 0
        for part in parts if parts is not None else (shape[dim],):
            share, rest = divmod(part, self.size)
            assert rest == 0, (shape, parts, self.size)
            ranges.append((start + self.rank * share, start + (self.rank + 1) * share))
            start += part
        assert start == shape[dim], (shape, parts)
        return Shard(dim, tuple(ranges), tuple(shape))


@dataclass(frozen=True)
class Mesh:
    """This process on every axis. Without arguments: a process of its own."""

    tensor: Axis = Axis()
    """Same tokens, each a shard of the matrices."""
    sequence: Axis = Axis()
    """Same weights, each a part of the same sequences."""
    data: Axis = Axis()
    """Same weights, each sequences of its own. No group: what is summed over it is summed over `replicas`."""
    replicas: Axis = Axis()
    """data and sequence together: same weights, each tokens of its own. ZeRO shards over it."""

    @property
    def speaks_for_its_sequences(self) -> bool:
        """True in one of the processes that work on the same sequences."""
        return self.tensor.rank == 0 and self.sequence.rank == 0


def check_degrees(world_size: int, tensor: int, sequence: int) -> None:
    """InputError unless the degrees divide the number of processes."""
    share = tensor * sequence
    if world_size % share:
        below = world_size // share * share
        near = " or ".join(str(count) for count in (below, below + share) if count)
        raise InputError(
            f"{world_size} {'process is' if world_size == 1 else 'processes are'} not a multiple of "
            f"engine.tensor_parallel={tensor} x engine.sequence_parallel={sequence} = {share}: start {near}, or change "
            "the degrees"
        )


def make_mesh(rank: int, world_size: int, tensor: int, sequence: int, timeout: timedelta) -> Mesh:
    """The mesh with these degrees, the rest being data parallelism. Collective: it makes process groups, once.

    timeout: of the groups' collectives. The degrees must divide world_size (`check_degrees`).
    """
    if tensor == sequence == 1:
        everyone = Axis(rank, world_size)
        return Mesh(data=everyone, replicas=everyone)
    return _make_mesh(rank, world_size, tensor, sequence, timeout)


@cache
def _make_mesh(rank: int, world_size: int, tensor: int, sequence: int, timeout: timedelta) -> Mesh:
    ranks = np.arange(world_size).reshape(-1, sequence, tensor)
    rest, tensor_rank = divmod(rank, tensor)
    data_rank, sequence_rank = divmod(rest, sequence)
    return Mesh(
        tensor=_axis(tensor_rank, ranks.reshape(-1, tensor), timeout),
        sequence=_axis(sequence_rank, ranks.swapaxes(1, 2).reshape(-1, sequence), timeout),
        data=Axis(data_rank, len(ranks)),
        replicas=_axis(rest, ranks.reshape(-1, tensor).T, timeout),
    )


def _axis(rank: int, members: np.ndarray, timeout: timedelta) -> Axis:
    """The axis along the rows of members int [groups, size]."""
    group, _ = dist.new_subgroups_by_enumeration(members.tolist(), timeout=timeout)
    return Axis(rank, members.shape[1], group)


class ModelParallelUnit:
    """The mesh as DeepSpeed asks for it (Megatron's `mpu`).

    Only tensor parallelism is model parallelism to DeepSpeed. A process with a part of the sequences is to it one more
    data-parallel process: its own notion of sequence parallelism divides the gradients by another number under ZeRO 3
    with reduce-scatter than under the other stages.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def get_model_parallel_rank(self) -> int:
        return self.mesh.tensor.rank

    def get_model_parallel_world_size(self) -> int:
        return self.mesh.tensor.size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self.mesh.tensor.group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self.mesh.replicas.rank

    def get_data_parallel_world_size(self) -> int:
        return self.mesh.replicas.size

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self.mesh.replicas.group
