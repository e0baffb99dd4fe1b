"""The linear cross-entropy inside torch.compile: no graph break, equal values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megafish_kernels import compact_rows, linear_cross_entropy

N, D, V = 24, 16, 33


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, N // 2, D, generator=g).to(dtype).requires_grad_()
    weight, bias = (torch.randn(*shape, generator=g).to(dtype).requires_grad_() for shape in ((V, D), (V,)))
    targets = torch.randint(0, V, (2, N // 2), generator=g)
    targets[0, 3] = -100
    return hidden, weight, bias, targets


@pytest.fixture(autouse=True)
def fresh() -> None:
    """No test inherits what another has compiled."""
    torch._dynamo.reset()


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {
        "z_loss": 0.02,
        "label_smoothing": 0.2,
        "softcap": 5.0,
        "logit_scale": 1.7,
        "token_weight": torch.linspace(0, 2, N).reshape(2, -1),
        "drop": torch.arange(N).reshape(2, -1) % 4 == 1,
    },
    "entropy weight": {"entropy_weight": (1.0, 1.5), "drop": torch.arange(N).reshape(2, -1) % 4 == 1},
    "entropy weight, rows": {"entropy_weight": (0.5, 1.0), "rows": compact_rows(torch.arange(N) % 3 != 0)},
    "rows": {"rows": compact_rows(torch.arange(N) % 3 != 0)},
    "denominator": {"denominator": torch.tensor(7.0)},
    "frozen head": {"frozen": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_eager_without_a_graph_break(name: str, reduction: Any, dtype: torch.dtype) -> None:
    options = dict(OPTIONS[name])
    if reduction != "mean":
        options.pop("denominator", None)
    hidden, weight, bias, targets = problem(dtype)
    if "rows" in options:
        targets = targets.clamp(min=0)
    weight.requires_grad_(not options.pop("frozen", False))

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return linear_cross_entropy(
            hidden * 1.5, weight, targets, bias=bias, reduction=reduction, return_stats=True, backend="torch", **options
        )

    expected, facts = loss(hidden, weight, bias)
    compiled, others = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden, weight, bias)
    torch.testing.assert_close(compiled, expected)
    for got, want in zip(others, facts, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want)
    upstream = torch.linspace(-64, 64, N).reshape(2, -1) if reduction == "none" else torch.tensor(64.0)
    inputs = [tensor for tensor in (hidden, weight, bias) if tensor.requires_grad]
    wanted = torch.autograd.grad(expected, inputs, upstream)
    for got, want in zip(torch.autograd.grad(compiled, inputs, upstream), wanted, strict=True):
        # In fp16 the eager way rounds hidden's gradient once more, before it is scaled.
        assert (got - want).float().norm() < (1e-6 if dtype == torch.float32 else 2e-3) * want.float().norm()


def test_no_kept_token_and_no_gradient() -> None:
    hidden, weight, _, targets = problem()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    loss = compiled(hidden, weight, torch.full_like(targets, -100), backend="torch")
    assert float(loss.detach()) == 0
    assert not any(grad.any() for grad in torch.autograd.grad(loss, (hidden, weight)))
    with torch.no_grad():
        assert not compiled(hidden, weight, targets, backend="torch").requires_grad


def test_weights_in_bf16_are_counted_in_fp32() -> None:
    hidden, weight, _, targets = problem()
    options: dict[str, Any] = {"token_weight": torch.linspace(0.1, 2, N).bfloat16().reshape(2, -1), "backend": "torch"}
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(hidden, weight, targets, **options), linear_cross_entropy(hidden, weight, targets, **options)
    )


def test_a_global_batch_without_kept_tokens_gives_zeros() -> None:
    hidden, weight, _, targets = problem()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    loss = compiled(hidden, weight, torch.full_like(targets, -100), denominator=torch.tensor(0), backend="torch")
    assert float(loss.detach()) == 0
    for gradient in torch.autograd.grad(loss, (hidden, weight)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_another_number_of_tokens_does_not_trip_it() -> None:
    hidden, weight, _, targets = problem()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (12, 7, 5):
        loss = compiled(hidden[:, :length], weight, targets[:, :length], backend="torch")
        expected = linear_cross_entropy(hidden[:, :length], weight, targets[:, :length], backend="torch")
        torch.testing.assert_close(loss, expected)


def test_the_operator_tells_the_compiler_the_truth() -> None:
    hidden, weight, bias, targets = problem()
    for deferred in (False, True):
        arguments = (
            *(hidden, weight, bias, targets, None, None, None, None),
            *([True, True, True, deferred, deferred, True, True, False], [0.1, 0.1, 3.0, 1.0, 1.0, 2.0], V, -100, None),
        )
        torch.library.opcheck(torch.ops.megafish.linear_cross_entropy, arguments)


def test_what_cannot_be_compiled_runs_beside_the_graph() -> None:
    hidden, weight, _, targets = problem()
    main_grad = torch.zeros(V, D)
    loss = torch.compile(linear_cross_entropy, backend="aot_eager")(hidden, weight, targets, main_grad=main_grad)
    loss.backward()
    assert weight.grad is None and main_grad.any()
