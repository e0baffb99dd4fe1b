"""The fastest way to lay a configuration out on a cluster that fits its memory: every combination is tried."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from megafish.config import Config
from megafish.config_deepspeed import complaints
from megafish.plan.hardware import GIB, Cluster
from megafish.plan.layout import Layout, degrees, layout_of, misfit, offload, searched_tensor_degrees
from megafish.plan.memory import MemoryPlan, plan_memory
from megafish.plan.throughput import Efficiency, StepTime, step_time

MOST_SEQUENCES = 128
"""Largest micro-batch that is tried: a GPU is busy long before."""


@dataclass(frozen=True)
class Candidate:
    """One layout with its figures."""

    layout: Layout
    memory: MemoryPlan
    step: StepTime
    fault: str | None
    """Why it does not fit; None where it does."""

    @property
    def fits(self) -> bool:
        """Whether it runs on the cluster."""
        return self.fault is None


def memory_fault(memory: MemoryPlan, cluster: Cluster) -> str | None:
    """Which memory is too small for a plan, in words; None where both are large enough."""
    if memory.total > cluster.gpu.memory:
        return f"needs {memory.total / GIB:.1f} of {cluster.gpu.memory / GIB:.1f} GiB a GPU"
    if memory.host:
        needed = memory.host * cluster.gpus_per_node
        if cluster.host_memory is None:
            return f"offloads {needed / GIB:.0f} GiB a node: say what a node has with --host-memory-gib"
        if needed > cluster.host_memory:
            return f"offloads {needed / GIB:.0f} of {cluster.host_memory / GIB:.0f} GiB a node"
    return None


def evaluate(config: Config, vocab_size: int, layout: Layout, cluster: Cluster, efficiency: Efficiency) -> Candidate:
    """A layout's memory and time."""
    memory = plan_memory(config, vocab_size, layout)
    step = step_time(config, vocab_size, layout, cluster, efficiency)
    return Candidate(layout, memory, step, memory_fault(memory, cluster))


def search(config: Config, vocab_size: int, cluster: Cluster, efficiency: Efficiency) -> list[Candidate]:
    """Every layout that divides, the fastest first; of equally fast ones the one that takes less memory.

    Stage, tensor-parallel degree, micro-batch, checkpointing and offload vary; the batch, the sequence-parallel degree
    and DeepSpeed's own keys stay as the configuration has them. Offload is tried where the nodes' memory is known, and
    kept only where nothing else fits.
    """
    found = [
        evaluate(config, vocab_size, layout, cluster, efficiency) for layout in _layouts(config, cluster, offload=False)
    ]
    if cluster.host_memory is not None and not any(candidate.fits for candidate in found):
        found += [
            evaluate(config, vocab_size, layout, cluster, efficiency)
            for layout in _layouts(config, cluster, offload=True)
        ]
    return sorted(found, key=lambda candidate: (round(candidate.step.seconds, 4), candidate.memory.total))


def _layouts(config: Config, cluster: Cluster, offload: bool) -> Iterator[Layout]:
    base = _base(config, cluster)
    stages = [stage for stage in (0, 1, 2, 3) if stage or not (base.bf16 or offload)]
    # DeepSpeed's own keys stay, so a stage that would refuse them is no choice.
    stages = [stage for stage in stages if not complaints(config.engine.deepspeed, stage, {})]
    for tensor in searched_tensor_degrees(config, cluster.gpus_per_node):
        replicas = cluster.gpus // (tensor * base.sequence)
        if replicas == 0 or config.train.global_batch_size % replicas:
            continue
        share = config.train.global_batch_size // replicas
        sizes = [size for size in range(1, min(share, MOST_SEQUENCES) + 1) if share % size == 0]
        for stage in stages:
            for size in sizes:
                for checkpointing in (False, True):
                    layout = replace(
                        base,
                        tensor=tensor,
                        stage=stage,
                        micro_batch=size,
                        micro_batches=share // size,
                        checkpointing=checkpointing,
                        offload_optimizer=offload,
                        offload_parameters=False,
                        overlap=base.overlap if stage == base.stage else stage == 3,
                    )
                    if misfit(config, layout) is None:
                        yield layout


