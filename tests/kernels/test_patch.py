"""Several targets a row against the formula, in float64 and with every option."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megafish_kernels import linear_cross_entropy, patch_cross_entropy

ROWS, WIDTH, VOCAB, SIZE = 37, 12, 70, 4


def inputs(dtype: torch.dtype, kept: float = 0.7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCAB + 6, WIDTH, dtype=dtype, requires_grad=True)  # the last rows are padding
    targets = torch.randint(0, VOCAB, (ROWS, SIZE))
    targets[torch.rand(ROWS, SIZE) >= kept] = -100
    targets[3] = -100  # a row without any
    targets[4] = 7  # the same token in every place
    return hidden, weight, targets


def formula(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    entropy_weight: tuple[float, float] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, plain cross-entropy, sum of weights), one target after another."""
    logits = (hidden.double() @ weight.double().T)[:, :VOCAB]
    lse = logits.logsumexp(1)
    probability = logits.softmax(1)
    entropy = -(probability * logits.log_softmax(1)).sum(1).detach()
    sigma, gamma = entropy_weight or (0.0, 0.0)
    focus = (sigma + entropy) ** gamma
    loss = plain = total = torch.zeros((), dtype=torch.float64)
    for row in range(ROWS):
        for target in targets[row].tolist():
            if target < 0:
                continue
            nats = lse[row] - logits[row, target]
            smooth = lse[row] - logits[row].mean()
            one = (1 - label_smoothing) * nats + label_smoothing * smooth + z_loss * lse[row] ** 2
            loss, plain, total = loss + focus[row] * one, plain + nats.detach(), total + focus[row]
    return loss, plain, total


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"z_loss": 1e-2},
        {"label_smoothing": 0.2},
        {"entropy_weight": (0.5, 1.5)},
        {"z_loss": 1e-2, "label_smoothing": 0.1, "entropy_weight": (1.0, 1.0)},
    ],
    ids=str,
)
def test_equals_the_sum_over_single_targets(options: dict[str, Any], dtype: torch.dtype) -> None:
    hidden, weight, targets = inputs(dtype)
    loss, plain, total = formula(hidden, weight, targets, **options)
    wanted = torch.autograd.grad(loss, (hidden, weight))
    got = patch_cross_entropy(hidden, weight, targets, vocab_size=VOCAB, **options)
    gradients = torch.autograd.grad(got.loss * 0.5, (hidden, weight))
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(got.loss.double(), loss, rtol=tolerance, atol=0)
    torch.testing.assert_close(got.cross_entropy.double(), plain, rtol=tolerance, atol=0)
    if got.weight is not None:
        torch.testing.assert_close(got.weight.double(), total, rtol=tolerance, atol=0)
    for ours, theirs in zip(gradients, wanted, strict=True):
        scale = float(theirs.double().abs().max())
        torch.testing.assert_close(ours.double() * 2, theirs.double(), rtol=tolerance, atol=tolerance * scale)
    assert (gradients[1][VOCAB:] == 0).all(), "padding has no gradient"


def test_one_target_a_row_is_the_plain_loss() -> None:
    hidden, weight, targets = inputs(torch.float64)
    column = targets[:, :1]
    got = patch_cross_entropy(hidden, weight, column, vocab_size=VOCAB)
    want = linear_cross_entropy(hidden, weight, column[:, 0], vocab_size=VOCAB, reduction="sum")
    torch.testing.assert_close(got.loss, want, rtol=1e-12, atol=1e-12)


def test_nothing_kept_is_zero_with_zero_gradients() -> None:
    hidden, weight, targets = inputs(torch.float32)
    got = patch_cross_entropy(hidden, weight, torch.full_like(targets, -100), vocab_size=VOCAB)
    gradients = torch.autograd.grad(got.loss, (hidden, weight))
    assert got.loss.item() == 0 and all((gradient == 0).all() for gradient in gradients)


def test_more_pairs_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = inputs(torch.float64)
    whole = patch_cross_entropy(hidden, weight, targets, vocab_size=VOCAB)
    monkeypatch.setattr("megafish_kernels.patch._PAIRS", 1)
    cut = patch_cross_entropy(hidden, weight[:VOCAB], targets, vocab_size=VOCAB)  # chunks of 14 rows
    torch.testing.assert_close(cut.loss, whole.loss)
    for ours, theirs in zip(
        torch.autograd.grad(cut.loss, (hidden, weight)), torch.autograd.grad(whole.loss, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(ROWS,), (ROWS + 1, SIZE), (1, ROWS, SIZE)])
def test_targets_of_another_shape_are_named(shape: tuple[int, ...]) -> None:
    hidden, weight, _ = inputs(torch.float32)
    with pytest.raises(ValueError, match="targets: expected"):
        patch_cross_entropy(hidden, weight, torch.zeros(shape, dtype=torch.long))
