"""Evaluation inside a run: validation, never masked, and the loss of dropped against kept training tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megafish.data.loader import IGNORE
from megafish.train.data import TrainingData
from megafish.train.engine import Engine


@torch.no_grad()
def validate(engine: Engine, data: TrainingData, cut_short: Callable[[], bool]) -> dict[str, Any] | None:
    """Mean loss [nats/token] and [bits/byte] of the validation sequences; None without any. Collective.

    `cut_short` is asked before every batch and must answer the same in every process; None where it says so.
    """
    if data.valid is None:
        return None
    engine.train(False)
    sums = torch.zeros(3, dtype=torch.float64, device=data.processes.device)  # nats, tokens, bytes
    for batch in data.valid:
        if cut_short():
            return None
        arguments = data.to_model(batch)
        losses = engine(**arguments, per_token=True).double()
        targets = data.own_part(batch.targets)
        supervised = targets != IGNORE
        sums[0] += losses.sum()
        sums[1] += supervised.sum().to(sums)
        sums[2] += data.token_bytes[targets[supervised]].sum().to(sums)
    dist.all_reduce(sums, group=data.processes.mesh.replicas.group)
    nats, tokens, text_bytes = sums.tolist()
    return {
        "kind": "valid",
        "valid_loss": nats / max(tokens, 1),
        "valid_bpb": nats / math.log(2) / max(text_bytes, 1),
        "valid_tokens": int(tokens),
    }


@torch.no_grad()
def dropped_loss(engine: Engine, data: TrainingData, cut_short: Callable[[], bool]) -> dict[str, Any] | None:
    """Mean loss [nats/token] of dropped and of kept targets on training sequences; None for plain training. Collective.

    A model that memorizes shows a falling loss on kept tokens and a loss on dropped ones that stays behind.
    `cut_short`: as for `validate`.
    """
    if data.seen is None:
        return None
    engine.train(False)
    sums = torch.zeros(4, dtype=torch.float64, device=data.processes.device)
    for batch in data.seen:
        if cut_short():
            return None
        arguments = data.to_model(batch)
        losses = engine(**arguments, per_token=True).double()
        dropped = arguments["drop"]
        kept = (arguments["targets"] != IGNORE) & ~dropped
        sums += torch.stack([losses[dropped].sum(), dropped.sum(), losses[kept].sum(), kept.sum()])
    dist.all_reduce(sums, group=data.processes.mesh.replicas.group)
    dropped_nats, dropped_tokens, kept_nats, kept_tokens = sums.tolist()
    return {
        "kind": "dropped",
        "loss_dropped": dropped_nats / max(dropped_tokens, 1),
        "loss_kept": kept_nats / max(kept_tokens, 1),
        "tokens_dropped": int(dropped_tokens),
        "tokens_kept": int(kept_tokens),
    }
