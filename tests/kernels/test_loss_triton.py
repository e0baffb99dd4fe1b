"""What is particular to the loss's Triton backend: the device's count, kept logits, main gradients, wide offsets."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megafish_kernels import KeptRows, compact_rows, linear_cross_entropy, tiles
from megafish_kernels.reference import reference_linear_cross_entropy
from megafish_kernels.tiles import TABLE, LossTiles, Tile, loss_tiles, override

N, D, V = 24, 16, 70
SMALL = Tile(16, 16, 16, 1, 1)


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    """Several tiles and splits even for these sizes."""
    with override(LossTiles(SMALL, SMALL, SMALL)):
        yield


def problem(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=g).to(device, dtype).requires_grad_()
    weight = (torch.randn(V, D, generator=g) * 0.5).to(device, dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=g)
    targets[torch.rand(N, generator=g) < 0.3] = -100
    return hidden, weight, targets.to(device)


def close(actual: Tensor, expected: Tensor, bound: float = 5e-6) -> None:
    assert float((actual.double() - expected.double()).norm()) <= bound * max(float(expected.double().norm()), 0.1)


def test_same_bits_twice(triton_device: torch.device) -> None:
    hidden, weight, targets = problem(triton_device, torch.float16)
    for logits_bytes in (1, 1500, None):
        runs = []
        for _ in range(2):
            loss, stats = linear_cross_entropy(
                hidden, weight, targets, backend="triton", logits_bytes=logits_bytes, return_stats=True
            )
            runs.append((loss, *stats[:4], *torch.autograd.grad(loss, (hidden, weight))))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("vocab", [64, 70, 79, 80, 129])
@pytest.mark.parametrize("logits_bytes", [1, 24 * 4 * 300, None])
def test_memory_that_nobody_wrote_is_never_summed(
    vocab: int, logits_bytes: int | None, triton_device: torch.device
) -> None:
    """Slabs are wider than their columns and have more rows than are kept: here all of that is NaN."""
    hidden, _, targets = problem(triton_device)
    weight = torch.randn(vocab, D, generator=torch.Generator().manual_seed(1)).to(triton_device).requires_grad_()
    targets = torch.where(targets < vocab, targets, 0)
    runs = []
    try:
        for fill in (False, True):
            torch.use_deterministic_algorithms(fill)
            loss = linear_cross_entropy(hidden, weight, targets, backend="triton", logits_bytes=logits_bytes)
            assert isinstance(loss, Tensor)
            runs.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_second_backward_after_the_kept_logits_are_used_up(triton_device: torch.device) -> None:
    hidden, weight, targets = problem(triton_device)
    loss = linear_cross_entropy(hidden, weight, targets, backend="triton")
    assert isinstance(loss, Tensor)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    for again, once in zip(torch.autograd.grad(loss, (hidden, weight)), first, strict=True):
        close(again, once, 1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("count", ["device", "host"])
def test_main_gradient_is_added_to(backend: Any, count: str, triton_device: torch.device) -> None:
    device = triton_device if backend == "triton" else torch.device("cpu")
    hidden, weight, targets = problem(device)
    keep = targets != -100
    index = keep.nonzero()[:, 0].int()
    rows = compact_rows(keep) if count == "device" else KeptRows(index, len(index))
    expected, _ = reference_linear_cross_entropy(hidden, weight, targets)
    wanted = torch.autograd.grad(expected, (hidden, weight))
    main_grad = torch.full((V, D), 0.25, device=device)
    for micro_batch in (1, 2):
        loss = linear_cross_entropy(hidden, weight, targets, rows=rows, main_grad=main_grad, backend=backend)
        assert isinstance(loss, Tensor)
        loss.backward()
        assert weight.grad is None and hidden.grad is not None
        close(main_grad - 0.25, micro_batch * wanted[1])
        close(hidden.grad, micro_batch * wanted[0])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_loss_on_dropped_tokens(backend: Any, triton_device: torch.device) -> None:
    device = triton_device if backend == "triton" else torch.device("cpu")
    hidden, weight, targets = problem(device)
    drop = torch.arange(N, device=device) % 3 == 0
    loss, stats = linear_cross_entropy(
        hidden, weight, targets, drop=drop, softcap=3.0, backend=backend, return_stats="loss", audit_dropped=True
    )
    expected, _ = reference_linear_cross_entropy(hidden, weight, targets.masked_fill(drop, -100), softcap=3.0)
    _, others = reference_linear_cross_entropy(hidden, weight, targets.masked_fill(~drop, -100), softcap=3.0)
    close(loss.detach(), expected.detach())
    assert stats.dropped is not None and not stats.dropped.requires_grad
    close(stats.dropped, others["cross_entropy"])
    assert torch.equal(stats.dropped != 0, drop & (targets != -100))


def test_rows_of_a_batch_that_is_all_kept_are_not_copied(triton_device: torch.device) -> None:
    hidden, weight, targets = problem(triton_device)
    loss = linear_cross_entropy(
        hidden,
        weight,
        targets.clamp(min=0),
        rows=KeptRows(torch.arange(N, dtype=torch.int32, device=triton_device), N),
        backend="triton",
    )
    assert isinstance(loss, Tensor)
    saved = loss.grad_fn.saved_tensors  # type: ignore[union-attr]
    assert saved[0].data_ptr() == hidden.data_ptr()


def test_kept_logits_near_probability_one_leave_no_gradient(triton_device: torch.device) -> None:
    """A logit of 60 rounds by up to 0.016 in fp16, but not as a difference from the largest of its tile."""
    weight = torch.zeros(V, D, dtype=torch.float16, device=triton_device)
    weight[5, 0] = 59.97
    hidden = torch.zeros(2, D, dtype=torch.float16, device=triton_device)
    hidden[:, 0] = 1.0003
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.full((2,), 5, device=triton_device), backend="triton")
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert float(gradient.abs().max()) < 1e-6


def test_offsets_beyond_32_bits(triton_device: torch.device) -> None:
    """Rows that lie 2^22 entries apart, up to 2^31 and more: the pages between them are never touched."""
    from megafish_kernels.triton_loss import Kept, multiply

    if triton_device.type == "cuda":
        pytest.skip("needs 4 GiB of addresses that are not memory; tests/gpu has large tensors")
    stride, count = 2**22, 530
    memory = torch.empty(stride * (count - 1) + 32, dtype=torch.float16)
    slab = memory.as_strided((count, 32), (stride, 1))
    slab.copy_(torch.randn(count, 32))
    other = torch.randn(32, 16).half()
    kept = Kept(torch.randn(count, 16).half(), torch.zeros(count, dtype=torch.int32), count)
    out = torch.empty(count, 16)
    multiply(slab, other, out, kept, add=False)
    close(out, slab.double() @ other.double())
    grown = torch.ones(32, 16)
    multiply(slab, kept.hidden, grown, kept, add=True, transposed=True)
    close(grown, 1 + slab.double().t() @ kept.hidden.double())


def test_no_value_is_read_from_the_device() -> None:
    """Meta tensors have no values: whatever asked for one would fail. All features, forward and backward."""
    code = """
