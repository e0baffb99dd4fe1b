"""The fused linear cross-entropy against the float64 oracle and torch's own cross-entropy."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megafish_kernels import KeptRows, linear_cross_entropy
from megafish_kernels.reference import reference_linear_cross_entropy
from megafish_kernels.torch_backend import chunk_rows

N, D, V, REAL = 41, 12, 57, 53


def problem(dtype: torch.dtype = torch.float64, seed: int = 0, dropped: float = 0.3) -> tuple[Tensor, ...]:
    """hidden [N, D], weight [V, D], bias [V] (leaves), targets [N] with ignored ones, token weights [N] with zeros."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(V, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, REAL, (N,), generator=g)
    targets[torch.rand(N, generator=g) < dropped] = -100
    token_weight = torch.rand(N, generator=g) * (torch.rand(N, generator=g) > 0.2)
    return hidden, weight, bias, targets, token_weight


def chunk_bytes(rows: int | None, dtype: torch.dtype = torch.float64, columns: int = V) -> int | None:
    """logits_bytes for chunks of so many rows."""
    return None if rows is None else rows * columns * dtype.itemsize


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "z-loss": {"z_loss": 0.01},
    "smoothing": {"label_smoothing": 0.1},
    "softcap": {"softcap": 3.0},
    "scale": {"logit_scale": 0.3},
    "all": {"z_loss": 0.02, "label_smoothing": 0.2, "softcap": 5.0, "logit_scale": 1.7},
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS.keys())
@pytest.mark.parametrize(("with_bias", "weighted"), [(False, False), (True, False), (False, True), (True, True)])
def test_values_and_gradients_equal_the_oracle(reduction: Any, extra: Any, with_bias: bool, weighted: bool) -> None:
    hidden, weight, bias, targets, token_weight = problem()
    options: dict[str, Any] = {"reduction": reduction, "vocab_size": REAL, **extra}
    options["bias"] = bias if with_bias else None
    options["token_weight"] = token_weight if weighted else None
    expected, _ = reference_linear_cross_entropy(hidden, weight, targets, **options)
    upstream = torch.linspace(-1.0, 2.0, N, dtype=torch.float64) if reduction == "none" else torch.tensor(0.7).double()
    inputs = (hidden, weight, bias) if with_bias else (hidden, weight)
    wanted = torch.autograd.grad(expected, inputs, upstream)
    for chunk in (1, 7, None):
        loss = linear_cross_entropy(hidden, weight, targets, logits_bytes=chunk_bytes(chunk, columns=REAL), **options)
        assert isinstance(loss, Tensor)
        close(loss, expected, 1e-12)
        for got, want in zip(torch.autograd.grad(loss, inputs, upstream), wanted, strict=True):
            close(got, want, 1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction: Any) -> None:
    hidden, weight, bias, targets, token_weight = problem()

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return linear_cross_entropy(
            hidden,
            weight,
            targets,
            bias=bias,
            token_weight=token_weight,
            reduction=reduction,
            vocab_size=REAL,
            logits_bytes=chunk_bytes(9),
            **EXTRAS["all"],
        )

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias), fast_mode=True)


