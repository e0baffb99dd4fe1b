"""Where DeepSpeed keeps the fp32 weight of each parameter and what the optimizer knows of it, at every ZeRO stage.

DeepSpeed lays parameters end to end in flat buffers and gives each process a part of each. A `FlatBuffer` is such a
part with the ranges of parameters that lie in it. This file knows the attributes of DeepSpeed's optimizers; it does not
import DeepSpeed.

| stage | precision | DeepSpeed's optimizer | buffers of a process |
|---|---|---|---|
| 0 | fp32 | torch's own | the parameters |
| 1 | bf16 | BF16_Optimizer | its part of each parameter group |
| 1, 2 | any | DeepSpeedZeroOptimizer | its part of each parameter group |
| 3 | any | DeepSpeedZeroOptimizer_Stage3 | the parts of every parameter in a sub-group |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megafish.errors import InputError
from megafish.model.shard import shard_of
from megafish.train.state import MASTER, Piece, Scalar, StateReader


@dataclass(frozen=True)
class Span:
    """Elements begin ... end - 1 of a flattened parameter, which lie in a buffer from `at` on."""

    parameter: nn.Parameter
    begin: int
    end: int
    at: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The elements in a tensor that is laid out as the buffer."""
        return flat.view(-1)[self.at : self.at + self.end - self.begin]

    def share(self, rank: int, size: int) -> Span | None:
        """Part `rank` of `size` about equal parts; None where nothing is left for it."""
        count = self.end - self.begin
        low, high = count * rank // size, count * (rank + 1) // size
        return Span(self.parameter, self.begin + low, self.begin + high, self.at + low) if low < high else None


@dataclass(frozen=True)
class FlatBuffer:
    """fp32 weights of this process, as the optimizer sees them."""

    master: torch.Tensor
    spans: list[Span]
    group: dict[str, Any]
    """The optimizer's parameter group that it belongs to."""
    optimizer: torch.optim.Optimizer
    replicated: bool = False
    """Whether every data-parallel process has the same buffer."""

    @property
    def kept(self) -> dict[str, Any]:
        """What the optimizer keeps of it; empty before its first step."""
        return self.optimizer.state.get(self.master, {})

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fp32 weights, and the optimizer's tensors of one number an element."""
        found = {MASTER: self.master.detach()}
        for key, value in self.kept.items():
            if torch.is_tensor(value) and value.ndim:
                assert value.numel() == self.master.numel(), (key, value.shape, self.master.shape)
                found[key] = value
        return found

    def scalars(self) -> dict[str, Scalar]:
        """The optimizer's single numbers."""
        return {
            key: Scalar(float(value), torch.is_tensor(value))
            for key, value in self.kept.items()
            if not (torch.is_tensor(value) and value.ndim)
        }

    def set_scalar(self, key: str, scalar: Scalar) -> None:
        """Give the optimizer a single number, in the form in which it keeps it (as torch's load_state_dict)."""
        value: Any = scalar.value if scalar.value % 1 else int(scalar.value)
        if scalar.is_tensor:
            on_device = self.group.get("fused") or self.group.get("capturable")
            value = torch.tensor(scalar.value, dtype=torch.float32, device=self.master.device if on_device else "cpu")
        self.optimizer.state[self.master][key] = value

    def make_tensor(self, key: str, dtype: torch.dtype) -> torch.Tensor:
        """The optimizer's tensor of that name, made of zeros when it has none yet."""
        kept = self.optimizer.state[self.master]
        if key not in kept:
            kept[key] = torch.zeros_like(self.master, dtype=dtype, requires_grad=False)
        return kept[key]


def flat_buffers(optimizer: Any) -> list[FlatBuffer]:
    """The buffers of this process; `optimizer` is what deepspeed.initialize returns."""
    if hasattr(optimizer, "fp16_groups"):
        return list(_stage_3(optimizer))
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return list(_stage_1_and_2(optimizer))
    if hasattr(optimizer, "fp32_groups_flat_partition"):
        return list(_stage_1_bf16(optimizer))
    return [
        FlatBuffer(parameter, [Span(parameter, 0, parameter.numel(), 0)], group, optimizer, replicated=True)
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]


@torch.no_grad()
def reset_state(buffers: list[FlatBuffer]) -> None:
    """Zero all that the optimizer keeps of the buffers; the weights stay."""
    for buffer in buffers:
        kept = buffer.kept
        for key, value in kept.items():
            if torch.is_tensor(value):
                value.zero_()
            else:
                kept[key] = 0


def scale_gradients(optimizer: Any, factor: float) -> None:
    """Multiply the gradients that the next step will take, between the last backward pass and that step.

    `optimizer`: as for flat_buffers. Each process has what it updates.
    """
    if hasattr(optimizer, "fp32_groups_gradients_flat"):
        gradients = list(optimizer.fp32_groups_gradients_flat)
    elif hasattr(optimizer, "averaged_gradients"):
        if hasattr(optimizer, "fp16_groups"):
            buffers, offloaded = optimizer.fp32_partitioned_groups_flat, optimizer.offload_optimizer
        else:
            buffers, offloaded = optimizer.single_partition_of_fp32_groups, optimizer.cpu_offload
        if offloaded:
            gradients = [buffer.grad for buffer in buffers]
            # From which DeepSpeed makes the global norm then.
            norms = optimizer.norm_for_param_grads
            norms.update({key: norm * factor for key, norm in norms.items()})
        else:
            gradients = [gradient for group in optimizer.averaged_gradients.values() for gradient in group or ()]
    else:
        gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
    for gradient in gradients:
        if gradient is not None:
            gradient.mul_(factor)


