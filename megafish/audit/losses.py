"""Cross-entropy of kept and dropped tokens, of canaries and of held-out text, one forward pass each, never masked.

The mask is applied to the finished per-token losses here, not in the model: a dropped token's loss is what the model
would have been trained on, and comparing it with the kept tokens' shows whether dropping kept it from being learned.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megafish.data.loader import IGNORE, Batch


@torch.no_grad()
def batch_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every target of a batch and where there is one: (float32 [b, S] [nats], bool [b, S]), on CPU."""
    device = next(model.parameters()).device
    losses = model(
        batch.tokens.to(device),
        targets=batch.targets.to(device),
        cu_seqlens=batch.cu_seqlens.to(device),
        max_seqlen=batch.max_seqlen,
        per_token=True,
    )
    return losses.float().cpu(), batch.targets.cpu() != IGNORE


def kept_and_dropped(model: nn.Module, batches: Iterable[Batch]) -> dict[str, Any]:
    """Mean loss [nats/token] of kept and of dropped tokens; None where there are no such tokens."""
    sums, counts = [0.0, 0.0], [0, 0]
    for batch in batches:
        losses, real = batch_losses(model, batch)
        drop = batch.drop.cpu()
        for i, chosen in enumerate((real & ~drop, real & drop)):
            sums[i] += float(losses[chosen].sum(dtype=torch.float64))
            counts[i] += int(chosen.sum())
    means = [s / n if n else None for s, n in zip(sums, counts, strict=True)]
    return {
        "loss_kept": means[0],
        "loss_dropped": means[1],
        "tokens_kept": counts[0],
        "tokens_dropped": counts[1],
    }


def held_out(model: nn.Module, batches: Iterable[Batch], token_bytes: np.ndarray) -> dict[str, Any] | None:
    """Mean loss [nats/token] and bits per byte of text the model was not trained on; None where there is no text.

    token_bytes: int [vocab], UTF-8 bytes that each id stands for (0 for special tokens, whose loss still counts: a
    model has to predict where a document ends).
    """
    sizes = torch.from_numpy(np.asarray(token_bytes, dtype=np.int64))
    total, tokens, size = 0.0, 0, 0
    for batch in batches:
        losses, real = batch_losses(model, batch)
        total += float(losses[real].sum(dtype=torch.float64))
        tokens += int(real.sum())
        size += int(sizes[batch.targets.cpu()[real]].sum())
    if not tokens:
        return None
    return {"loss": total / tokens, "bits_per_byte": total / math.log(2) / size if size else None, "tokens": tokens}


@torch.no_grad()
def sequence_losses(
    model: nn.Module, sequences: Sequence[Sequence[int]], batch_size: int
) -> Iterable[list[list[float]]]:
    """Cross-entropy [nats] of tokens 1..n-1 of each sequence given those before it, one list of rows a batch.

    All sequences have the same length n, and each is a document of its own, read from its first token as in training.
    """
    device = next(model.parameters()).device
    for start in range(0, len(sequences), batch_size):
        ids = torch.tensor(sequences[start : start + batch_size], dtype=torch.int64, device=device)
        rows, n = ids.shape[0], ids.shape[1] - 1
        bounds = torch.arange(0, rows * n + 1, n, dtype=torch.int32, device=device)
        losses = model(ids[:, :-1], targets=ids[:, 1:], cu_seqlens=bounds, max_seqlen=n, per_token=True)
        yield losses.float().cpu().tolist()
