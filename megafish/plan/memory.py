"""Peak memory of one process: the highest of four moments of a training step.

    forward    the end of a forward pass: everything that autograd keeps, and the loss's workspace
    backward   the last block's backward pass: the first gradients, and the bucket in which they are sent
    reduction  gradients are summed over processes: DeepSpeed's copies of a bucket, activations as far as they are left
    update     the optimizer's step: no activations, a copy of the gradients in one piece

States (weights, masters, moments) are there at all four.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from megafish.config import Config
from megafish.config_deepspeed import REDUCE_BUCKET
from megafish.plan.activations import Activations, activations_of
from megafish.plan.hardware import GIB
from megafish.plan.layout import Layout
from megafish.plan.states import Parameters, States, block_shapes, parameters_of, states_of
from megafish.run import RunDir

FP32 = 4
CUDA_RUNTIME = 0.75 * GIB
"""CUDA context, loaded kernels and cuBLAS's workspace: 0.5 to 1 GiB on the GPUs of the table (an assumption)."""
NCCL_RUNTIME = 0.75 * GIB
"""NCCL's channels and their buffers where there is more than one process (an assumption)."""
CPU_LIBRARIES = 170 * 2**20
"""What DeepSpeed and torch import when the first engine is made and steps (measured: benchmarks/plan_memory.py)."""
ZERO3_ARENAS = 96 * 2**20
"""What glibc's arenas of other threads keep on a CPU at ZeRO-3, which gathers weights in the main thread and in
autograd's (measured: with MALLOC_ARENA_MAX=1 the peaks of benchmarks/plan_memory.py are 50 to 130 MiB lower)."""
FRAGMENTATION = 0.05
"""Of what is allocated: gaps that torch's allocators cannot use (an assumption on CUDA)."""

PARTS = (
    "parameters",
    "masters",
    "moments",
    "premature",
    "gradients",
    "activations",
    "head",
    "gathered",
    "buckets",
    "copies",
    "runtime",
    "fragmentation",
)
"""In the order in which they are printed."""


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of the process that holds most, in bytes."""

    moment: str
    """When the peak is reached."""
    parts: dict[str, float] = field(hash=False)
    """What is there at that moment, by name (PARTS)."""
    states: States
    """Weights, masters, moments and gradients after the last backward pass of a step."""

    @property
    def total(self) -> float:
        """Peak on the device."""
        return sum(self.parts.values())

    @property
    def host(self) -> float:
        """What is offloaded to main memory."""
        return self.states.host


def plan_memory(
    config: Config, vocab_size: int, layout: Layout, *, kept_fraction: float | None = None, base: float = 0.0
) -> MemoryPlan:
    """Peak memory of a process. `kept_fraction` of the targets are supervised (default: by goldfish.k; only a CPU's
    activations depend on it). `base`: bytes that the process takes before the model is there (interpreter, libraries);
    on CUDA the runtime's allowance is added by itself."""
    if kept_fraction is None:
        kept_fraction = kept_share(config)
    parameters = parameters_of(config, vocab_size, layout.tensor)
    states = states_of(parameters, layout)
    acts = activations_of(config, vocab_size, layout, kept_fraction)
    always = {"parameters": states.parameters, "masters": states.masters, "moments": states.moments}
    always["premature"] = _premature(config, vocab_size, layout)
    moments = {
        "forward": _forward(parameters, states, acts, layout),
        "backward": _backward(parameters, states, acts, layout),
        "reduction": _reduction(config, parameters, states, acts, layout),
        "update": _update(parameters, states, layout),
    }
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    found = moments[moment]
    if layout.device == "cpu":
        # The allocator keeps what is freed for the same kind of allocation (train/host.py): the highest of each counts.
        found = {name: max(each.get(name, 0.0) for each in moments.values()) for name in PARTS}
    parts = dict.fromkeys(PARTS, 0.0) | found | always
    parts["fragmentation"] = FRAGMENTATION * sum(parts.values())
    parts["runtime"] = base
    if layout.device == "cuda":
        parts["runtime"] += CUDA_RUNTIME + (NCCL_RUNTIME if layout.world > 1 else 0.0)
    else:
        parts["runtime"] += CPU_LIBRARIES + (ZERO3_ARENAS if layout.stage == 3 else 0)
        parts["moments"] += states.host  # a CPU's device is main memory
        parts["copies"] = _copies(config, parameters, layout)
    return MemoryPlan(moment, parts, states)


def _copies(config: Config, parameters: Parameters, layout: Layout) -> float:
    """Main memory for fp32 weights and moments on their way into a checkpoint that is written beside the training."""
    if not config.checkpoint.asynchronous or config.checkpoint.interval is None:
        return 0.0
    return (FP32 + parameters.moment_bytes) * parameters.total / layout.shards


def _premature(config: Config, vocab_size: int, layout: Layout) -> float:
    """Weights of the model that `contrast.premature` names: frozen, and cut at ZeRO-3 alone, block by block. Where its
    run is not on this machine it is taken to be of the shape of the model in training, which it is a checkpoint of."""
    if config.contrast.premature is None:
        return 0.0
    path = Path(config.contrast.premature)
    run = RunDir(path.parents[1] if path.parent.name == "checkpoints" else path)
    shape = run.load_config().model if run.config_file.is_file() else config.model
    per_block = sum(prod(each) for each in block_shapes(shape, layout.tensor).values())
    whole = parameters_of(config.model_copy(update={"model": shape}), vocab_size, layout.tensor).total
    if layout.stage != 3 or layout.shards == 1:
        return float(layout.itemsize * whole)
    blocks = per_block * shape.num_layers
    gathered = min(2, shape.num_layers) * per_block  # the one that computes, and the next one
    return float(layout.itemsize * (whole - blocks + blocks / layout.shards + gathered))


