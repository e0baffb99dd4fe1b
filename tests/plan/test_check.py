"""A run that cannot fit is refused before it starts; one that might is not."""

from __future__ import annotations

import pytest
import torch

from megafish.config import load_config
from megafish.errors import InputError
from megafish.plan.check import Room, check_fits, local_processes, refuse_if_too_large, room_here
from megafish.plan.layout import layout_of
from megafish.plan.memory import plan_memory

CPU = torch.device("cpu")


def test_refused_where_the_states_alone_are_too_large() -> None:
    """A trillion parameters: 18 bytes each are more than any machine's memory."""
    huge = "model={num_layers: 100, hidden_size: 32768, num_heads: 256, intermediate_size: 65536, vocab_size: 32000}"
    config = load_config("7b", [huge, "train.global_batch_size=2"])
    with pytest.raises(InputError, match="weights, optimizer and gradients alone") as caught:
        check_fits(config, 32000, 1, CPU)
    assert "\n" not in str(caught.value)


def test_what_fits_with_states_alone_is_not_refused() -> None:
    config = load_config("1b", ["train.micro_batch_size=128"])
    layout = layout_of(config, 8, "cuda")
    memory = plan_memory(config, 32000, layout)
    assert memory.total > memory.states.device
    refuse_if_too_large(memory, layout, Room(memory.states.device + 1, 0.0, "a GPU"))
    with pytest.raises(InputError, match="raise engine"):
        refuse_if_too_large(memory, layout, Room(memory.states.device - 1, 0.0, "a GPU"))


def test_offload_without_the_memory_is_refused() -> None:
    config = load_config(
        "1b", ["engine.zero_stage=3", "engine.deepspeed={zero_optimization: {offload_optimizer: {device: cpu}}}"]
    )
    layout = layout_of(config, 8, "cuda")
    memory = plan_memory(config, 32000, layout)
    refuse_if_too_large(memory, layout, Room(1e15, memory.host, "a GPU"))
    with pytest.raises(InputError, match="of main memory a process"):
        refuse_if_too_large(memory, layout, Room(1e15, memory.host - 1, "a GPU"))


@pytest.mark.parametrize(
    "keys", ["{zero_optimization: {offload_optimizer: {device: nvme}}}", "{bf16_master_weights: true}"]
)
def test_keys_that_change_the_states_switch_the_refusal_off(keys: str) -> None:
    huge = "model={num_layers: 100, hidden_size: 32768, num_heads: 256, intermediate_size: 65536, vocab_size: 32000}"
    config = load_config("7b", [huge, "train.global_batch_size=2", f"engine.deepspeed={keys}"])
    assert check_fits(config, 32000, 1, CPU).total > 1e13


def test_processes_share_main_memory() -> None:
    assert room_here(CPU, 4).device == pytest.approx(room_here(CPU, 1).device / 4)


def test_processes_of_a_node_are_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert local_processes(16) == 1
    for name, value in zip(reversed(names), ("8(x2),4", "6", "4"), strict=True):
        monkeypatch.setenv(name, value)
        assert local_processes(16) == int(value[0])
    assert local_processes(2) == 2