def _base(config: Config, cluster: Cluster) -> Layout:
    """The configuration's own layout with one sequence a process, which every cluster that can be used divides."""
    alone = config.model_copy(
        update={"train": config.train.model_copy(update={"micro_batch_size": 1, "global_batch_size": cluster.gpus})}
    )
    return layout_of(alone, cluster.gpus, "cuda")


def overrides(config: Config, layout: Layout) -> list[str]:
    """What to put on the command line to get this layout, where it differs from the configuration."""
    own, stored = degrees(config), offload(config)
    changed = [
        (f"engine.zero_stage={layout.stage}", layout.stage != config.engine.zero_stage),
        (f"engine.tensor_parallel={layout.tensor}", layout.tensor != own.tensor),
        (f"train.micro_batch_size={layout.micro_batch}", layout.micro_batch != config.train.micro_batch_size),
        (
            f"train.activation_checkpointing={str(layout.checkpointing).lower()}",
            layout.checkpointing != config.train.activation_checkpointing,
        ),
        (
            _place(config, "offload_optimizer", "offload_optimizer", layout.offload_optimizer),
            layout.offload_optimizer != stored.optimizer,
        ),
        (
            _place(config, "offload_parameters", "offload_param", layout.offload_parameters),
            layout.offload_parameters != stored.parameters,
        ),
    ]
    return [text for text, needed in changed if needed]


def _place(config: Config, name: str, section: str, offloaded: bool) -> str:
    """The setting that offloads or keeps, where the configuration has it: with us, or among DeepSpeed's own keys."""
    if offloaded or getattr(config.engine, name) == "cpu":
        return f"engine.{name}={'cpu' if offloaded else 'none'}"
    return f"engine.deepspeed.zero_optimization.{section}=null"


def reasons(candidates: list[Candidate]) -> list[str]:
    """Why the first candidate that fits wins: what is slower about the next, and what did not fit."""
    fitting = [candidate for candidate in candidates if candidate.fits]
    if not fitting:
        nearest = min(candidates, key=lambda candidate: candidate.memory.total)
        return [f"nothing fits; the nearest is {_name(nearest)}, which {nearest.fault}"]
    best = fitting[0]
    said: list[str] = []
    for same_stage in (False, True):
        others = (other for other in fitting[1:] if (other.layout.stage == best.layout.stage) is same_stage)
        said += [_slower(best, other) for other in islice(others, 1)]
    faster = [c for c in candidates[: candidates.index(best)] if not c.fits]
    if faster:
        said.append(f"{_name(faster[0])} would be {_percent(best, faster[0])} faster, but {faster[0].fault}")
    return said


def _slower(best: Candidate, other: Candidate) -> str:
    """What takes longer in `other`."""
    names = ("products", "attention", "elementwise", "optimizer", "exchange", "waiting")
    longer = {name: getattr(other.step, name) - getattr(best.step, name) for name in names}
    most = max(longer, key=lambda name: longer[name])
    if longer[most] < 1e-3 * best.step.seconds:
        saved = (other.memory.total - best.memory.total) / GIB
        return f"{_name(other)} is as fast and takes {saved:+.1f} GiB"
    what = {
        "products": "matrix products (recomputed, or too small to be efficient)",
        "attention": "attention (recomputed)",
        "elementwise": "element-wise work (recomputed)",
        "optimizer": "the optimizer's memory traffic",
        "exchange": "communication that nothing hides",
        "waiting": "waiting for other nodes",
    }[most]
    return f"{_name(other)} is {_percent(other, best)} slower: {longer[most]:.2f} s a step more of {what}"


def _name(candidate: Candidate) -> str:
    return f"{candidate.layout.name} with micro-batches of {candidate.layout.micro_batch}"


def _percent(slow: Candidate, fast: Candidate) -> str:
    return f"{100 * (slow.step.seconds / fast.step.seconds - 1):.1f} %"
