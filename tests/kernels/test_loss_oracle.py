"""The linear cross-entropy against the float64 oracle over generated shapes and combinations of features."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megafish_kernels import linear_cross_entropy
from megafish_kernels.reference import reference_linear_cross_entropy
from megafish_kernels.rows import KeptRows, compact_rows
from megafish_kernels.tiles import LossTiles, Tile, override

TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3}


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape and a combination of features."""

    tokens: int = 9
    width: int = 8
    vocab: int = 11
    padding: int = 0
    dropped: float = 0.3
    half: bool = False
    reduction: str = "mean"
    bias: bool = False
    weighted: bool = False
    z_loss: float = 0.0
    smoothing: float = 0.0
    entropy: tuple[float, float] | None = None
    softcap: float | None = None
    scale: float = 1.0
    denominator: bool = False
    logits_bytes: int | None = None
    rows: str = "none"
    """How the kept rows are given: none (by ignored targets), drop, device (KeptRows), host (KeptRows with an int)."""
    strided: bool = False
    unaligned: bool = False
    tile: int = 16
    seed: int = 0


# Not narrower: where a gradient is one or two numbers, the rows' parts of it may cancel, and then its own size says
# nothing of the size of what was added. The smallest shapes are among the corners.
CASES = st.builds(
    Case,
    tokens=st.integers(0, 30),
    width=st.integers(6, 36),
    vocab=st.integers(6, 50),
    padding=st.integers(0, 9),
    dropped=st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]),
    half=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    bias=st.booleans(),
    weighted=st.booleans(),
    z_loss=st.sampled_from([0.0, 1e-2]),
    smoothing=st.sampled_from([0.0, 0.1]),
    entropy=st.sampled_from([None, None, (1.0, 1.0), (0.25, 2.5)]),
    softcap=st.sampled_from([None, 4.0]),
    scale=st.sampled_from([1.0, 0.6]),
    denominator=st.booleans(),
    logits_bytes=st.sampled_from([None, 1, 6000]),
    rows=st.sampled_from(["none", "drop", "device", "host"]),
    strided=st.booleans(),
    unaligned=st.booleans(),
    tile=st.sampled_from([32, 32, 16]),
    seed=st.integers(0, 2**20),
)
CORNERS = [
    Case(tokens=0),
    Case(dropped=1.0),
    Case(dropped=1.0, weighted=True, rows="host", reduction="sum"),
    Case(tokens=1, dropped=0.0),
    Case(tokens=40, dropped=0.97, seed=5),
    Case(vocab=1),
    Case(width=1, vocab=2, tokens=1, dropped=0.0),
    Case(width=1, half=True, seed=1),
    Case(vocab=17, padding=15, width=33, tokens=17),
    Case(vocab=79, width=40, tokens=40, half=True, z_loss=1e-2, smoothing=0.1, softcap=4.0, scale=0.6, bias=True),
    Case(vocab=1, entropy=(1.0, 1.0)),
    Case(vocab=79, width=40, tokens=40, z_loss=1e-2, smoothing=0.1, softcap=4.0, weighted=True, entropy=(1.0, 5.0)),
]


def relative(got: Tensor, want: Tensor, floor: float) -> float:
    return float((got.double() - want.double()).norm() / max(float(want.double().norm()), floor))


