"""Worker of test_vocab_parallel: the ranks of a group hold shards of the vocabulary, and compare with one process."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megafish_kernels import linear_cross_entropy
from megafish_kernels.tiles import LossTiles, Tile, override

N, D, V, PADDED = 24, 16, 45, 48
BOUNDS = {2: (0, 31, PADDED), 4: (0, 3, 30, 46, PADDED)}  # unequal shards; the last of four is padding alone
EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"z_loss": 0.02, "label_smoothing": 0.2, "softcap": 5.0, "logit_scale": 1.7, "entropy_weight": (1.0, 1.5)},
}
collectives: list[str] = []


class Counting(TorchDispatchMode):
    """Writes down the collectives that pass."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            collectives.append(func._opname)
        return func(*args, **(kwargs or {}))


def run(backend: str, reduction: str, extra: str, sequence_sharded: bool, device_count: bool) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=g)
    weight, bias = torch.randn(PADDED, D, generator=g) * 0.4, torch.randn(PADDED, generator=g)
    targets = torch.randint(0, V, (N,), generator=g)
    targets[torch.rand(N, generator=g) < 0.3] = -100
    # The highest logits stand twice, in two shards: the first id counts, on whichever rank it is.
    weight[44], bias[44] = weight[2], bias[2]
    upstream = torch.linspace(-1.0, 2.0, N) if reduction == "none" else torch.tensor(0.7)
    options: dict[str, Any] = {"reduction": reduction, "vocab_size": V, "return_stats": True, **EXTRAS[extra]}

    whole = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
    expected, facts = linear_cross_entropy(whole[0], whole[1], targets, bias=whole[2], backend="torch", **options)
    wanted = torch.autograd.grad(expected, whole, upstream)

    begin, end = BOUNDS[size][rank], BOUNDS[size][rank + 1]
    own = slice(rank * N // size, (rank + 1) * N // size) if sequence_sharded else slice(None)
    shard = [tensor.clone().requires_grad_() for tensor in (hidden[own], weight[begin:end], bias[begin:end])]
    collectives.clear()
    small = Tile(32, 16, 16, 1, 1)
    with override(LossTiles(small, small, small)), Counting():
        loss, stats = linear_cross_entropy(
            shard[0],
            shard[1],
            targets,
            bias=shard[2],
            group=dist.group.WORLD,
            vocab_start=begin,
            sequence_sharded=sequence_sharded,
            backend=backend,
            logits_bytes=None if device_count else 1000,
            **options,
        )
    gathers = 2 if sequence_sharded else 1
    assert collectives == ["_allgather_base_"] * gathers, collectives
    got = torch.autograd.grad(loss, shard, upstream)

    close(loss, expected)
    for name in ("lse", "entropy", "cross_entropy"):
        close(getattr(stats, name), getattr(facts, name))
    assert torch.equal(stats.correct, facts.correct)
    for ours, theirs in zip(got, (wanted[0][own], wanted[1][begin:end], wanted[2][begin:end]), strict=True):
        close(ours, theirs)
    losses = [torch.empty_like(loss) for _ in range(size)]
    dist.all_gather(losses, loss.detach())
    assert all(torch.equal(losses[0], other) for other in losses), "the ranks differ"


def close(actual: Tensor, expected: Tensor) -> None:
    actual, expected = actual.detach(), expected.detach()
    error = float((actual - expected).norm() / expected.norm().clamp(min=1e-3))
    assert error < 1e-6, error


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for backend in sys.argv[1:]:
        for reduction, extra, sharded in (
            ("mean", "plain", False),
            ("none", "all", False),
            ("sum", "all", True),
            ("mean", "plain", True),
        ):
            run(backend, reduction, extra, sharded, reduction != "none")
    dist.destroy_process_group()
    print("all equal", flush=True)
    # Not by way of the interpreter's end: once in some dozens of times a thread of torch's that still wants Python then
    # aborts the process ("terminate called without an active exception").
    os._exit(0)
