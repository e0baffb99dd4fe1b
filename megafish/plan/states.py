"""Weights, master weights, moments and gradients of a process, as DeepSpeed 0.19 allocates them for megafish.

Counted with the padding of its flat buffers. What each ZeRO stage holds (psi weights, N processes, w bytes a weight):

    stage                   weights    masters    moments    gradients
    0   fp32                4 psi      -          8 psi      4 psi
    1   bf16                2 psi      4 psi / N  8 psi / N  2 psi, and 4 psi in which micro-batches add up
    1   fp32                4 psi      4 psi / N  8 psi / N  4 psi while micro-batches add up, then 4 psi / N
    2   bf16, fp32          w psi      4 psi / N  8 psi / N  4 psi / N
    3   bf16                2 psi / N  4 psi / N  8 psi / N  4 psi / N
    3   fp32                4 psi / N  4 psi / N  8 psi / N  4 psi / N

Sources: deepspeed/runtime/bf16_optimizer.py (stage 1 in bf16 is DeepSpeed's BF16_Optimizer), zero/stage_1_and_2.py,
zero/stage3.py; benchmarks/plan_memory.py measures every line.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from math import prod

from megafish.config import Config, ModelConfig
from megafish.model.flops import padded_vocab_size
from megafish.plan.layout import Layout


@dataclass(frozen=True)
class Parameters:
    """Sizes of one process's parameters, in the optimizer's two groups."""

    decayed: tuple[int, ...]
    kept: tuple[int, ...]
    """Not decayed: norms, biases and, unless asked for, embedding and head."""
    muon: int = 0
    """Numbers that Muon trains, with a momentum where AdamW keeps two moments."""

    @property
    def moment_bytes(self) -> float:
        """Of one number, on average."""
        return 8.0 - 4.0 * self.muon / self.total

    @property
    def groups(self) -> list[tuple[int, ...]]:
        """The groups that have parameters."""
        return [group for group in (self.decayed, self.kept) if group]

    @property
    def all(self) -> tuple[int, ...]:
        """All sizes."""
        return self.decayed + self.kept

    @property
    def total(self) -> int:
        """Numbers in all of them."""
        return sum(self.all)

    @property
    def largest(self) -> int:
        """Numbers in the largest one."""
        return max(self.all)


def parameters_of(config: Config, vocab_size: int, tensor: int = 1) -> Parameters:
    """The parameters of a process whose matrices are cut into `tensor` parts (norms are whole everywhere)."""
    found = _parameters(config.model, vocab_size, config.optimizer.decay_embeddings, tensor)
    if config.optimizer.name == "adamw":
        return found
    matrices = block_shapes(config.model, tensor).values()
    return replace(found, muon=config.model.num_layers * sum(prod(shape) for shape in matrices if len(shape) == 2))


@cache
def _parameters(model: ModelConfig, vocab_size: int, decay_embeddings: bool, tensor: int) -> Parameters:
    shapes = block_shapes(model, tensor)
    matrices = tuple(prod(shape) for shape in shapes.values() if len(shape) == 2) * model.num_layers
    vectors = tuple(prod(shape) for shape in shapes.values() if len(shape) == 1) * model.num_layers
    table = padded_vocab_size(model, vocab_size) // tensor * model.hidden_size
    tables = (table,) if model.tie_embeddings else (table, table)
    vectors = (*vectors, model.hidden_size)
    return Parameters(matrices + tables, vectors) if decay_embeddings else Parameters(matrices, vectors + tables)


def block_shapes(model: ModelConfig, tensor: int = 1) -> dict[str, tuple[int, ...]]:
    """Shapes of one block's parameters by name, cut for tensor parallelism as Megatron does (arXiv 1909.08053)."""
    width, inner, head_dim = model.hidden_size, model.intermediate_size // tensor, model.resolved_head_dim
    heads = model.num_heads // tensor
    rows = (model.num_heads + 2 * model.resolved_kv_heads) // tensor * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "attention_norm.weight": (width,),
        "attention.qkv.weight": (rows, width),
        "attention.out.weight": (width, heads * head_dim),
        "feed_forward_norm.weight": (width,),
        "feed_forward.gate_up.weight": (2 * inner, width),
        "feed_forward.down.weight": (width, inner),
    }
    if model.qkv_bias:
        shapes["attention.qkv.bias"] = (rows,)
    if model.qk_norm:
        shapes |= {"attention.q_norm.weight": (head_dim,), "attention.k_norm.weight": (head_dim,)}
    if model.mlp_bias:
        shapes |= {"feed_forward.gate_up.bias": (2 * inner,), "feed_forward.down.bias": (width,)}
    return shapes


