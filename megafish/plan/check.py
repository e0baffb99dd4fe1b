"""Before a run: does it fit the machine it starts on?

Refused is only what cannot fit: whose weights, masters, moments and gradients alone, counted exactly and without
activations or any allowance, are larger than the memory. All else is an estimate, and is said in the opening line.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from megafish.config import Config
from megafish.errors import InputError
from megafish.plan.hardware import GIB
from megafish.plan.layout import KNOWN_KEYS, Layout, layout_of
from megafish.plan.memory import MemoryPlan, plan_memory


@dataclass(frozen=True)
class Room:
    """What one process may use."""

    device: float
    """Bytes of its GPU; on a CPU its share of main memory."""
    host: float
    """Its share of main memory and swap."""
    words: str
    """The machine, as an error says it."""


def room_here(device: torch.device, local_processes: int) -> Room:
    """The memory of this machine, shared by the run's processes on it."""
    limits = [psutil.virtual_memory().total, *_container_limit()]
    host = (min(limits) + psutil.swap_memory().total) / local_processes
    if device.type == "cpu":
        shared = "" if local_processes == 1 else f" for each of {local_processes} processes"
        return Room(host, host, f"{host / GIB:.1f} GiB of main memory{shared}")
    total = float(torch.cuda.mem_get_info(device)[1])
    return Room(total, host, f"{total / GIB:.1f} GiB of {torch.cuda.get_device_name(device)}")


def _container_limit() -> list[int]:
    """The control group's limit of this container, if it has one."""
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return []
    return [int(text)] if text.isdigit() else []


def local_processes(world: int) -> int:
    """The run's processes on this machine, as far as the launcher says; else one, which refuses least."""
    # torchrun's name, the deepspeed launcher's, and Slurm's, which is a list of nodes: "8(x2),4".
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE"):
        if found := re.match(r"\d+", os.environ.get(name, "")):
            return min(world, int(found[0]))
    return 1


def check_fits(config: Config, vocab_size: int, world: int, device: torch.device) -> MemoryPlan:
    """The plan of this run's memory on this machine. Raises InputError where the states alone cannot fit."""
    layout = layout_of(config, world, "cpu" if device.type == "cpu" else "cuda")
    memory = plan_memory(config, vocab_size, layout, base=float(psutil.Process().memory_info().rss))
    if not _knows(config):
        return memory
    room = room_here(device, local_processes(world))
    refuse_if_too_large(memory, layout, room)
    return memory


def refuse_if_too_large(memory: MemoryPlan, layout: Layout, room: Room) -> None:
    """InputError with what to change where the states of a process are larger than its memory."""
    on_host = layout.device == "cpu"
    device = memory.states.device + (memory.host if on_host else 0.0)
    if device > room.device:
        raise InputError(
            f"ZeRO-{layout.stage} on {layout.world} processes needs {device / GIB:.1f} GiB a process for weights, "
            f"optimizer and gradients alone, and there are {room.words}: {_advice(layout)}"
        )
    if not on_host and memory.host > room.host:
        raise InputError(
            f"offload needs {memory.host / GIB:.1f} GiB of main memory a process, and there are "
            f"{room.host / GIB:.1f}: start fewer processes a node, or do without offload"
        )


def _advice(layout: Layout) -> str:
    if layout.stage < 3 and layout.shards > 1:
        return "raise engine.zero_stage, start more processes, or choose a smaller model"
    return "start more processes, or choose a smaller model (megafish plan says how many)"


def _knows(config: Config) -> bool:
    """Whether DeepSpeed's own keys leave the states as they are counted here: else nothing is refused."""
    zero = config.engine.deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict) or not set(zero) <= KNOWN_KEYS:
        return False
    offloads = [section for name in ("offload_optimizer", "offload_param") if (section := zero.get(name))]
    if any(section.get("device", "none") not in ("none", "cpu") for section in offloads):
        return False
    harmless = {"zero_optimization", "comms_logger", "wall_clock_breakdown", "flops_profiler", "steps_per_print"}
    return set(config.engine.deepspeed) <= harmless
