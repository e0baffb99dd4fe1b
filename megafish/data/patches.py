"""Batches of patches: what patch-level training makes of a batch of tokens (Shao et al., arXiv 2407.12665)."""

from __future__ import annotations

from dataclasses import replace

import torch

from megafish.data.loader import IGNORE, Batch, StepBatch

ABSENT = -1
"""Input that its patch leaves out: it belongs to another document than the patch's last token."""


def patch_step(step: StepBatch, size: int) -> StepBatch:
    """A step with all of its micro-batches in patches."""
    return replace(step, micro_batches=[patch_batch(batch, size) for batch in step.micro_batches])


def patch_batch(batch: Batch, size: int) -> Batch:
    """A batch whose rows are read as S / size patches of `size` consecutive tokens, the targets laid out to match.

    tokens: as they were, ABSENT where the patch holds the end of another document than its last token's. So no patch
    mixes two documents, and attention between patches crosses as few as attention between tokens.
    targets, drop: entry q * size + i is what patch q is to predict in place i of patch q + 1. The mask goes with the
    token, which keeps the fate it has in the token stage. Not supervised are, besides the first token of a document,
    the tokens of a row's first patch, those behind the row's last input, and those of a document of which patch q
    has no token.
    cu_seqlens, max_seqlen: in patches.
    """
    length = batch.tokens.shape[1]
    assert length % size == 0, (length, size)
    begins = batch.begins
    own = begins == begins[:, size - 1 :: size].repeat_interleave(size, dim=1)

    # The token after input j is predicted by the patch before its own, if that has a token of the same document: if the
    # document's first token, `begin`, lies before the patch of the token. An IGNORE has its own reasons.
    begin = torch.cat((begins[:, 1:], begins[:, -1:]), dim=1)
    place = torch.arange(1, length + 1)
    reachable = begin < place // size * size

    def shifted(x: torch.Tensor, fill: int | bool) -> torch.Tensor:
        out = torch.full_like(x, fill)
        out[:, : length - size + 1] = torch.where(reachable, x, fill)[:, size - 1 :]
        return out

    targets, drop = shifted(batch.targets, IGNORE), shifted(batch.drop, False)
    drop &= targets != IGNORE
    bounds = torch.unique_consecutive(batch.cu_seqlens.long() // size)
    dropped = int(drop.sum())
    return replace(
        batch,
        tokens=torch.where(own, batch.tokens, ABSENT),
        targets=targets,
        drop=drop,
        cu_seqlens=bounds.to(torch.int32),
        max_seqlen=int(bounds.diff().max()),
        kept=int((targets != IGNORE).sum()) - dropped,
        dropped=dropped,
    )