def test_equals_torch_cross_entropy_in_fp32() -> None:
    hidden, weight, bias, targets, _ = problem(torch.float32)
    loss = linear_cross_entropy(hidden, weight, targets, bias=bias, logits_bytes=chunk_bytes(8, torch.float32))
    expected = F.cross_entropy(F.linear(hidden, weight, bias), targets)
    assert isinstance(loss, Tensor) and loss.dtype == torch.float32
    close(loss, expected, 1e-6)
    inputs = (hidden, weight, bias)
    for got, want in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        assert got.dtype == torch.float32
        close(got, want, 1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_statistics(reduction: Any) -> None:
    hidden, weight, bias, targets, token_weight = problem()
    shaped = (hidden[:40].reshape(4, 10, D), weight, targets[:40].reshape(4, 10))
    options: dict[str, Any] = {"token_weight": token_weight[:40].reshape(4, 10), "bias": bias, **EXTRAS["all"]}
    loss, stats = linear_cross_entropy(
        *shaped, reduction=reduction, return_stats=True, logits_bytes=chunk_bytes(7), **options
    )
    expected, wanted = reference_linear_cross_entropy(*shaped, reduction=reduction, **options)
    close(loss, expected, 1e-12)
    for name, want in wanted.items():
        got = getattr(stats, name)
        assert got.shape == (4, 10) and not got.requires_grad
        close(got, want, 1e-12)
    assert stats.correct is not None and stats.correct.dtype == torch.bool
    loss, cheap = linear_cross_entropy(*shaped, reduction=reduction, return_stats="loss", **options)
    assert cheap.entropy is None and cheap.correct is None
    close(cheap.cross_entropy, wanted["cross_entropy"], 1e-12)
    close(cheap.lse, wanted["lse"], 1e-12)


def test_correct_takes_the_first_of_equal_logits() -> None:
    weight = torch.tensor([[0.0], [1.0], [1.0]])
    _, stats = linear_cross_entropy(torch.ones(2, 1), weight, torch.tensor([1, 2]), return_stats=True)
    assert stats.correct is not None and stats.correct.tolist() == [True, False]


# ---------------------------------------------------------------------------------------------- what is left out


def test_ignored_rows_never_reach_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _, targets, token_weight = problem(torch.float32)
    seen: list[int] = []
    product = torch.mm

    def counted(a: Tensor, b: Tensor, **kwargs: Any) -> Tensor:
        seen.append(a.shape[0])
        return product(a, b, **kwargs)

    monkeypatch.setattr(torch, "mm", counted)
    loss = linear_cross_entropy(
        hidden, weight, targets, token_weight=token_weight, logits_bytes=chunk_bytes(10, torch.float32)
    )
    assert isinstance(loss, Tensor)
    loss.backward()
    kept = int(((targets != -100) & (token_weight != 0)).sum())
    assert 0 < kept < N
    # The logits' product and that of hidden's gradient, over the kept rows alone.
    assert sum(seen) == 2 * kept


def test_weight_zero_equals_ignored_and_nan_rows_do_no_harm() -> None:
    hidden, weight, _, targets, _ = problem(torch.float32)
    keep = targets != -100
    poisoned = hidden.detach().clone()
    poisoned[~keep] = float("nan")
    poisoned.requires_grad_()
    loss = linear_cross_entropy(poisoned, weight, targets)
    other = linear_cross_entropy(poisoned, weight, targets.clamp(min=0), token_weight=keep.float())
    dense = linear_cross_entropy(hidden[keep], weight, targets[keep])
    assert isinstance(loss, Tensor) and isinstance(other, Tensor) and isinstance(dense, Tensor)
    assert loss.equal(other) and loss.equal(dense)
    (grad,) = torch.autograd.grad(loss, poisoned)
    assert not grad[~keep].any() and grad[keep].any(dim=1).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("denominator", [None, 0, 8])
def test_no_kept_token_gives_zero_loss_and_gradients(reduction: Any, denominator: int | None) -> None:
    if denominator is not None and reduction != "mean":
        pytest.skip("a denominator goes with mean alone")
    hidden, weight, bias, targets, _ = problem(torch.float32)
    options: dict[str, Any] = {"denominator": None if denominator is None else torch.tensor(denominator)}
    loss = linear_cross_entropy(
        hidden, weight, torch.full_like(targets, -100), bias=bias, reduction=reduction, z_loss=0.1, **options
    )
    assert isinstance(loss, Tensor) and loss.requires_grad
    assert not loss.any()
    for grad in torch.autograd.grad(loss.sum(), (hidden, weight, bias)):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_padding_of_the_vocabulary_takes_no_part() -> None:
    hidden, weight, bias, targets, _ = problem(torch.float32)
    with torch.no_grad():
        weight[REAL:], bias[REAL:] = 1e4, float("nan")
    loss = linear_cross_entropy(hidden, weight, targets, bias=bias, vocab_size=REAL)
    trimmed = linear_cross_entropy(hidden, weight[:REAL], targets, bias=bias[:REAL])
    assert isinstance(loss, Tensor) and isinstance(trimmed, Tensor)
    assert loss.equal(trimmed)
    _, grad_weight, grad_bias = torch.autograd.grad(loss, (hidden, weight, bias))
    assert not grad_weight[REAL:].any() and not grad_bias[REAL:].any() and grad_weight[:REAL].any()


def test_micro_batches_with_uneven_counts_add_up_to_the_batch() -> None:
    hidden, weight, _, targets, token_weight = problem()
    kept_weight = float(token_weight[targets != -100].sum())
    whole = linear_cross_entropy(hidden, weight, targets, token_weight=token_weight)
    for denominator in (kept_weight, torch.tensor(kept_weight)):
        parts = [
            linear_cross_entropy(
                hidden[a:b], weight, targets[a:b], token_weight=token_weight[a:b], denominator=denominator
            )
            for a, b in ((0, 3), (3, 29), (29, N))
        ]
        assert isinstance(whole, Tensor)
        total = sum(part for part in parts if isinstance(part, Tensor))
        assert isinstance(total, Tensor)
        close(total, whole, 1e-6)
        grads = zip(
            torch.autograd.grad(total, (hidden, weight)),
            torch.autograd.grad(whole, (hidden, weight), retain_graph=True),
            strict=True,
        )
        for got, want in grads:
            close(got, want, 1e-6)


# ------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_reduces_in_fp32(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(512, 64, generator=g).to(dtype).requires_grad_()
    weight = (torch.randn(300, 64, generator=g) * 0.1).to(dtype).requires_grad_()
    targets = torch.randint(0, 300, (512,), generator=g)
    token_weight = torch.rand(512, generator=g)
    reference, _ = reference_linear_cross_entropy(hidden, weight, targets, token_weight=token_weight)
    wanted = torch.autograd.grad(reference, (hidden, weight))
    eps = torch.finfo(dtype).eps
    for chunk in (512, 16):
        loss = linear_cross_entropy(
            hidden, weight, targets, token_weight=token_weight, logits_bytes=chunk_bytes(chunk, dtype, 300)
        )
        assert isinstance(loss, Tensor) and loss.dtype == torch.float32
        assert abs(float((loss - reference).detach())) < eps * 0.1
        got = torch.autograd.grad(loss, (hidden, weight))
        for grad, want in zip(got, wanted, strict=True):
            assert grad.dtype == dtype
            # One rounding of the logits, one of their gradient, one of the result: no more with 32 chunks than with 1.
            assert float((grad - want).norm() / want.norm()) < eps


def test_error_of_the_weight_gradient_does_not_grow_with_the_chunks() -> None:
    g = torch.Generator().manual_seed(4)
    hidden = torch.randn(2048, 8, generator=g)
    weight = torch.randn(40, 8, generator=g).requires_grad_()
    targets = torch.randint(0, 40, (2048,), generator=g)
    reference, _ = reference_linear_cross_entropy(hidden, weight, targets)
    (want,) = torch.autograd.grad(reference, weight)
    for chunk in (2048, 1):
        loss = linear_cross_entropy(hidden, weight, targets, logits_bytes=chunk_bytes(chunk, torch.float32, 40))
        assert isinstance(loss, Tensor)
        (got,) = torch.autograd.grad(loss, weight)
        assert float((got - want).norm() / want.norm()) < 2e-6


def test_extreme_logits_stay_finite_and_exact() -> None:
    # The target's probability underflows in fp32 (row 0), is 1 (row 1), and two huge logits are equal (row 2).
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], requires_grad=True)
    hidden = torch.tensor([[500.0, 0.0], [0.0, 300.0], [9e4, 9e4]], requires_grad=True)
    targets = torch.tensor([1, 1, 0])
    loss = linear_cross_entropy(hidden, weight, targets, reduction="none")
    assert isinstance(loss, Tensor)
    torch.testing.assert_close(loss, torch.tensor([500.0, 0.0, 0.6931472]))
    grads = torch.autograd.grad(loss.sum(), (hidden, weight))
    assert all(grad.isfinite().all() for grad in grads)


