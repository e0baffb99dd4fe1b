"""Silent corruption: weights that every data-parallel process holds must be the same bits on all of them.

A flipped bit in one process's memory, or a device that computes wrongly, trains on without an error. Hashes of the
parameters find it, on the device and without a copy of the weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

from megafish.train.watchdog import name_ranks

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Odd, from the golden ratio: multiplying by it is a bijection of the 64-bit numbers.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_CHUNK = 1 << 22


class ReplicasDiffer(RuntimeError):
    """Processes that should hold the same weights do not."""


@torch.no_grad()
def tensor_hash(tensor: torch.Tensor) -> torch.Tensor:
    """64-bit hash of a tensor's bits, int64 scalar on its device: sum of its values, read as integers, times odd
    weights, modulo 2^64.

    A change of one value always shows: its difference times an odd number is never 0 modulo 2^64. A change of several
    goes unseen by chance only, and so does an exchange, since every place has a weight of its own.
    """
    bits = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for first in range(0, len(bits), _CHUNK):
        chunk = bits[first : first + _CHUNK].to(torch.int64)
        weights = torch.arange(first + 1, first + 1 + len(chunk), dtype=torch.int64, device=bits.device)
        weights *= _GOLDEN
        weights ^= weights >> 29
        weights |= 1
        total += (chunk * weights).sum()
    return total


def held_whole(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that this process holds in full: all, or under ZeRO 3 those small enough to stay gathered."""
    for name, parameter in module.named_parameters():
        # Under ZeRO 3 a parameter that is not gathered is an empty tensor; only its partition exists.
        if getattr(parameter, "ds_numel", parameter.numel()) == parameter.numel():
            yield name, parameter


def differing_replicas(module: nn.Module, shard: int = 0) -> str | None:
    """Which parameters differ between the processes, in words; None where all are the same. Collective.

    `shard`: number of the tensor-parallel shard that this process holds; those with the same one are compared. Names
    the parameters and, where most processes agree, those that do not.
    """
    if dist.get_world_size() == 1:
        return None
    names, hashes = [], []
    for name, parameter in held_whole(module):
        names.append(name)
        hashes.append(tensor_hash(parameter))
    if not names:
        return None
    mine = torch.stack([torch.tensor(shard, device=hashes[0].device), *hashes])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    table = torch.stack(everyone).cpu()
    return compare(names, table[:, 1:], table[:, 0].tolist())


def compare(names: list[str], table: torch.Tensor, shards: list[int]) -> str | None:
    """What to say of hashes int64 [processes, parameters]; None where all processes of a shard have the same."""
    different: dict[str, None] = {}
    odd: set[int] = set()
    for shard in sorted(set(shards)):
        ranks = [rank for rank, held in enumerate(shards) if held == shard]
        for column in torch.nonzero((table[ranks] != table[ranks[0]]).any(0)).flatten().tolist():
            values = table[ranks, column].tolist()
            (common, votes), *_ = Counter(values).most_common(1)
            # Without a majority (two processes, say) nobody can tell who is right.
            clear = 2 * votes > len(values)
            odd.update(rank for rank, value in zip(ranks, values, strict=True) if value != common or not clear)
            different[names[column]] = None
    if not different:
        return None
    shown, more = list(different)[:3], len(different) - 3
    listed = ", ".join(shown) + (f" and {more} more" if more > 0 else "")
    verb = "differs" if len(different) == 1 else "differ"
    return f"{listed} {verb} between the processes (suspect: {name_ranks(sorted(odd))})"
