"""What is asked of DeepSpeed, and of the optimizer."""

from __future__ import annotations

import pytest
import torch

from megafish.config import load_config
from megafish.model.transformer import Transformer
from megafish.train.engine import deepspeed_config
from megafish.train.optim import build_optimizer

SHAPE = ["model={num_layers: 1, hidden_size: 32, num_heads: 2, intermediate_size: 48, qk_norm: true, qkv_bias: true}"]


@pytest.mark.parametrize(("decay_embeddings", "tied"), [(False, False), (True, False), (False, True)])
def test_decay_spares_norms_biases_and_embeddings(decay_embeddings: bool, tied: bool) -> None:
    config = load_config(
        "tiny", [*SHAPE, f"optimizer.decay_embeddings={decay_embeddings}", f"model.tie_embeddings={tied}"]
    )
    model = Transformer(config.model, 100)
    decay = {}
    for group in build_optimizer(model, config.optimizer).param_groups:
        decay |= dict.fromkeys(map(id, group["params"]), group["weight_decay"])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decay.keys() == names.keys()
    for key, name in names.items():
        embedding = name in ("embedding.weight", "head.weight")
        matrix = not any(part in name for part in ("norm", "bias"))
        expected = config.optimizer.weight_decay if (decay_embeddings if embedding else matrix) else 0.0
        assert decay[key] == expected, name


def test_decay_is_decoupled() -> None:
    """With zero gradients a decayed weight shrinks by lr * decay, whatever its moments."""
    config = load_config("tiny", [*SHAPE, "optimizer.weight_decay=0.5"])
    model = Transformer(config.model, 100)
    optimizer = build_optimizer(model, config.optimizer)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    weight = model.blocks[0].feed_forward.down.weight
    torch.testing.assert_close(
        weight.detach(), before["blocks.0.feed_forward.down.weight"] * (1 - config.optimizer.lr * 0.5)
    )
    torch.testing.assert_close(model.norm.weight.detach(), before["norm.weight"])


def test_batch_sizes_and_clipping_are_always_said() -> None:
    config = load_config(
        "tiny",
        ["train.global_batch_size=32", "train.micro_batch_size=4", "train.precision=bf16", "engine.zero_stage=2"],
    )
    made = deepspeed_config(config, world_size=2)
    assert made["gradient_accumulation_steps"] == 4
    assert made["gradient_clipping"] == 1.0
    assert made["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert made["communication_data_type"] == "fp32"
    assert made["data_types"] == {"grad_accum_dtype": "fp32"}
    assert deepspeed_config(load_config("tiny", ["optimizer.grad_clip=null"]), 1)["gradient_clipping"] == 0.0


def test_deepspeed_keys_are_merged_section_by_section() -> None:
    config = load_config(
        "tiny",
        ["engine={zero_stage: 2, deepspeed: {zero_optimization: {overlap_comm: true}, comms_logger: {enabled: true}}}"],
    )
    made = deepspeed_config(config, 1)
    assert made["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert made["comms_logger"] == {"enabled": True}
