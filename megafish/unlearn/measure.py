"""What a model knows of a set while it is being unlearned, from one forward pass over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megafish.audit.metrics import exact_memorization, extraction_strength
from megafish.train.engine import Engine
from megafish.unlearn.choices import Asked, accuracy, likeliest
from megafish.unlearn.data import Item, pack, without_end


class CutShort(Exception):
    """A signal came before a measurement was through."""


def measure(
    engine: Engine, name: str, items: Sequence[Item], chunk: int, interrupted: Callable[[], bool]
) -> dict[str, Any]:
    """Loss per answer token [nats], exact memorization and extraction strength, means over texts.

    Both shares leave the token that ends the text out of account. Collective: each process reads its share. Raises
    CutShort.
    """
    sums = torch.zeros(5, dtype=torch.float64)
    for _, losses, correct in _answers(engine, items, chunk, interrupted):
        known = without_end(correct).tolist()
        shares = [exact_memorization(known), extraction_strength(known)]
        sums += torch.tensor([float(losses.sum()), len(losses), *shares, 1], dtype=torch.float64)
    nats, tokens, exact, strength, texts = _summed(engine, sums).tolist()
    return {
        f"{name}_loss": nats / max(1, tokens),
        f"{name}_exact_memorization": exact / max(1, texts),
        f"{name}_extraction_strength": strength / max(1, texts),
    }


def measure_choices(engine: Engine, asked: Asked, chunk: int, interrupted: Callable[[], bool]) -> float:
    """Share of the questions whose likeliest choice, per token, is the right one. Collective; raises CutShort."""
    means = torch.zeros(len(asked.items), dtype=torch.float64)
    for number, losses, _ in _answers(engine, asked.items, chunk, interrupted):
        means[number] = without_end(losses).mean()
    return accuracy(likeliest(_summed(engine, means).tolist(), asked.questions), asked.questions)


def _answers(
    engine: Engine, items: Sequence[Item], chunk: int, interrupted: Callable[[], bool]
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Of this process's share of the items: number, loss of each token of the answer [nats, float64 [n]], and whether
    it is the likeliest one (bool [n]); both on the CPU."""
    engine.train(False)
    processes = engine.processes
    starts = range(0, len(items), chunk)
    for first in range(0, len(starts), processes.world_size):
        if interrupted():
            raise CutShort
        # All processes make the call, also one for which nothing is left.
        mine = first + processes.rank
        start = starts[mine] if mine < len(starts) else 0
        packed = pack(items[start : start + chunk], processes.device)
        with torch.no_grad():
            out = engine(
                packed.tokens,
                targets=packed.targets,
                per_token=True,
                correct=True,
                cu_seqlens=packed.cu_seqlens,
                max_seqlen=packed.max_seqlen,
            )
        if mine < len(starts):
            kept = packed.kept
            sizes = packed.owner[kept].cpu().unique_consecutive(return_counts=True)[1].tolist()
            losses, correct = out.loss[0][kept].double().cpu(), out.correct[0][kept].cpu()
            for number, parts in enumerate(zip(losses.split(sizes), correct.split(sizes), strict=True), start=start):
                yield number, *parts


def _summed(engine: Engine, sums: torch.Tensor) -> torch.Tensor:
    """The sum over all processes."""
    sums = sums.to(engine.processes.device)
    dist.all_reduce(sums)
    return sums.cpu()
