"""How a configuration lies on a number of processes: all that decides what each of them holds and sends."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from megafish.config import Config, mesh_fault
from megafish.errors import InputError

Device = Literal["cpu", "cuda"]


class Degrees(NamedTuple):
    """Into how many parts the model's matrices, and its sequences, are cut."""

    tensor: int = 1
    sequence: int = 1


def degrees(config: Config) -> Degrees:
    """The configuration's tensor- and sequence-parallel degrees."""
    return Degrees(config.engine.tensor_parallel, config.engine.sequence_parallel)


class Offload(NamedTuple):
    """What lies in main memory between its uses."""

    optimizer: bool
    parameters: bool


def offload(config: Config) -> Offload:
    """What the configuration offloads. The one place that knows where it is set."""
    engine, zero = config.engine, config.engine.deepspeed.get("zero_optimization", {})
    return Offload(
        engine.offload_optimizer == "cpu" or _to_cpu(zero.get("offload_optimizer")),
        engine.offload_parameters == "cpu" or _to_cpu(zero.get("offload_param")),
    )


def searched_tensor_degrees(config: Config, most: int) -> list[int]:
    """The tensor-parallel degrees that a search tries on nodes of `most` GPUs: powers of two that stay within a node,
    and the one set."""
    return sorted({degrees(config).tensor, *(2**n for n in range(most.bit_length()) if most % 2**n == 0)})


@dataclass(frozen=True)
class Layout:
    """One way to run a configuration. Numbers of DeepSpeed's are elements, as in its configuration."""

    world: int
    micro_batch: int
    """Sequences in one forward pass."""
    micro_batches: int
    """Forward passes of a step."""
    stage: int
    bf16: bool
    tensor: int = 1
    sequence: int = 1
    checkpointing: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False
    device: Device = "cuda"
    reduce_bucket: int | None = None
    """None: megafish's own choice, as large as the model up to REDUCE_BUCKET."""
    overlap: bool = False
    """Whether ZeRO reduces gradients while the backward pass goes on."""
    persistence: int = 100_000
    """ZeRO-3 never lets go of parameters up to this size."""
    reuse_distance: int = 1_000_000_000
    """ZeRO-3 keeps a gathered parameter that is needed again within this many elements."""
    prefetch: int = 50_000_000
    sub_group: int = 1_000_000_000
    hpz: int = 1
    """Processes over which ZeRO++ keeps a second shard of the weights (hpZ); 1: none."""

    @property
    def itemsize(self) -> int:
        """Bytes of a weight and of an activation."""
        return 2 if self.bf16 else 4

    @property
    def shards(self) -> int:
        """Processes over which ZeRO shards: all with the same part of the matrices."""
        return self.world // self.tensor

    @property
    def replicas(self) -> int:
        """Processes, or groups of them, that read sequences of their own."""
        return self.world // (self.tensor * self.sequence)

    @property
    def name(self) -> str:
        """Short form for tables."""
        parts = [f"ZeRO-{self.stage}"]
        parts += [f"{short}{n}" for short, n in (("TP", self.tensor), ("SP", self.sequence)) if n > 1]
        parts += [word for word, on in (("offload", self.offload_optimizer), ("ckpt", self.checkpointing)) if on]
        return " ".join(parts)


# DeepSpeed's keys below zero_optimization that change what is held or sent, and ours for them.
_KEYS = {
    "reduce_bucket_size": "reduce_bucket",
    "overlap_comm": "overlap",
    "stage3_param_persistence_threshold": "persistence",
    "stage3_max_reuse_distance": "reuse_distance",
    "stage3_prefetch_bucket_size": "prefetch",
    "sub_group_size": "sub_group",
    "zero_hpz_partition_size": "hpz",
}
KNOWN_KEYS = {*_KEYS, "stage", "offload_optimizer", "offload_param"}
"""DeepSpeed's keys below zero_optimization that a plan takes into account."""


def layout_of(config: Config, world: int, device: Device) -> Layout:
    """The layout that the configuration asks for on `world` processes. Raises InputError where sizes do not divide."""
    tensor, sequence = degrees(config)
    zero: dict[str, Any] = config.engine.deepspeed.get("zero_optimization", {})
    stage, offloaded = config.engine.zero_stage, offload(config)
    layout = Layout(
        world=world,
        micro_batch=config.train.micro_batch_size,
        micro_batches=1,
        stage=stage,
        bf16=config.train.precision == "bf16",
        tensor=tensor,
        sequence=sequence,
        checkpointing=config.train.activation_checkpointing,
        offload_optimizer=offloaded.optimizer,
        offload_parameters=offloaded.parameters,
        device=device,
        overlap=stage == 3,
    )
    layout = replace(layout, **{ours: zero[key] for key, ours in _KEYS.items() if zero.get(key) is not None})
    fault = misfit(config, layout)
    if fault is not None:
        raise InputError(fault)
    return replace(layout, micro_batches=config.train.global_batch_size // (layout.micro_batch * layout.replicas))


def _to_cpu(section: Any) -> bool:
    return isinstance(section, dict) and section.get("device", "none") == "cpu"


def misfit(config: Config, layout: Layout) -> str | None:
    """Why this layout is impossible for this configuration, in one line; None where it is possible."""
    model, tensor, sequence = config.model, layout.tensor, layout.sequence
    if layout.world % (tensor * sequence):
        return (
            f"{layout.world} processes are not a multiple of tensor x sequence parallel = {tensor} x {sequence}: "
            "start another number of processes, or lower a degree"
        )
    fault = mesh_fault(config, tensor, sequence)
    if fault is not None:
        return fault
    if (model.vocab_size or 64) % tensor:  # null is rounded up to a multiple of 64
        return f"model.vocab_size={model.vocab_size} is not a multiple of engine.tensor_parallel={tensor}"
    if tensor > 1 and config.optimizer.name == "muon":
        return "Muon orthogonalizes whole matrices, which tensor parallelism would cut"
    share = layout.micro_batch * layout.replicas
    if config.train.global_batch_size % share:
        below = config.train.global_batch_size // share * share
        near = " or ".join(str(size) for size in (below, below + share) if size > 0)
        return (
            f"train.global_batch_size={config.train.global_batch_size} is not a multiple of train.micro_batch_size="
            f"{layout.micro_batch} x {layout.replicas} data-parallel processes = {share}: use {near}, or another "
            "micro-batch size"
        )
    if layout.hpz > 1 and tensor > 1:
        return "zero_hpz_partition_size does not go together with tensor parallelism"
    if layout.hpz > 1 and layout.shards % layout.hpz:
        return (
            f"engine.deepspeed.zero_optimization.zero_hpz_partition_size={layout.hpz} does not divide the "
            f"{layout.shards} data-parallel processes: take the GPUs of a node"
        )
    if layout.offload_parameters and layout.stage != 3:
        return "weights are offloaded by ZeRO-3 alone: set engine.zero_stage=3"
    if layout.offload_optimizer and layout.stage == 0:
        return "ZeRO-0 has no offload of the optimizer's state: set engine.zero_stage=1 or more"
    return None