def check(case: Case, backend: Any, device: torch.device) -> None:
    dtype = torch.float16 if case.half else torch.float32
    g = torch.Generator().manual_seed(case.seed)

    def leaf(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * std).to(dtype).to(device).requires_grad_()

    rows = case.vocab + case.padding
    hidden = leaf(case.tokens, case.width * (2 if case.strided else 1))
    weight, bias = leaf(rows, case.width, std=case.width**-0.5), leaf(rows) if case.bias else None
    targets = torch.randint(0, case.vocab, (case.tokens + 1,), generator=g)
    lost = torch.rand(case.tokens + 1, generator=g) < case.dropped
    token_weight = torch.rand(case.tokens, generator=g) * (torch.rand(case.tokens, generator=g) > 0.2)
    # A slice that begins in the middle of 16 bytes.
    at = slice(1, None) if case.unaligned else slice(0, case.tokens)
    targets, lost = targets.to(device)[at], lost.to(device)[at]
    ignored = targets.masked_fill(lost, -100)

    options: dict[str, Any] = {
        "reduction": case.reduction,
        "bias": bias,
        "token_weight": token_weight.to(device) if case.weighted else None,
        "z_loss": case.z_loss,
        "label_smoothing": case.smoothing,
        "entropy_weight": case.entropy,
        "softcap": case.softcap,
        "logit_scale": case.scale,
        "vocab_size": case.vocab,
    }
    if case.denominator and case.reduction == "mean":
        options["denominator"] = torch.tensor(7.5)
    kept = ~lost if not case.weighted else ~lost & (options["token_weight"] != 0)
    given_rows: dict[str, Any] = {"none": {}, "drop": {"drop": lost}}.get(case.rows, {})
    if case.rows == "device":
        given_rows = {"rows": compact_rows(kept)}
    elif case.rows == "host":
        index = kept.nonzero()[:, 0].int()
        given_rows = {"rows": KeptRows(index, index.shape[0])}

    taken = hidden[:, ::2] if case.strided else hidden
    expected, facts = reference_linear_cross_entropy(taken, weight, ignored, **options)
    # Like a loss scale, so that no gradient in fp16 is subnormal.
    upstream = torch.linspace(-64.0, 128.0, case.tokens) if case.reduction == "none" else torch.tensor(64.0)
    inputs = [hidden, weight, *([bias] if bias is not None else [])]
    wanted = torch.autograd.grad(expected, inputs, upstream.double().to(device))
    tile = Tile(case.tile, case.tile, case.tile, 1, 1)
    with override(LossTiles(tile, tile, tile)):
        loss, stats = linear_cross_entropy(
            taken,
            weight,
            ignored if case.rows == "none" else targets,
            backend=backend,
            logits_bytes=case.logits_bytes,
            return_stats=True,
            **given_rows,
            **options,
        )
        got = torch.autograd.grad(loss, inputs, upstream.to(device))
    bound = TOLERANCE[dtype]
    assert relative(loss.detach(), expected.detach(), 0.1) < bound
    for gradient, want in zip(got, wanted, strict=True):
        assert gradient.dtype == dtype
        assert relative(gradient, want, 0.1) < bound
    for name in ("lse", "entropy", "cross_entropy"):
        assert relative(getattr(stats, name), facts[name], 1.0) < bound
    logits_may_tie = case.half and backend == "torch"  # they are rounded to fp16 between the products
    assert stats.correct is not None
    assert logits_may_tie or torch.equal(stats.correct, facts["correct"])


def test_torch_over_generated_cases() -> None:
    @settings(max_examples=400, deadline=None, derandomize=True, database=None)
    @given(CASES)
    def run(case: Case) -> None:
        check(case, "torch", torch.device("cpu"))

    for corner in CORNERS:
        run = example(corner)(run)
    run()


def test_triton_over_generated_cases(triton_device: torch.device) -> None:
    @settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @given(CASES)
    def run(case: Case) -> None:
        check(case, "triton", triton_device)

    for corner in CORNERS:
        run = example(corner)(run)
    run()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_vocabulary_beyond_a_quarter_of_a_million(backend: Any, triton_device: torch.device) -> None:
    device = triton_device if backend == "triton" else torch.device("cpu")
    g = torch.Generator().manual_seed(0)
    vocab = 262_149
    hidden = torch.randn(3, 64, generator=g).to(device).requires_grad_()
    weight = (torch.randn(vocab, 64, generator=g) * 0.125).to(device).requires_grad_()
    targets = torch.tensor([vocab - 1, -100, 131_072], device=device)
    expected, facts = reference_linear_cross_entropy(hidden, weight, targets, label_smoothing=0.1)
    wanted = torch.autograd.grad(expected, (hidden, weight))
    # The interpreter takes its time for every tile: few and wide ones, of which none would fit a GPU.
    wide = LossTiles(Tile(16, 16384, 64, 4, 1), Tile(16, 16384, 64, 4, 1), Tile(512, 64, 128, 4, 1))
    with override(wide) if device.type == "cpu" else nullcontext():
        loss, stats = linear_cross_entropy(
            hidden, weight, targets, label_smoothing=0.1, backend=backend, return_stats=True
        )
        got = torch.autograd.grad(loss, (hidden, weight))
    assert relative(loss.detach(), expected.detach(), 0.1) < 5e-6
    for gradient, want in zip(got, wanted, strict=True):
        assert relative(gradient, want, 1e-6) < 5e-6
    assert relative(stats.entropy, facts["entropy"], 1.0) < 5e-6
