"""A head whose vocabulary is spread over ranks gives what one process gives, with one collective in the forward."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megafish_kernels import linear_cross_entropy
from megafish_kernels.partials import LOWEST, Fields, merge, row_loss


@pytest.mark.parametrize("processes", [2, 4])
def test_equals_one_process(processes: int, triton_device: torch.device) -> None:
    worker = Path(__file__).with_name("vocab_parallel.py")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"),
            *(str(worker), "torch", *(["triton"] if triton_device.type == "cpu" else [])),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all equal") == processes


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_parts_in_any_order_and_size_make_the_whole(smoothing: float) -> None:
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(7, 33, generator=g, dtype=torch.float64) * 20
    logits[:, 30] = logits[:, 5]
    logits[3, 5] = logits[3, 30] = 99.0
    targets = torch.tensor([0, 32, 5, 5, 30, 12, 7])
    fields = Fields(smoothing > 0, stats=True)
    parts = []
    for begin, end in ((17, 33), (0, 1), (5, 5), (1, 17)):
        z = logits[:, begin:end]
        figures = torch.zeros(fields.count, 7, dtype=torch.float64)
        figures[fields.maximum] = LOWEST
        if end > begin:
            top = figures[fields.maximum] = z.amax(dim=1)
            weights = (z - top[:, None]).exp()
            figures[fields.sum_exp] = weights.sum(dim=1)
            inside = (targets >= begin) & (targets < end)
            at_target = logits.gather(1, targets[:, None])[:, 0]
            figures[fields.target] = torch.where(inside, at_target, 0.0)
            if smoothing:
                figures[fields.total] = z.sum(dim=1)
            figures[fields.moment] = (weights * (z - top[:, None])).sum(dim=1)
            figures[fields.best] = (z.argmax(dim=1) + begin).double()
        parts.append(figures)
    done = row_loss(
        merge(torch.stack(parts), fields), fields, targets, vocab_size=33, label_smoothing=smoothing, z_loss=0.1
    )
    log_p = logits.log_softmax(dim=1)
    lse = logits.logsumexp(dim=1)
    expected = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(done.loss, expected + 0.1 * lse**2, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(done.lse, lse, rtol=1e-12, atol=1e-12)
    assert done.entropy is not None and done.correct is not None
    torch.testing.assert_close(done.entropy, -(log_p.exp() * log_p).sum(dim=1), rtol=1e-12, atol=1e-12)
    assert torch.equal(done.correct, logits.argmax(dim=1) == targets)


@pytest.fixture
def alone() -> Any:
    """A group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_mistakes_are_named(alone: Any) -> None:
    hidden, weight, targets = torch.zeros(4, 2), torch.zeros(5, 2), torch.arange(4)

    def call(hidden: Tensor = hidden, **options: Any) -> Any:
        return linear_cross_entropy(hidden, weight, targets, **options)

    with pytest.raises(ValueError, match="vocab_size: needed with a group"):
        call(group=alone)
    with pytest.raises(ValueError, match="vocab_start: -1"):
        call(group=alone, vocab_size=5, vocab_start=-1)
    with pytest.raises(ValueError, match="mean nothing without a group"):
        call(vocab_start=2)
    with pytest.raises(ValueError, match="vocab_size: 16777217"):
        call(group=alone, vocab_size=2**24 + 1)
    with pytest.raises(ValueError, match="id 3 is outside the vocabulary of 3"):
        call(group=alone, vocab_size=3)
    with pytest.raises(ValueError, match=r"targets: expected shape \(3,\)"):
        call(hidden[:3], group=alone, vocab_size=5, sequence_sharded=True)
