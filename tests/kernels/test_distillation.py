"""KL divergence between two heads against the formula in float64: value, gradient, chunks, excluded tokens."""

from __future__ import annotations

import math

import pytest
import torch

from megafish_kernels import linear_kl_divergence

ROWS, WIDTH, VOCAB = 23, 10, 57


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCAB + 7, WIDTH, dtype=dtype, requires_grad=True)  # the last rows are padding
    teacher_hidden, teacher_weight = torch.randn(ROWS, 6, dtype=dtype), torch.randn(VOCAB + 7, 6, dtype=dtype)
    return hidden, weight, teacher_hidden, teacher_weight, torch.randint(0, VOCAB, (ROWS,))


def formula(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    targets: torch.Tensor,
    penalty: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy and the teacher's entropy, one row and one token after another."""
    cross, entropy = [], []
    for row in range(ROWS):
        z = weight[:VOCAB].double() @ hidden[row].double()
        teacher = (teacher_weight[:VOCAB].double() @ teacher_hidden[row].double()).tolist()
        teacher[targets[row]] -= penalty
        top = max(teacher)
        total = sum(math.exp(x - top) for x in teacher)
        p = [math.exp(x - top) / total for x in teacher]
        log_q = z - z.logsumexp(0)
        cross.append(sum(-p[v] * log_q[v] for v in range(VOCAB)))
        entropy.append(-sum(x * math.log(x) for x in p if x > 0))
    return torch.stack(cross), torch.tensor(entropy, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("penalty", [0.0, 10.0, math.inf])
@pytest.mark.parametrize("logits_bytes", [1, 5 * 4 * VOCAB, 1 << 20])
def test_equals_the_formula(dtype: torch.dtype, penalty: float, logits_bytes: int) -> None:
    hidden, weight, *teacher, targets = inputs(dtype)
    divergence, entropy = linear_kl_divergence(
        hidden, weight, *teacher, targets=targets, penalty=penalty, vocab_size=VOCAB, logits_bytes=logits_bytes
    )
    upstream = torch.linspace(-1, 2, ROWS, dtype=torch.float64)
    grads = torch.autograd.grad((divergence * upstream).sum(), (hidden, weight))
    cross, expected = formula(hidden, weight, *teacher, targets, penalty)
    expected_grads = torch.autograd.grad((cross * upstream).sum(), (hidden, weight))
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(divergence.double() + entropy.double(), cross, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(entropy.double(), expected, rtol=tolerance, atol=tolerance)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        size = float(wanted.double().abs().max())
        torch.testing.assert_close(grad.double(), wanted.double(), rtol=tolerance, atol=tolerance * size)


def test_zero_between_equals() -> None:
    hidden, weight, *_ = inputs(torch.float64)
    divergence, _ = linear_kl_divergence(hidden, weight, hidden, weight, vocab_size=VOCAB)
    assert divergence.abs().max() < 1e-14
    grads = torch.autograd.grad(divergence.sum(), (hidden, weight))
    assert all(grad.abs().max() < 1e-14 for grad in grads)


def test_refuses_what_does_not_fit() -> None:
    hidden, weight, teacher_hidden, teacher_weight, targets = inputs(torch.float32)
    with pytest.raises(ValueError, match="same n"):
        linear_kl_divergence(hidden, weight, teacher_hidden[1:], teacher_weight)
    with pytest.raises(ValueError, match="does not fit a weight"):
        linear_kl_divergence(hidden, weight, teacher_hidden, weight)
    with pytest.raises(ValueError, match="give the targets"):
        linear_kl_divergence(hidden, weight, teacher_hidden, teacher_weight, penalty=1.0)
    with pytest.raises(ValueError, match="rows"):
        linear_kl_divergence(hidden, weight, teacher_hidden, teacher_weight, targets=targets[1:])


def test_each_row_has_its_penalty() -> None:
    hidden, weight, *teacher, targets = inputs(torch.float64)
    penalty = torch.tensor([0.0, 10.0, math.inf], dtype=torch.float64)[torch.arange(ROWS) % 3]
    mixed, _ = linear_kl_divergence(hidden, weight, *teacher, targets=targets, penalty=penalty, vocab_size=VOCAB)
    for value in (0.0, 10.0, math.inf):
        alone, _ = linear_kl_divergence(hidden, weight, *teacher, targets=targets, penalty=value, vocab_size=VOCAB)
        rows = penalty == value
        torch.testing.assert_close(mixed[rows], alone[rows], rtol=1e-12, atol=0)
