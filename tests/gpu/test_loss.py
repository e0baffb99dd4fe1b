"""The linear cross-entropy on a GPU: against float64, bit for bit twice, without waiting, in a CUDA graph."""

from __future__ import annotations

import pytest
import torch

from tests.gpu import checks
from tests.gpu.checks import FEATURES, ROWS, problem

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BUDGETS = [None, 1, 2**20]
"""Bytes of logits: all kept; none, in slabs of 128 columns; some kept and the others computed anew."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("features", FEATURES)
def test_features(features: str, rows: str, dtype: torch.dtype, device: torch.device) -> None:
    given = problem(device, dtype, tokens=700, width=192, vocab=1003, padding=21)
    for logits_bytes in BUDGETS:
        checks.check_loss(given, features=FEATURES[features], rows=rows, logits_bytes=logits_bytes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ["device", "host"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(reduction: str, rows: str, dtype: torch.dtype, device: torch.device) -> None:
    given = problem(device, dtype, tokens=700, width=200, vocab=515, padding=3)
    for features in ("plain", "all"):
        checks.check_loss(given, features=FEATURES[features], rows=rows, reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 511, 513, 1025])
@pytest.mark.parametrize("width", [8, 65, 136])
def test_shapes_that_fill_no_tile(width: int, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    given = problem(device, dtype, tokens=tokens, width=width, vocab=257, padding=7)
    for rows in ("device", "host"):
        for logits_bytes in (None, 1):
            checks.check_loss(given, rows=rows, logits_bytes=logits_bytes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ["device", "host"])
@pytest.mark.parametrize(("vocab", "padding"), [(128_256, 0), (262_149, 0), (262_149, 59)])
def test_large_vocabularies(vocab: int, padding: int, rows: str, dtype: torch.dtype, device: torch.device) -> None:
    given = problem(device, dtype, tokens=600, width=256, vocab=vocab, padding=padding)
    for logits_bytes in (None, 600 * 8192 * dtype.itemsize):
        checks.check_loss(given, rows=rows, logits_bytes=logits_bytes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ["device", "host"])
def test_main_grad_accumulates(rows: str, dtype: torch.dtype, device: torch.device) -> None:
    given = problem(device, dtype, tokens=900, width=160, vocab=2011, padding=5)
    for logits_bytes in BUDGETS:
        checks.check_main_grad(given, rows, logits_bytes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_nothing_kept(rows: str, dtype: torch.dtype, device: torch.device) -> None:
    checks.check_nothing_kept(problem(device, dtype, tokens=300, width=64, vocab=333, padding=2), rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_the_same_bits_twice(rows: str, dtype: torch.dtype, device: torch.device) -> None:
    given = problem(device, dtype, tokens=4096, width=512, vocab=32_003, padding=61)
    for logits_bytes in (None, 2**26):
        checks.check_same_bits(given, rows, logits_bytes)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("logits_bytes", BUDGETS)
def test_the_host_never_waits(logits_bytes: int | None, rows: str, device: torch.device) -> None:
    given = problem(device, torch.bfloat16, tokens=1024, width=256, vocab=4099, padding=5)
    checks.check_no_waiting(given, rows, logits_bytes)


@pytest.mark.parametrize("rows", ROWS)
def test_in_a_cuda_graph(rows: str, device: torch.device) -> None:
    checks.check_graph(problem(device, torch.bfloat16, tokens=1024, width=256, vocab=4099, padding=5), rows)