@dataclass(frozen=True)
class States:
    """Bytes of one process, between the last backward pass of a step and the optimizer's update."""

    parameters: float
    masters: float
    moments: float
    gradients: float
    host: float = 0.0
    """Bytes in main memory: what is offloaded."""

    @property
    def device(self) -> float:
        """Bytes on the device."""
        return self.parameters + self.masters + self.moments + self.gradients


def states_of(parameters: Parameters, layout: Layout, rank: int = 0) -> States:
    """What process `rank` of those that shard together holds. On a CPU what is offloaded lies in main memory too."""
    weight, shards = layout.itemsize, layout.shards
    if layout.stage == 0:
        total = parameters.total
        return States(weight * total, 0.0, parameters.moment_bytes * total, 4.0 * total)
    if layout.stage == 3:
        return _stage_3(parameters, layout)
    padded = [_round_up(sum(group), 2 * shards) for group in parameters.groups]
    part = sum(padded) // shards
    weights, masters, moments = float(weight * sum(padded)), 4.0 * part, parameters.moment_bytes * part
    if layout.offload_optimizer:
        # Beside the masters lie their gradients, a buffer for the new weights, and room for one gradient.
        host = masters + moments + 4.0 * part + weight * (part + parameters.largest)
        added_up = 4.0 * (parameters.total if layout.stage == 1 else part) if layout.bf16 else 0.0
        return States(weights, 0.0, 0.0, weight * parameters.largest + added_up, host)
    if layout.stage == 1 and layout.bf16:
        return States(weights, masters, moments, 2.0 * parameters.total + 4.0 * sum(padded))
    if layout.bf16:
        return States(weights, masters, moments, 4.0 * part)
    return States(weights, masters, moments, 4.0 * _touched(parameters, shards, rank))


def _stage_3(parameters: Parameters, layout: Layout) -> States:
    part = sum(-(-size // layout.shards) for size in parameters.all)
    persistent = sum(size for size in parameters.all if size <= layout.persistence) if layout.shards > 1 else 0
    weights = float(layout.itemsize * (part + persistent))
    if layout.hpz > 1:
        weights += layout.itemsize * sum(-(-size // layout.hpz) for size in parameters.all)
    masters, moments, gradients = 4.0 * part, parameters.moment_bytes * part, 4.0 * part
    host = 0.0
    if layout.offload_parameters:
        host += layout.itemsize * part
        weights -= layout.itemsize * part
    if layout.offload_optimizer:
        # Gradients twice: as they come, and in fp32 beside the masters.
        host += 4.0 * part + moments + 2 * gradients
        masters = moments = gradients = 0.0
    return States(weights, masters, moments, gradients, host)


def _touched(parameters: Parameters, shards: int, rank: int) -> int:
    """Numbers in the parameters of which `rank` updates a part: ZeRO 1 and 2 copy their fp32 gradients whole."""
    total = 0
    for group in parameters.groups:
        part = _round_up(sum(group), 2 * shards) // shards
        begin = 0
        for size in group:
            if begin < (rank + 1) * part and begin + size > rank * part:
                total += size
            begin += size
    return total


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
