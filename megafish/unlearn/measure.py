"""What a model knows of a set while it is being unlearned, from one forward pass over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megafish.audit.metrics import exact_memorization, extraction_strength
from megafish.model.head import TokenLosses
from megafish.train.engine import Engine
from megafish.unlearn.data import Item, pack


def measure(
    engine: Engine, name: str, items: Sequence[Item], chunk: int, interrupted: Callable[[], bool]
) -> dict[str, Any] | None:
    """Loss per answer token [nats], exact memorization and extraction strength, means over texts; None when cut short.

    Both shares leave the token that ends the text out of account. Collective: each process reads its share.
    """
    engine.train(False)
    processes = engine.processes
    sums = torch.zeros(5, dtype=torch.float64, device=processes.device)
    starts = range(0, len(items), chunk)
    with torch.no_grad():
        for first in range(0, len(starts), processes.world_size):
            if interrupted():
                return None
            mine = first + processes.rank
            start = starts[mine] if mine < len(starts) else 0
            packed = pack(items[start : start + chunk], processes.device)
            out: TokenLosses = engine(
                packed.tokens,
                targets=packed.targets,
                per_token=True,
                correct=True,
                cu_seqlens=packed.cu_seqlens,
                max_seqlen=packed.max_seqlen,
            )
            if mine < len(starts):
                sums += _sums(out, packed.kept, packed.owner).to(sums)
    dist.all_reduce(sums)
    nats, tokens, exact, strength, texts = sums.tolist()
    return {
        f"{name}_loss": nats / max(1, tokens),
        f"{name}_exact_memorization": exact / max(1, texts),
        f"{name}_extraction_strength": strength / max(1, texts),
    }


def _sums(out: TokenLosses, kept: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    losses, correct = out.loss[0][kept].double().cpu(), out.correct[0][kept].cpu()
    ends = owner[kept].cpu().unique_consecutive(return_counts=True)[1].tolist()
    exact = strength = 0.0
    for row in correct.split(ends):
        answer = row[:-1].tolist() or row.tolist()
        exact += exact_memorization(answer)
        strength += extraction_strength(answer)
    return torch.tensor([float(losses.sum()), len(losses), exact, strength, len(ends)], dtype=torch.float64)
