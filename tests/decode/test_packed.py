"""Matrices laid out for decoding: the same values, products against float64, the same texts."""

from __future__ import annotations

import pytest
import torch

from megafish.config import ModelConfig
from megafish.decode.generate import generate
from megafish.decode.packed import PackedLinear, can_pack, for_decoding
from megafish.model.transformer import Transformer

PROMPTS = [[1, 2, 3], [5] * 9, [7, 8], [4] * 20, [11]]
SHAPE = {"num_layers": 2, "hidden_size": 48, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 80}

pytestmark = pytest.mark.skipif(not can_pack(torch.zeros(1)), reason="no layout of its own on this machine")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 40, 7), (300, 7)])
@pytest.mark.parametrize("out", [1, 100])
def test_products(shape: tuple[int, ...], out: int, bias: bool, dtype: torch.dtype, tolerance: float) -> None:
    if not can_pack(torch.zeros(1, dtype=dtype)):
        pytest.skip(f"{dtype}: no layout of its own on this machine")
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(out, 7, generator=random).to(dtype)
    offset = torch.randn(out, generator=random).to(dtype) if bias else None
    x = torch.randn(shape, generator=random).to(dtype)
    layer = PackedLinear(weight, offset)
    assert torch.equal(layer.weight, weight)
    want = x.double() @ weight.double().T + (0 if offset is None else offset.double())
    got = layer(x)
    assert got.dtype == dtype and got.shape == (*shape[:-1], out)
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=10 * tolerance)


def test_no_layout_for_other_places() -> None:
    assert not can_pack(torch.zeros(1, dtype=torch.float64))
    assert not can_pack(torch.zeros(1, device="meta"))


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"qkv_bias": True, "mlp_bias": True}])
def test_the_model_stays_the_same(changes: dict) -> None:
    config = ModelConfig.model_validate({**SHAPE, "init_std": 0.3, **changes})
    model, other = (Transformer(config, 90, seed=1) for _ in range(2))
    with torch.no_grad():
        for each in (model, other):
            for name, parameter in each.named_parameters():
                if name.endswith("bias"):
                    parameter.fill_(0.1)
    given, other = other, for_decoding(other)
    for name, weight in model.named_parameters():
        path, _, own = name.rpartition(".")
        assert torch.equal(getattr(other.get_submodule(path), own), weight), name
        assert torch.equal(given.get_parameter(name), weight), name
    assert sum(isinstance(module, PackedLinear) for module in other.modules()) == 4 * 2 + 1
    assert (other.head.weight is other.embedding.weight) == config.tie_embeddings
    assert other.embedding.weight is given.embedding.weight and given.head.packed is None
    tokens = torch.tensor([PROMPTS[3]])
    with torch.no_grad():
        torch.testing.assert_close(other(tokens), model(tokens), rtol=1e-5, atol=1e-5)
        loss, want = (each(tokens, targets=tokens).loss for each in (other, model))
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
    assert generate(other, None, PROMPTS, max_new_tokens=10) == generate(model, None, PROMPTS, max_new_tokens=10)


def test_once_and_without_gradients() -> None:
    model = for_decoding(Transformer(ModelConfig.model_validate(SHAPE), 90))
    assert for_decoding(model) is model
    tokens = torch.tensor([PROMPTS[3]])
    with pytest.raises(RuntimeError, match="has no gradients"):
        model(tokens, targets=tokens)


def test_other_dtypes_are_left_as_they_are() -> None:
    model = Transformer(ModelConfig.model_validate(SHAPE), 90).double()
    assert for_decoding(model) is model and model.head.packed is None
