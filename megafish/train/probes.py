"""Memorization while it happens: what the model makes of canaries, by their number of copies.

A canary that is learned by heart has a loss near 0, while those of the control group (0 copies) stay where other text
of their kind is. Whether it would be recited is known from the same forward pass, without generating: under greedy
decoding a suffix comes out word for word if and only if, given the true text, the most probable token is the right one
at each of its places. So it works however the model is spread over processes. `megafish audit` asks the trained model
to recite in earnest; equal logits apart, which rounding may order differently there, its figures are these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megafish.config import EvalConfig
from megafish.data.canary import Canary, read_canaries
from megafish.data.loader import IGNORE, Batch
from megafish.train.data import TrainingData
from megafish.train.engine import Engine


class Recites(RuntimeError):
    """More canaries are recited than eval.recited_limit allows."""


@dataclass(frozen=True)
class _Row:
    """Canaries one behind the other, each a document: int64 [S] each, and where documents start."""

    tokens: np.ndarray
    targets: np.ndarray
    place: np.ndarray
    """Where a target stands among all tokens of all canaries: number of the canary x width + its place in it. 0, which
    no target has, where nothing is supervised."""
    starts: list[int]


class CanaryProbe:
    """Canaries as batches of this process.

    At most `count` of each number of copies, longer ones cut to the row. Every process makes the same number of batches
    of the same shape; rows left over have no targets. `suffix`: the places of the tokens that must be reproduced, None
    where a canary is shorter than that or than the row, and `note` says so.
    """

    def __init__(
        self,
        canaries: list[Canary],
        count: int,
        length: int,
        rows: int,
        rank: int,
        world_size: int,
        asked: tuple[int, int] = (1, 1),
    ) -> None:
        self.levels = sorted({canary.exposures for canary in canaries})
        chosen = [canary for level in self.levels for canary in _first(canaries, level, count)]
        self.level = np.array([self.levels.index(canary.exposures) for canary in chosen])
        self.width = length + 1
        prompt, suffix = asked
        shortest = min(len(canary.tokens) for canary in chosen)
        self.suffix: slice | None = slice(prompt, prompt + suffix)
        self.note: str | None = None
        if prompt + suffix > min(shortest, self.width):
            self.suffix = None
            self.note = (
                "no recitation is measured during training, only the loss of canaries: audit.prompt_tokens + "
                f"audit.suffix_tokens = {prompt + suffix} is more than the {min(shortest, self.width)} tokens of a "
                "canary or sample"
            )
        packed = _pack(chosen, length)
        rows = min(rows, -(-len(packed) // world_size))
        share = rows * world_size
        self.batches = []
        for first in range(0, len(packed), share):
            own = packed[first + rank * rows : min(first + (rank + 1) * rows, len(packed))]
            self.batches.append(_batch(own, rows, length))

    def __iter__(self) -> Iterator[tuple[Batch, torch.Tensor]]:
        """(batch, place of every target, int64 [b, S])."""
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
    asked = (config.audit.prompt_tokens, config.audit.suffix_tokens)
    return CanaryProbe(canaries, config.eval.canaries, length, rows, axis.rank, axis.size, asked)


@torch.no_grad()
def recitation(
    engine: Engine, data: TrainingData, probe: CanaryProbe | None, cut_short: Callable[[], bool]
) -> dict[str, Any] | None:
    """What the model makes of the canaries, by their copies. Collective; `cut_short` as for validate.

    loss_N: mean loss [nats/token] of those with N copies. Of their suffixes: canaries_N, how many; recited_N, share
    that would come out word for word; prefix_N, mean tokens before the first error; strength_N and memorized_N, mean
    extraction strength and share of right tokens (as in megafish.audit.metrics).
    """
    if probe is None:
        return None
    engine.train(False)
    count, width = len(probe.level), probe.width
    # Each token of each canary is one process's: nats, whether it is there, whether it was right.
    found = torch.zeros(3, count * width, dtype=torch.float64, device=data.processes.device)
    for batch, place in probe:
        if cut_short():
            return None
        losses, correct = engine(**data.to_model(batch), per_token=True, correct=True)
        there = data.own_part(batch.targets) != IGNORE
        where = data.own_part(place).to(found.device).flatten()
        for row, values in enumerate((losses, there, correct)):
            found[row].index_add_(0, where, values.to(found).flatten() * there.to(found).flatten())
    dist.all_reduce(found, group=data.processes.mesh.replicas.group)
    nats, there, correct = found.view(3, count, width).cpu().numpy()
    figures: dict[str, Any] = {"kind": "canaries"}
    for index, copies in enumerate(probe.levels):
        own = probe.level == index
        figures[f"loss_{copies}"] = float(nats[own].sum() / max(there[own].sum(), 1))
    for index, copies in enumerate(probe.levels if probe.suffix is not None else []):
        right = correct[probe.level == index][:, probe.suffix] > 0
        figures |= {
            f"canaries_{copies}": len(right),
            f"recited_{copies}": float(right.all(axis=1).mean()),
            f"prefix_{copies}": float(np.cumprod(right, axis=1).sum(axis=1).mean()),
            f"strength_{copies}": float(np.cumprod(right[:, ::-1], axis=1).mean()),
            f"memorized_{copies}": float(right.mean()),
        }
    return figures


def limit_passed(result: dict[str, Any], config: EvalConfig) -> str | None:
    """Which canaries are recited beyond eval.recited_limit, and what to do; None where none are."""
    if config.recited_limit is None:
        return None
    rates = {key.removeprefix("recited_"): rate for key, rate in result.items() if key.startswith("recited_")}
    above = [copies for copies, rate in rates.items() if copies != "0" and rate > config.recited_limit]
    if not above:
        return None
    most = above[-1]
    total = result[f"canaries_{most}"]
    return (
        f"{round(rates[most] * total)} of {total} canaries with {most} copies are recited, more than "
        f"eval.recited_limit={config.recited_limit:g} allows; train with a mask (goldfish.k), or go on with a higher "
        "limit or eval.recited_action=warn"
    )


def _first(canaries: list[Canary], exposures: int, count: int) -> list[Canary]:
    return [canary for canary in canaries if canary.exposures == exposures][:count]


def _pack(canaries: list[Canary], length: int) -> list[_Row]:
    rows: list[_Row] = []
    used = length
    for number, canary in enumerate(canaries):
        tokens = np.asarray(canary.tokens[: length + 1], dtype=np.int64)
        if used + len(tokens) - 1 > length:
            empty = np.zeros(length, dtype=np.int64)
            rows.append(_Row(empty, np.full_like(empty, IGNORE), empty.copy(), [0]))
            used = 0
        row, end = rows[-1], used + len(tokens) - 1
        row.tokens[used:end], row.targets[used:end] = tokens[:-1], tokens[1:]
        row.place[used:end] = number * (length + 1) + np.arange(1, len(tokens))
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
    return batch, torch.from_numpy(np.stack([row.place for row in rows]))
