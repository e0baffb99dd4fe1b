"""Memorization while it happens: the loss of canaries, by their number of copies, at every validation.

A canary that is learned by heart has a loss near 0, while those of the control group (0 copies) stay where other text
of their kind is. `megafish audit` asks the trained model to recite them; this only reads, so it costs a forward pass
and works however the model is spread over processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megafish.data.canary import Canary, read_canaries
from megafish.data.loader import IGNORE, Batch
from megafish.train.data import TrainingData
from megafish.train.engine import Engine


@dataclass(frozen=True)
class _Row:
    """Canaries one behind the other, each a document: int64 [S] each, and where documents start."""

    tokens: np.ndarray
    targets: np.ndarray
    level: np.ndarray
    """Index of the canary's number of copies, 0 where nothing is supervised."""
    starts: list[int]


class CanaryProbe:
    """Canaries as batches of this process.

    At most `count` of each number of copies, longer ones cut to the row. Every process makes the same number of batches
    of the same shape; rows left over have no targets.
    """

    def __init__(self, canaries: list[Canary], count: int, length: int, rows: int, rank: int, world_size: int) -> None:
        self.levels = sorted({canary.exposures for canary in canaries})
        chosen = [canary for level in self.levels for canary in _first(canaries, level, count)]
        packed = _pack(chosen, self.levels, length)
        rows = min(rows, -(-len(packed) // world_size))
        share = rows * world_size
        self.batches = []
        for first in range(0, len(packed), share):
            own = packed[first + rank * rows : min(first + (rank + 1) * rows, len(packed))]
            self.batches.append(_batch(own, rows, length))

    def __iter__(self) -> Iterator[tuple[Batch, torch.Tensor]]:
        """(batch, level of every target, int64 [b, S])."""
        return iter(self.batches)


def open_probe(data: TrainingData) -> CanaryProbe | None:
    """The probe of a run; None where its corpora have no canaries, or none are asked for."""
    config = data.config
    if not config.eval.canaries:
        return None
    canaries = [canary for source in data.corpora.train for canary in read_canaries(source.corpus.path)]
    if not canaries:
        return None
    axis = data.processes.mesh.data
    length, rows = config.data.sequence_length, config.train.micro_batch_size
    return CanaryProbe(canaries, config.eval.canaries, length, rows, axis.rank, axis.size)


@torch.no_grad()
def canary_loss(
    engine: Engine, data: TrainingData, probe: CanaryProbe | None, cut_short: Callable[[], bool]
) -> dict[str, Any] | None:
    """Mean loss [nats/token] of the canaries of each number of copies. Collective; `cut_short` as for validate."""
    if probe is None:
        return None
    engine.train(False)
    sums = torch.zeros(2, len(probe.levels), dtype=torch.float64, device=data.processes.device)
    for batch, level in probe:
        if cut_short():
            return None
        losses = engine(**data.to_model(batch), per_token=True).double().flatten()
        kept = (data.own_part(batch.targets) != IGNORE).to(sums).flatten()
        where = data.own_part(level).to(sums.device).flatten()
        sums[0].index_add_(0, where, losses * kept)
        sums[1].index_add_(0, where, kept)
    dist.all_reduce(sums, group=data.processes.mesh.replicas.group)
    means = (sums[0] / sums[1].clamp(min=1)).tolist()
    return {"kind": "canaries", **{f"loss_{copies}": mean for copies, mean in zip(probe.levels, means, strict=True)}}


def _first(canaries: list[Canary], exposures: int, count: int) -> list[Canary]:
    return [canary for canary in canaries if canary.exposures == exposures][:count]


def _pack(canaries: list[Canary], levels: list[int], length: int) -> list[_Row]:
    rows: list[_Row] = []
    used = length
    for canary in canaries:
        tokens = np.asarray(canary.tokens[: length + 1], dtype=np.int64)
        if used + len(tokens) - 1 > length:
            empty = np.zeros(length, dtype=np.int64)
            rows.append(_Row(empty, np.full_like(empty, IGNORE), empty.copy(), [0]))
            used = 0
        row, end = rows[-1], used + len(tokens) - 1
        row.tokens[used:end], row.targets[used:end] = tokens[:-1], tokens[1:]
        row.level[used:end] = levels.index(canary.exposures)
        row.starts.append(end)
        used = end
    return rows


def _batch(rows: list[_Row], count: int, length: int) -> tuple[Batch, torch.Tensor]:
    empty = np.zeros(length, dtype=np.int64)
    blank = _Row(empty, np.full_like(empty, IGNORE), empty, [0])
    rows = [*rows, *[blank] * (count - len(rows))]
    starts = [number * length + start for number, row in enumerate(rows) for start in row.starts if start < length]
    bounds = np.array([*starts, count * length], dtype=np.int32)
    targets = np.stack([row.targets for row in rows])
    batch = Batch(
        tokens=torch.from_numpy(np.stack([row.tokens for row in rows])),
        targets=torch.from_numpy(targets),
        drop=torch.zeros(count, length, dtype=torch.bool),
        cu_seqlens=torch.from_numpy(bounds),
        max_seqlen=int(np.diff(bounds).max()),
        sample_ids=[-1] * count,
        kept=int((targets != IGNORE).sum()),
        dropped=0,
    )
    return batch, torch.from_numpy(np.stack([row.level for row in rows]))