def refresh_weights(optimizer: Any) -> None:
    """Make the weights that the model computes with from the fp32 ones. Collective."""
    if hasattr(optimizer, "fp16_groups"):
        optimizer.checkpoint_event_prologue()  # partitions what is gathered
        for number in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        optimizer.checkpoint_event_epilogue()  # gathers again what stays gathered
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()


def owned_pieces(
    buffers: list[FlatBuffer], names: dict[nn.Parameter, str], tensor_rank: int, replica: tuple[int, int]
) -> list[Piece]:
    """What this process is to store, as views: everything is stored by exactly one process.

    `names`: of the parameters in the model. `tensor_rank`: place among the tensor-parallel processes; the first stores
    what all of them hold whole. `replica`: (rank, number) among the processes that share one copy of the model's
    state, or each have one.
    """
    found = []
    for buffer in buffers:
        tensors, scalars = buffer.tensors(), buffer.scalars()
        for whole in buffer.spans:
            span = whole.share(*replica) if buffer.replicated else whole
            shard = shard_of(whole.parameter)
            if span is not None and (shard is not None or tensor_rank == 0):
                states = {state: span.of(tensor) for state, tensor in tensors.items()}
                shape = full_shape(span.parameter)
                found.append(Piece(names[span.parameter], shape, shard, span.begin, span.end, states, scalars))
    return found


@torch.no_grad()
def fill_buffers(buffers: list[FlatBuffer], names: dict[nn.Parameter, str], reader: StateReader) -> None:
    """Read weights and optimizer state into this process's buffers. Raises InputError for what does not fit."""
    for buffer in buffers:
        members = [names[span.parameter] for span in buffer.spans]
        for name in members[1:]:
            if (reader.states(name), reader.scalars(name)) != (reader.states(members[0]), reader.scalars(members[0])):
                raise InputError(
                    f"{reader.folder}: the optimizer keeps other state of {name} than of {members[0]}, which now share "
                    "one group: the checkpoint was written with another optimizer or other groups"
                )
        for span, name in zip(buffer.spans, members, strict=True):
            for state in reader.states(name):
                stored = reader.read(name, state, shard_of(span.parameter), span.begin, span.end)
                target = buffer.master.detach() if state == MASTER else buffer.make_tensor(state, stored.dtype)
                span.of(target).copy_(stored)
        for key, scalar in reader.scalars(members[0]).items() if members else ():
            buffer.set_scalar(key, scalar)


@torch.no_grad()
def extrapolate(
    buffers: list[FlatBuffer], names: dict[nn.Parameter, str], start: Callable[[str], torch.Tensor], factor: float
) -> None:
    """Replace the weights w of this process's buffers by start - factor * (w - start)."""
    for buffer in buffers:
        for span in buffer.spans:
            shard = shard_of(span.parameter)
            known = start(names[span.parameter])
            known = known if shard is None else shard.take(known)
            own = span.of(buffer.master.detach())
            base = known.reshape(-1)[span.begin : span.end].to(own)
            own.copy_(base - factor * (own - base))


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of a parameter that ZeRO-3 may have partitioned, or tensor parallelism cut."""
    shard = shard_of(parameter)
    return shard.full_shape if shard is not None else tuple(getattr(parameter, "ds_shape", parameter.shape))


def _stage_1_and_2(zero: Any) -> Iterator[FlatBuffer]:
    for number, master in enumerate(zero.single_partition_of_fp32_groups):
        # With round_robin_gradients the parameters lie in another order than in their group, which DeepSpeed's own
        # `_hp_mapping` does not follow.
        parameters = zero.round_robin_bit16_groups[number]
        places = list(zip(parameters, zero.round_robin_bit16_offsets[number], strict=True))
        rank = dist.get_rank(zero.real_dp_process_group[number])
        yield FlatBuffer(
            master, _spans(places, rank, master.numel()), zero.optimizer.param_groups[number], zero.optimizer
        )


def _stage_1_bf16(zero: Any) -> Iterator[FlatBuffer]:
    for number, master in enumerate(zero.fp32_groups_flat_partition):
        places, at = [], 0
        for parameter in zero.bf16_groups[number]:
            places.append((parameter, at))
            at += parameter.numel()
        rank = dist.get_rank(zero.real_dp_process_group[number])
        yield FlatBuffer(
            master, _spans(places, rank, master.numel()), zero.optimizer.param_groups[number], zero.optimizer
        )


def _spans(places: list[tuple[nn.Parameter, int]], rank: int, size: int) -> list[Span]:
    """What of the parameters, each from its place on in one long buffer, lies in part `rank` of `size` elements."""
    begin, end = rank * size, (rank + 1) * size
    found = []
    for parameter, place in places:
        low, high = max(place, begin), min(place + parameter.numel(), end)
        if low < high:
            found.append(Span(parameter, low - place, high - place, low - begin))
    return found


def _stage_3(zero: Any) -> Iterator[FlatBuffer]:
    for number, parameters in enumerate(zero.fp16_groups):
        if zero._swappable_optimizer_subgroup(number) or (zero.offload_optimizer and zero.partial_offload != 1):
            raise InputError(
                "zero_optimization.offload_optimizer in engine.deepspeed: checkpoints cannot read an optimizer's state "
                "that is on nvme, or of which a part is offloaded (ratio): use device=cpu and no ratio"
            )
        master = zero.fp32_partitioned_groups_flat[number]
        spans, at = [], 0
        for parameter in parameters:
            # Every process has an equal part of each parameter; the last ones end in padding.
            size = parameter.partition_numel()
            begin = zero._get_param_partition_rank(parameter) * size
            end = min(begin + size, parameter.ds_numel)
            if begin < end:
                spans.append(Span(parameter, begin, end, at))
            at += size
        group = zero.optimizer.param_groups[zero.sub_group_to_group_id[number]]
        yield FlatBuffer(master, spans, group, zero.optimizer)