import torch
from megafish_kernels import compact_rows, linear_cross_entropy
from megafish_kernels.triton_runtime import record
def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)
for arch in (80, 90, 100):
    for budget in (1, None):
        with record(arch) as launches:
            hidden, weight, bias = meta(4096, 2048), meta(32000, 2048), meta(32000)
            targets = meta(4096, dtype=torch.int64)
            loss, stats = linear_cross_entropy(
                hidden, weight, targets, bias=bias, token_weight=meta(4096, dtype=torch.float32),
                drop=meta(4096, dtype=torch.bool), denominator=meta(dtype=torch.float32).detach(), z_loss=1e-4,
                label_smoothing=0.1, softcap=30.0, logit_scale=0.5, logits_bytes=budget, return_stats=True,
                audit_dropped=True, main_grad=meta(32000, 2048, dtype=torch.float32).detach(),
            )
            loss.backward()
        assert {launch.name for launch in launches} >= {"_forward", "_gradient", "_product"}, launches
print("nothing was read")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "nothing was read", done.stderr


@pytest.mark.parametrize("k", [2, 4, 50])
def test_dropped_tokens_cost_no_operations(k: int) -> None:
    """The torch backend with all logits kept, as torch counts its operations: 6 n V D for n kept tokens."""
    tokens = 100
    hidden, weight = torch.randn(tokens, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    targets = torch.randint(0, V, (tokens,))
    counts = []
    for drop in (torch.zeros(tokens, dtype=torch.bool), torch.arange(tokens) % k == 0):
        with FlopCounterMode(display=False) as counter:
            loss = linear_cross_entropy(hidden, weight, targets, drop=drop)
            assert isinstance(loss, Tensor)
            loss.backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == 6 * tokens * V * D
    assert counts[1] == counts[0] * (tokens - tokens // k) / tokens


def test_tiles_of_an_override_reach_the_backward(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU autograd runs the backward in a thread of its own, which knows no override; here it comes too late."""
    from megafish_kernels import triton_loss

    seen: dict[str, set[int]] = {}
    start = triton_loss.launch

    def noted(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        seen.setdefault(kernel.fn.__name__, set()).add(options["BN"])
        start(kernel, grid, *args, **options)

    monkeypatch.setattr(triton_loss, "launch", noted)
    hidden, weight, targets = problem(triton_device)
    with override(LossTiles(SMALL, Tile(16, 32, 16, 1, 1), Tile(16, 64, 16, 1, 1))):
        loss = linear_cross_entropy(hidden, weight, targets, backend="triton", logits_bytes=1)
    assert isinstance(loss, Tensor)
    loss.backward()
    assert seen == {"_forward": {16}, "_gradient": {32}, "_product": {64}}


def test_precision_is_that_of_torchs_own_products(triton_device: torch.device) -> None:
    from megafish_kernels.triton_loss import precision

    assert precision() == "ieee"
    try:
        for name, wanted in (("high", "tf32"), ("medium", "tf32"), ("highest", "ieee")):
            torch.set_float32_matmul_precision(name)
            assert precision() == wanted
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            torch.backends.cuda.matmul.fp32_precision = "tf32"
            assert precision() == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_tiles_of_the_table_are_found_and_overridden() -> None:
    with override(LossTiles(SMALL, SMALL, SMALL)):
        assert loss_tiles(90, 2, 10**4).forward is SMALL
    for arch, itemsize, rows in itertools.product((75, 80, 86, 90, 100, 120), (2, 4), (1, 10**4)):
        kind = "single" if itemsize == 4 else "half, few rows" if rows == 1 else "half"
        known = 80 if arch < 90 else 90 if arch < 100 else 100
        token = tiles._override.set(None)  # the fixture's tiles stand in the way
        try:
            assert loss_tiles(arch, itemsize, rows) is TABLE[known, kind]
        finally:
            tiles._override.reset(token)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"rows": KeptRows(torch.zeros(3, dtype=torch.int32), 2)}, "rows: the count 2"),
        ({"rows": KeptRows(torch.zeros(3), 3)}, "rows: expected an index"),
        (
            {"rows": KeptRows(torch.zeros(4, dtype=torch.int32), torch.tensor(3.0))},
            "rows: expected a count int32 and 0-d, got torch.float32",
        ),
        (
            {"rows": KeptRows(torch.zeros(4, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))},
            "rows: expected a count",
        ),
        (
            {"rows": KeptRows(torch.zeros(3, dtype=torch.int32), 3), "drop": torch.zeros(4, dtype=torch.bool)},
            "rows: say",
        ),
        ({"drop": torch.zeros(3, dtype=torch.bool)}, "drop: expected shape"),
        ({"drop": torch.zeros(4)}, "drop: expected bool"),
        ({"main_grad": torch.zeros(5, 2, dtype=torch.float16)}, "main_grad: expected fp32"),
        ({"main_grad": torch.zeros(2, 5).t()}, "main_grad: must be contiguous"),
        ({"audit_dropped": True}, "audit_dropped"),
        ({"backend": "triton", "dtype": torch.float64}, "float64"),
        ({"backend": "triton", "dtype": torch.bfloat16}, "bfloat16"),
        ({"targets": torch.empty(4, dtype=torch.long, device="meta")}, "targets: lies on meta"),
        ({"backend": "triton", "targets": torch.tensor([0, 1, 2, 5])}, "targets: id 5"),
        ({"backend": "triton", "targets": torch.tensor([0, -7, 2, 4])}, "targets: id -7"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], word: str, triton_device: torch.device) -> None:
    if triton_device.type == "cuda" and change.get("backend") == "triton":
        pytest.skip("of the interpreter")
    dtype = change.pop("dtype", torch.float32)
    given = {"hidden": torch.zeros(4, 2).to(dtype), "weight": torch.zeros(5, 2).to(dtype), "targets": torch.arange(4)}
    given.update(change)
    with pytest.raises(ValueError, match=word):
        linear_cross_entropy(given.pop("hidden"), given.pop("weight"), given.pop("targets"), **given)
