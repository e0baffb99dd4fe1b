"""The linear cross-entropy where a tensor has more than 2^31 elements, so that an offset of 32 bits would wrap."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.checks import check_large, problem

GIB = 2**30


def has_memory(device: torch.device, gib: int) -> None:
    free = torch.cuda.mem_get_info(device)[0]
    if free < gib * GIB:
        pytest.skip(f"needs {gib} GiB of free memory on the GPU, there are {free // GIB}")


@pytest.mark.parametrize("rows", ["device", "host"])
def test_hidden_states(rows: str, device: torch.device) -> None:
    has_memory(device, 56)
    given = problem(device, torch.bfloat16, tokens=1_300_000, width=2048, vocab=257, lost=0.1)
    assert int((~given.lost).sum()) * 2048 > 2**31
    check_large(given, rows, None)


@pytest.mark.parametrize("rows", ["device", "host"])
def test_weight(rows: str, device: torch.device) -> None:
    has_memory(device, 24)
    given = problem(device, torch.bfloat16, tokens=96, width=8192, vocab=270_000)
    assert given.weight.numel() > 2**31
    # The targets are drawn from all ids: some of them lie past the 2^31st element.
    given.ids[1:9] = torch.arange(270_000 - 9, 270_000 - 1, device=device)
    for logits_bytes in (None, 1):
        check_large(given, rows, logits_bytes)


@pytest.mark.parametrize("rows", ["device", "host"])
@pytest.mark.parametrize("kept", [True, False])
def test_logits(kept: bool, rows: str, device: torch.device) -> None:
    tokens, vocab, slab = 300_000, 16_389, 8192
    has_memory(device, 24 if kept else 16)
    given = problem(device, torch.bfloat16, tokens=tokens, width=64, vocab=vocab, lost=0.1)
    assert int((~given.lost).sum()) * slab > 2**31
    # All logits of the call, or one slab of as many columns as a slab may have.
    check_large(given, rows, 2 * tokens * (vocab if kept else slab))
