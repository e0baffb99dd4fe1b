"""Hand-written backward passes against numerical derivatives and against torch's own operators."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from megafish.config import ModelConfig
from megafish.model.fused import rms_norm, rotary, swiglu
from megafish.model.rope import RotaryTable


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def angles(length: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    config = ModelConfig(num_layers=1, hidden_size=head_dim, num_heads=1, intermediate_size=8)
    cos, sin = RotaryTable(config).get(length, torch.device("cpu"))
    return cos[:, None], sin[:, None]


def test_rms_norm_gradients() -> None:
    x, weight = random(2, 3, 5).requires_grad_(), random(5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 0.1), (x, weight))


def test_rms_norm_equals_torch() -> None:
    x, weight = random(4, 7, 33), random(33, seed=1)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), F.rms_norm(x, (33,), weight, 1e-5))
    low = rms_norm(x.bfloat16(), weight.bfloat16(), 1e-5)
    assert low.dtype == torch.bfloat16
    want = F.rms_norm(x.bfloat16().double(), (33,), weight.bfloat16().double(), 1e-5)
    torch.testing.assert_close(low.double(), want, rtol=2**-8, atol=0.0)  # one rounding


def test_swiglu_gradients_and_value() -> None:
    x = random(2, 3, 8).requires_grad_()
    assert torch.autograd.gradcheck(swiglu, (x,))
    torch.testing.assert_close(swiglu(x), F.silu(x[..., :4]) * x[..., 4:])


def test_rotary_turns_pairs_by_position() -> None:
    """(1, 0) at position p becomes (cos p f, sin p f) in each pair (i, i + half), f = 10000^(-2 i / head_dim)."""
    cos, sin = angles(6, 8)
    x = torch.zeros(1, 6, 1, 8, dtype=torch.float64)
    x[..., :4] = 1.0
    turned = rotary(x, cos.double(), sin.double())[0, :, 0]
    angle = torch.arange(6.0, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(turned, torch.cat((angle.cos(), angle.sin()), 1), rtol=0, atol=1e-6)


def test_rotary_gradients() -> None:
    x = random(2, 3, 2, 4).requires_grad_()
    cos, sin = angles(3, 4)
    assert torch.autograd.gradcheck(lambda x: rotary(x, cos.double(), sin.double()), (x,))


def test_rotary_of_bf16_is_near_fp32() -> None:
    x = random(2, 300, 2, 16, dtype=torch.bfloat16)
    cos, sin = angles(300, 16)
    got = rotary(x, cos, sin)
    assert got.dtype == torch.bfloat16
    want = rotary(x.float(), cos, sin)
    # Four roundings of 2^-9: of the table, of both products and of the result.
    bound = 4 * 2**-9 * (x.float().abs() + x.float().roll(8, -1).abs())
    assert ((got.float() - want).abs() <= bound).all()
