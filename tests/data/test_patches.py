"""Batches of patches against the rule, token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megafish.data.loader import IGNORE, Batch
from megafish.data.patches import ABSENT, patch_batch


def batch_of(rng: np.random.Generator, rows: int, length: int, documents: float, drop: float) -> Batch:
    """Random tokens; each begins a document with probability `documents`, and is dropped with probability `drop`."""
    begins = rng.random((rows, length + 1)) < documents
    begins[:, 0] = True
    tokens = rng.integers(0, 1000, (rows, length + 1))
    targets = np.where(begins[:, 1:], IGNORE, tokens[:, 1:])
    dropped = (rng.random((rows, length)) < drop) & (targets != IGNORE)
    starts = np.flatnonzero(begins[:, :-1])
    bounds = np.append(starts, rows * length)
    return Batch(
        torch.from_numpy(tokens[:, :-1]),
        torch.from_numpy(targets),
        torch.from_numpy(dropped),
        torch.from_numpy(bounds.astype(np.int32)),
        int(np.diff(bounds).max()),
        list(range(rows)),
        int((targets != IGNORE).sum() - dropped.sum()),
        int(dropped.sum()),
    )


@pytest.mark.parametrize("documents", [0.0, 0.02, 0.3, 0.9])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_every_token_has_the_place_that_the_rule_gives_it(size: int, documents: float) -> None:
    rng = np.random.default_rng(size)
    for _ in range(20):
        batch = batch_of(rng, rows=3, length=32, documents=documents, drop=0.25)
        got = patch_batch(batch, size)
        rows, length = batch.tokens.shape
        inner = set(batch.cu_seqlens.tolist())
        kept = dropped = 0
        for row in range(rows):
            # Document of each token of the row, the one after the last input too.
            document, names = 0, []
            for place in range(length):
                document += row * length + place in inner
                names.append(document)
            names.append(document if int(batch.targets[row, -1]) != IGNORE else document + 1)
            for place in range(length):
                same = names[place] == names[place // size * size + size - 1]
                assert int(got.tokens[row, place]) == (int(batch.tokens[row, place]) if same else ABSENT)
            for place in range(length):
                token = place + size  # which this entry is about
                target, drop = IGNORE, False
                if token <= length and int(batch.targets[row, token - 1]) != IGNORE:
                    predicting = names[place // size * size : (place // size + 1) * size]
                    if names[token] in predicting:
                        target, drop = int(batch.targets[row, token - 1]), bool(batch.drop[row, token - 1])
                assert int(got.targets[row, place]) == target, (row, place)
                assert bool(got.drop[row, place]) == drop, (row, place)
                kept += target != IGNORE and not drop
                dropped += drop
        assert (got.kept, got.dropped) == (kept, dropped)
        # Attention: a patch is of the document of its last token, and begins one where that document begins in it.
        last = [
            int(torch.searchsorted(batch.cu_seqlens, at, right=True)) for at in range(size - 1, rows * length, size)
        ]
        bounds = [0, *(i for i in range(1, len(last)) if last[i] != last[i - 1]), len(last)]
        assert got.cu_seqlens.tolist() == bounds
        assert got.max_seqlen == max(np.diff(bounds))


def test_plain_text_is_shifted_by_a_patch() -> None:
    tokens = torch.arange(17)[None]
    batch = Batch(
        tokens[:, :-1], tokens[:, 1:], torch.zeros(1, 16, dtype=torch.bool), torch.tensor([0, 16]), 16, [0], 16, 0
    )
    got = patch_batch(batch, 4)
    assert got.tokens.tolist() == batch.tokens.tolist()
    assert got.targets.view(4, 4).tolist() == [[4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15], [16, *[IGNORE] * 3]]
    assert (got.kept, got.cu_seqlens.tolist(), got.max_seqlen) == (13, [0, 4], 4)