def test_in_place_softmax_of_torch_equals_the_other() -> None:
    # The CPU path writes torch.softmax over its own input.
    for rows, columns in itertools.product((1, 3, 17), (1, 5, 1023, 4099)):
        logits = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 10
        expected = torch.softmax(logits, dim=1)
        assert torch.softmax(logits, dim=1, out=logits) is logits
        assert torch.equal(logits, expected)


def test_deterministic() -> None:
    hidden, weight, bias, targets, token_weight = problem(torch.float32)
    runs = []
    for _ in range(2):
        loss = linear_cross_entropy(
            hidden, weight, targets, bias=bias, token_weight=token_weight, logits_bytes=chunk_bytes(6, torch.float32)
        )
        assert isinstance(loss, Tensor)
        runs.append((loss, *torch.autograd.grad(loss, (hidden, weight, bias))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# ------------------------------------------------------------------------------------------- as autograd sees it


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("needs", [n for n in itertools.product((False, True), repeat=3) if any(n)])
def test_only_the_gradients_that_are_wanted(reduction: Any, needs: tuple[bool, bool, bool]) -> None:
    *inputs, targets, _ = problem()
    wanted = torch.autograd.grad(reference_linear_cross_entropy(*inputs[:2], targets, bias=inputs[2])[0], inputs)
    for tensor, need in zip(inputs, needs, strict=True):
        tensor.requires_grad_(need)
    loss = linear_cross_entropy(*inputs[:2], targets, bias=inputs[2], reduction=reduction)
    assert isinstance(loss, Tensor)
    (loss.sum() / (1 if reduction == "mean" else (targets != -100).sum())).backward()
    for tensor, need, want in zip(inputs, needs, wanted, strict=True):
        assert (tensor.grad is not None) == need
        if tensor.grad is not None:
            close(tensor.grad, want, 1e-12)


@pytest.mark.parametrize("frozen", ["no_grad", "inference_mode", "nothing requires"])
def test_forward_alone_computes_no_gradient(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _, targets, _ = problem(torch.float32)
    expected = linear_cross_entropy(hidden, weight, targets)

    def forbidden(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("the product of the weight's gradient")

    monkeypatch.setattr(torch, "addmm", forbidden)
    if frozen == "no_grad":
        with torch.no_grad():
            loss = linear_cross_entropy(hidden, weight, targets)
    elif frozen == "inference_mode":
        with torch.inference_mode():
            loss = linear_cross_entropy(hidden, weight, targets)
    else:
        loss = linear_cross_entropy(hidden.detach(), weight.detach(), targets)
    assert isinstance(loss, Tensor) and isinstance(expected, Tensor)
    assert not loss.requires_grad and loss.item() == expected.item()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_backward(reduction: Any) -> None:
    hidden, weight, _, targets, _ = problem(torch.float32)
    loss = linear_cross_entropy(
        hidden, weight, targets, reduction=reduction, denominator=None, logits_bytes=chunk_bytes(8, torch.float32)
    )
    assert isinstance(loss, Tensor)
    first = torch.autograd.grad(loss.sum() * 3, (hidden, weight), retain_graph=True)
    copies = [grad.clone() for grad in first]
    second = torch.autograd.grad(loss.sum() * 3, (hidden, weight))
    for a, b, c in zip(first, copies, second, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss.sum(), (hidden, weight))


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_a_checkpoint(reentrant: bool) -> None:
    hidden, weight, _, targets, _ = problem()
    expected = linear_cross_entropy(hidden, weight, targets)
    loss = checkpoint(linear_cross_entropy, hidden, weight, targets, use_reentrant=reentrant)
    assert isinstance(expected, Tensor)
    close(loss, expected, 1e-12)
    grads = zip(
        torch.autograd.grad(expected, (hidden, weight)), _grads_of(loss, hidden, weight), strict=True
    )  # autograd.grad does not reach through a reentrant checkpoint
    for want, got in grads:
        close(got, want, 1e-12)


def _grads_of(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    loss.backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def test_weight_gradient_arrives_through_autograd_hooks_and_is_not_copied() -> None:
    hidden, weight, _, targets, _ = problem(torch.float32)
    seen: list[int] = []
    weight.register_hook(lambda grad: seen.append(grad.data_ptr()))
    loss = linear_cross_entropy(hidden, weight, targets)
    assert isinstance(loss, Tensor)
    loss.backward()
    assert weight.grad is not None and seen == [weight.grad.data_ptr()]
    before = weight.grad.clone()
    again = linear_cross_entropy(hidden, weight, targets)
    assert isinstance(again, Tensor)
    again.backward()
    close(weight.grad, 2 * before, 1e-6)


def test_tied_weight() -> None:
    _, weight, _, targets, _ = problem()
    ids = torch.randint(0, REAL, (N,), generator=torch.Generator().manual_seed(9))
    loss = linear_cross_entropy(F.embedding(ids, weight), weight, targets)
    expected, _ = reference_linear_cross_entropy(F.embedding(ids, weight), weight, targets)
    assert isinstance(loss, Tensor)
    close(torch.autograd.grad(loss, weight)[0], torch.autograd.grad(expected, weight)[0], 1e-12)


def test_under_autocast() -> None:
    hidden, weight, bias, targets, _ = problem(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, bias=bias)
    assert isinstance(loss, Tensor) and loss.dtype == torch.float32
    low = [tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, weight, bias)]
    expected = linear_cross_entropy(low[0], low[1], targets, bias=low[2])
    assert isinstance(expected, Tensor) and loss.equal(expected)
    grads = torch.autograd.grad(loss, (hidden, weight, bias))
    for got, want in zip(grads, torch.autograd.grad(expected, low), strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, want.float())


def test_layouts() -> None:
    hidden, weight, _, targets, _ = problem()
    expected = linear_cross_entropy(hidden, weight, targets)
    strided = torch.zeros(N, 2 * D, dtype=torch.float64)[:, ::2].copy_(hidden.detach())
    transposed = weight.detach().t().contiguous().t()
    loss = linear_cross_entropy(strided, transposed, targets.to(torch.int32))
    assert isinstance(loss, Tensor) and isinstance(expected, Tensor)
    close(loss, expected, 1e-12)


# -------------------------------------------------------------------------------------------------------- mistakes


def test_chunks_are_even_and_near_the_wanted_size() -> None:
    assert chunk_rows(1030, 10, torch.float32, 512 * 40) == 344
    assert chunk_rows(512, 10, torch.float32, 512 * 40) == 512
    assert chunk_rows(10**6, 32768, torch.float32, None) <= 64 * 2**20 // (4 * 32768)
    assert 250 <= chunk_rows(10**5, 128256, torch.float32, None) <= 256
    assert 500 <= chunk_rows(10**5, 128256, torch.bfloat16, None) <= 512
    assert chunk_rows(0, 10, torch.float32, None) == 0


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"hidden": torch.zeros(4, 3)}, "hidden: expected"),
        ({"hidden": torch.zeros(4, 2, dtype=torch.long)}, "hidden: expected a floating"),
        ({"weight": torch.zeros(5)}, "weight: expected"),
        ({"weight": torch.zeros(5, 2, dtype=torch.bfloat16)}, "weight: dtype"),
        ({"targets": torch.zeros(3, dtype=torch.long)}, "targets: expected shape"),
        ({"targets": torch.zeros(4)}, "targets: expected integers"),
        ({"targets": torch.tensor([0, 1, 2, 5])}, "targets: id 5"),
        ({"targets": torch.tensor([0, 1, -1, 2])}, "targets: id -1"),
        ({"targets": torch.tensor([0, 1, 2, 4]), "vocab_size": 4}, "targets: id 4 is outside the vocabulary of 4"),
        ({"bias": torch.zeros(4)}, "bias: expected"),
        ({"bias": torch.zeros(5, dtype=torch.float64)}, "bias: dtype"),
        ({"token_weight": torch.ones(4, 1)}, "token_weight"),
        ({"vocab_size": 6}, "vocab_size: 6"),
        ({"vocab_size": 0}, "vocab_size: 0"),
        ({"reduction": "avg"}, "reduction"),
        ({"reduction": "sum", "denominator": 3}, "denominator: goes with"),
        ({"denominator": 0}, "denominator: 0"),
        ({"denominator": torch.ones(2)}, "denominator: expected a 0-d"),
        ({"denominator": torch.ones((), dtype=torch.bfloat16)}, "denominator: torch.bfloat16 rounds"),
        ({"z_loss": -1.0}, "z_loss"),
        ({"z_loss": float("nan")}, "z_loss: nan"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"softcap": 0.0}, "softcap"),
        ({"softcap": float("nan")}, "softcap: nan"),
        ({"logit_scale": float("inf")}, "logit_scale: inf"),
        ({"logits_bytes": 0}, "logits_bytes"),
        ({"logits_bytes": 1e9}, "logits_bytes: expected an integer"),
        ({"backend": "cuda"}, "backend"),
        ({"return_stats": "all"}, "return_stats"),
        ({"hidden": [[1.0, 2.0]]}, "hidden: expected a tensor, got list"),
        ({"drop": np.zeros(4, dtype=bool)}, "drop: expected a tensor, got ndarray"),
        ({"weight": torch.zeros(5, 0), "hidden": torch.zeros(4, 0)}, "weight: expected"),
        ({"vocab_size": 5.0}, "vocab_size: expected an integer"),
        ({"ignore_index": None}, "ignore_index: expected an integer"),
        ({"rows": (torch.zeros(1, dtype=torch.int32), 1)}, "rows: expected KeptRows, got tuple"),
        ({"rows": KeptRows(torch.tensor([0, 4]), 2)}, "rows: 4 is no row of the batch, which has 4"),
        ({"rows": KeptRows(torch.tensor([-1, 2]), 2)}, "rows: -1 is no row"),
        ({"rows": KeptRows(torch.tensor([2, 3, 2]), 3)}, "rows: row 2 is named 2 times"),
        ({"return_stats": 1}, "return_stats: 1"),
        ({"entropy_weight": 1.0}, r"entropy_weight: 1.0 must be \(sigma, gamma\)"),
        ({"entropy_weight": (1.0, -1.0)}, "two numbers of at least 0"),
        ({"entropy_weight": (float("nan"), 1.0)}, "two numbers of at least 0"),
        ({"entropy_weight": (1.0, 0.0)}, "gamma 0 weighs all tokens alike"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], word: str) -> None:
    given: dict[str, Any] = {"hidden": torch.zeros(4, 2), "weight": torch.zeros(5, 2), "targets": torch.arange(4)}
    given.update(change)
    with pytest.raises(ValueError, match=word):
        linear_cross_entropy(given.pop("hidden"), given.pop("weight"), given.pop("targets"), **given)