def kept_share(config: Config) -> float:
    """Share of the targets that goldfish.k keeps (sources with a k of their own are not looked at)."""
    return 1.0 if config.goldfish.k is None else 1 - 1 / config.goldfish.k


def _kept_between(parameters: Parameters, states: States, layout: Layout) -> float:
    """Gradients that are there while a forward pass runs: those of the micro-batches before it."""
    if layout.stage == 3 or (layout.stage == 1 and layout.bf16) or layout.offload_optimizer:
        return states.gradients
    if layout.micro_batches == 1:
        return 0.0
    return states.gradients if layout.stage == 2 else FP32 * parameters.total


def _bucket_numbers(parameters: Parameters, layout: Layout) -> int:
    """Gradients that are sent at one time, at most."""
    if layout.reduce_bucket is not None:
        return layout.reduce_bucket
    # ZeRO-0 leaves it to DeepSpeed.
    return min(parameters.total, REDUCE_BUCKET) if layout.stage else 500_000_000


def _bucket(parameters: Parameters, layout: Layout) -> float:
    """The flat buffer in which gradients are sent. On CUDA DeepSpeed takes all of it, on a CPU what is written to
    counts. ZeRO-0, and ZeRO-1 in bf16, have none."""
    if layout.stage == 0 or (layout.stage == 1 and layout.bf16 and not layout.offload_optimizer):
        return 0.0
    size = FP32 if layout.stage in (1, 3) or not layout.bf16 else 2
    numbers = _bucket_numbers(parameters, layout)
    if layout.device == "cpu":
        numbers = min(parameters.total, numbers)
    buffers = 2 if layout.overlap and layout.stage < 3 else 1
    return float(size * numbers * buffers)


def _gathered(parameters: Parameters, layout: Layout) -> float:
    """Weights that ZeRO-3 holds whole at the end of a forward pass: those near enough to their use in the backward
    pass (its distance is twice what lies behind it), what is fetched ahead, and the largest parameter."""
    if layout.stage != 3:
        return 0.0
    numbers = layout.reuse_distance // 2 + layout.prefetch + parameters.largest
    return float(layout.itemsize * min(parameters.total, numbers))


def _forward(parameters: Parameters, states: States, acts: Activations, layout: Layout) -> dict[str, float]:
    keeps_bucket = layout.stage == 3 or (layout.stage == 1 and layout.micro_batches > 1)
    cuda = layout.device == "cuda"
    return {
        "gradients": _kept_between(parameters, states, layout),
        "activations": acts.blocks,
        "head": acts.head,
        "gathered": _gathered(parameters, layout),
        "buckets": _bucket(parameters, layout) if cuda and keeps_bucket else 0.0,
    }


def _backward(parameters: Parameters, states: States, acts: Activations, layout: Layout) -> dict[str, float]:
    head_weight = layout.itemsize * max(parameters.kept[-1], parameters.decayed[-1])
    fresh = 0.0 if layout.stage == 1 and layout.bf16 else float(head_weight)
    return {
        "gradients": _kept_between(parameters, states, layout) + fresh,
        "activations": acts.blocks + acts.backward,
        "gathered": _gathered(parameters, layout),
        "buckets": _bucket(parameters, layout) if layout.device == "cuda" else 0.0,
    }


def _reduction(
    config: Config, parameters: Parameters, states: States, acts: Activations, layout: Layout
) -> dict[str, float]:
    total, bucket = parameters.total, _bucket(parameters, layout)
    room = _bucket_numbers(parameters, layout)
    sent = min(total, room)
    gradients, copies, left = states.gradients, 0.0, 0.0
    if layout.stage == 0:
        copies = FP32 * sent
    elif layout.stage == 1 and layout.bf16:
        # The two groups' flat gradients are sent as one where the first leaves room for the second.
        first = sum(parameters.groups[0])
        copies = FP32 * (total if len(parameters.groups) > 1 and first <= room else 0)
    else:
        left = max(0.0, 1 - room / total) if layout.stage > 1 else 0.0
        if layout.stage == 1:
            # Each gradient moves into the bucket; on CUDA the bucket is there before the first has moved.
            gradients += FP32 * total if layout.device == "cuda" else FP32 * max(0, total - sent)
        if layout.shards > 1 or layout.stage == 3:
            copies = FP32 * sent
        if layout.stage == 2 and layout.bf16:
            copies = (2 + FP32) * sent
        if layout.stage == 2 and not layout.bf16 and layout.micro_batches > 1:
            gradients *= 2
    if layout.device == "cpu" and layout.shards > 1:
        # gloo sums a clone where it scatters, and needs a part of the tensor's size where it does not.
        copies += FP32 * sent / (1 if layout.stage == 3 else layout.shards)
    if left and config.model.tie_embeddings:
        # Autograd holds the head's gradient until the embedding's comes, which is last.
        gradients += layout.itemsize * max(parameters.kept[-1], parameters.decayed[-1])
    return {
        "gradients": gradients,
        "activations": left * acts.blocks,
        "gathered": _gathered(parameters, layout) if left else 0.0,
        "buckets": bucket + copies,
    }


def _update(parameters: Parameters, states: States, layout: Layout) -> dict[str, float]:
    copies = 0.0
    if not layout.offload_optimizer and layout.stage == 3:
        parts = [sum(-(-size // layout.shards) for size in group) for group in parameters.groups]
        copies = FP32 * min(max(parts), layout.sub_group)
    elif not layout.offload_optimizer and layout.stage in (1, 2) and not layout.bf16:
        copies = FP32 * max(sum(group) for group in parameters.groups) / layout.shards
    bucket = _bucket(parameters, layout) if layout.stage == 3 else 0.0
    return {"gradients": states.gradients, "buckets": copies + bucket}
