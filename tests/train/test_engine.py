"""What is asked of DeepSpeed, and of the optimizer."""

from __future__ import annotations

import pytest
import torch

from megafish.config import load_config
from megafish.errors import InputError
from megafish.model.mesh import Axis, Mesh
from megafish.model.transformer import Transformer
from megafish.train.engine import Processes, _check_offload, check_deepspeed_keys, deepspeed_config
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


def test_buckets_fit_the_model_and_may_be_given() -> None:
    config = load_config("tiny", ["engine.zero_stage=2"])
    assert deepspeed_config(config, 1, parameters=5_000)["zero_optimization"]["reduce_bucket_size"] == 5_000
    assert deepspeed_config(config, 1, parameters=7 * 10**9)["zero_optimization"]["reduce_bucket_size"] == 200_000_000
    own = load_config("tiny", ["engine={zero_stage: 2, deepspeed: {zero_optimization: {reduce_bucket_size: 7}}}"])
    assert deepspeed_config(own, 1, parameters=5_000)["zero_optimization"]["reduce_bucket_size"] == 7


def test_offloading_is_asked_for_with_pinned_memory_on_a_gpu() -> None:
    config = load_config("tiny", ["engine={zero_stage: 3, offload_optimizer: cpu, offload_parameters: cpu}"])
    for device in ("cpu", "cuda"):
        made = deepspeed_config(config, 1, device)["zero_optimization"]
        assert made["offload_optimizer"] == made["offload_param"] == {"device": "cpu", "pin_memory": device == "cuda"}
    assert "offload_param" not in deepspeed_config(load_config("tiny"), 1)["zero_optimization"]


def test_offloading_more_than_the_node_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr("megafish.train.engine.available_memory", lambda: 8 * 10**9)
    processes = Processes(0, 0, 4, torch.device("cpu"), Mesh(data=Axis(0, 4), replicas=Axis(0, 4)))
    config = load_config("tiny", ["engine={zero_stage: 2, offload_optimizer: cpu}"])
    _check_offload(config, 10**9, 10**9, processes)  # 16 bytes a parameter, half of it on this node
    with pytest.raises(InputError, match=r"8\.8 GB of this node's memory are needed, 8\.0 GB are free"):
        _check_offload(config, 11 * 10**8, 11 * 10**8, processes)
    _check_offload(config, 11 * 10**8, 10**6, processes)  # adapters: what is frozen has no moments
    _check_offload(load_config("tiny"), 10**12, 10**12, processes)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("{zero_optimization: {overlap_com: true}}", "refused by DeepSpeed: overlap_com: Extra inputs"),
        ("{wall_clock_brakedown: true}", "no key wall_clock_brakedown"),
        ("{nebula: {enabled: false}}", "refused by DeepSpeed: Nebula"),
    ],
)
def test_keys_that_deepspeed_does_not_know_are_refused(keys: str, words: str) -> None:
    config = load_config("tiny", ["engine.zero_stage=2", f"engine.deepspeed={keys}"])
    with pytest.raises(InputError, match=words) as caught:
        check_deepspeed_keys(config, deepspeed_config(config, 1))
    assert "\n" not in str(caught.value)
    known = load_config("tiny", ["engine.deepspeed={wall_clock_breakdown: true, comms_logger: {enabled: true}}"])
    check_deepspeed_keys(known, deepspeed_config(known, 1))
