"""Adapters beside the matrices of a model: the sum, what is trained, what a seed decides."""

from __future__ import annotations

import pytest
import torch

from megafish.config import ModelConfig
from megafish.model.lora import LoRA, LowRankLinear, adapt, adapted_names, merged
from megafish.model.transformer import Transformer

SHAPE = ModelConfig(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, intermediate_size=48, qkv_bias=True)
LORA = LoRA(rank=3, alpha=6.0, seed=1)


def make(lora: LoRA | None = LORA, chosen: str = "") -> Transformer:
    model = Transformer(SHAPE, 64, seed=5)
    if lora is not None:
        adapt(model, lora, lambda name: chosen in name)
    return model


def test_an_adapted_model_is_the_plain_one_with_the_products_added() -> None:
    plain, model = make(None), make()
    tokens = torch.arange(20)[None]
    assert torch.equal(model(tokens), plain(tokens))  # the second factor begins at zero
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".up"):
                parameter.normal_(std=0.1)
    factors, start = dict(model.named_parameters()), dict(plain.named_parameters())
    names = adapted_names(model)
    assert len(names) == 8
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            weight = merged(name, lambda n: start[n].detach().clone(), factors.__getitem__, LORA, names)
            assert torch.equal(weight, parameter) == (name.removesuffix(".weight") not in names)
            parameter.copy_(weight)
    torch.testing.assert_close(model(tokens), plain(tokens), rtol=1e-4, atol=1e-5)


def test_nothing_but_the_factors_is_trained() -> None:
    model = make(chosen="blocks.1.feed_forward")
    assert adapted_names(model) == {"blocks.1.feed_forward.gate_up", "blocks.1.feed_forward.down"}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {
        f"blocks.1.feed_forward.{place}.{factor}" for place in ("gate_up", "down") for factor in ("up", "down")
    }
    model(torch.arange(10)[None]).sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained


def test_factors_depend_on_seed_and_name() -> None:
    def downs(model: Transformer) -> list[torch.Tensor]:
        return [module.down for module in model.modules() if isinstance(module, LowRankLinear)]

    first, again, other = downs(make()), downs(make()), downs(make(LoRA(3, 6.0, seed=2)))
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)
    assert not torch.equal(first[0], first[1][:, : first[0].shape[1]])
    assert float(first[0].detach().std()) == pytest.approx(32**-0.5, rel=0.2)