def test_more_ids_than_fp32_can_count_are_refused() -> None:
    vocab = 2**24 + 1
    weight, hidden = torch.empty(vocab, 2, device="meta"), torch.empty(4, 2, device="meta")
    with pytest.raises(ValueError, match=r"vocab_size: 16777217 must be at least 1 and at most 2\^24"):
        linear_cross_entropy(hidden, weight, torch.empty(4, dtype=torch.long, device="meta"))


def test_float16_gradients_survive_a_large_denominator() -> None:
    """1e-6 of a gradient is nothing in fp16: the loss scale, which comes with the upstream gradient, goes in first."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(32, 16, generator=generator)
    weight = torch.randn(64, 16, generator=generator) * 0.2
    targets = torch.randint(0, 64, (32,), generator=generator)
    grads = []
    for dtype in (torch.float32, torch.float16):
        x, w = (tensor.to(dtype, copy=True).requires_grad_() for tensor in (hidden, weight))
        loss = linear_cross_entropy(x, w, targets, denominator=1e6)
        assert isinstance(loss, torch.Tensor)
        loss.backward(torch.tensor(65536.0))
        assert x.grad is not None and w.grad is not None
        grads.append((x.grad.float(), w.grad.float()))
    for exact, low in zip(*grads, strict=True):
        assert (exact - low).norm() < 5e-3 * exact.norm()
