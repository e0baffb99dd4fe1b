"""A run of any size on one machine, without its memory: what would be refused at the start of the job is refused here.

The model is built on the meta device, which has shapes and no numbers. Nothing is started and nothing is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.optim import AdamW

from megafish.config import Config
from megafish.data.order import Locations
from megafish.errors import InputError
from megafish.model.transformer import Transformer
from megafish.plan.hardware import GIB
from megafish.plan.layout import Device, Layout, layout_of
from megafish.plan.memory import kept_share, plan_memory
from megafish.plan.states import parameters_of
from megafish.plan.vocabulary import planned_vocab_size
from megafish.run import RunDir
from megafish.train.checkpoint import check_resume, identity, load_state
from megafish.train.data import open_corpora
from megafish.train.engine import check_deepspeed_keys, deepspeed_config
from megafish.train.muon import Muon
from megafish.train.profile import check_ranks
from megafish.train.schedule import Budget, warmup_fraction

GPUS_PER_NODE = 8
"""At most, where the launcher's environment does not say."""


def dry_run(config: Config, world: int | None, *, resume: bool = False) -> str:
    """Check a run on `world` processes (default: as many as the launcher started, or 1) and describe it.

    `resume`: of a run directory that may be there already. Raises InputError for what the run would refuse: run
    directory, sizes, DeepSpeed's keys and data, but for the memory, the wandb account and the disk of the machines that
    it will have.
    """
    launcher, world = _launcher(world)
    device: Device = "cpu" if config.train.device == "cpu" else "cuda"
    run = RunDir(config.run_path)
    if not resume:
        run.refuse_if_used()
    layout = layout_of(config, world, device)
    check_ranks(config.profile, world)
    # Which keys there are does not depend on how many processes share the batch.
    check_deepspeed_keys(config, deepspeed_config(config, 1, device))
    vocab_size = planned_vocab_size(config)
    model = _meta_model(config, vocab_size)
    warmup = warmup_fraction(config, Budget.from_config(config))
    lines = [
        f"{config.name}: {sum(p.numel() for p in model.parameters()):,} parameters in "
        f"{sum(1 for _ in model.parameters())} tensors, built on the meta device",
        f"launch: {launcher}",
        *_batch_lines(config, layout, warmup),
        *_shard_lines(config, vocab_size, layout, model),
        *_memory_lines(config, vocab_size, layout),
        *_data_lines(config, layout, run),
    ]
    return "\n".join(lines)


def _launcher(world: int | None) -> tuple[str, int]:
    """What started this process, or would start the run, in words; and the number of processes."""
    env = os.environ
    started = env.get("WORLD_SIZE")
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", "1"))
    if started is not None:
        name, found = "torchrun's or deepspeed's environment", int(started)
    elif tasks > 1:
        missing = [key for key in ("MASTER_ADDR", "MASTER_PORT") if key not in env]
        if missing:
            raise InputError(
                f"started by srun without {' and '.join(missing)}: export MASTER_ADDR=$(scontrol show hostnames "
                '"$SLURM_JOB_NODELIST" | head -n1) MASTER_PORT=29500 in the batch script'
            )
        name, found = "srun", tasks
    else:
        world = 1 if world is None else world
        per_node = max(n for n in range(1, GPUS_PER_NODE + 1) if world % n == 0)
        nodes = world // per_node
        if world == 1:
            return "this process alone, no launcher", world
        where = "" if nodes == 1 else f" --nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500"
        return f"torchrun{where} --nproc-per-node {per_node} --no-python megafish train ... ({nodes} nodes)", world
    if world is not None and world != found:
        raise InputError(f"world={world}, but {name} says {found} processes: leave world away, or start as many")
    return f"{name}, {found} processes", found


def _meta_model(config: Config, vocab_size: int) -> Transformer:
    with torch.device("meta"):
        return Transformer(
            config.model,
            vocab_size,
            loss=config.loss,
            seed=config.train.seed,
            activation_checkpointing=config.train.activation_checkpointing,
        )


def _batch_lines(config: Config, layout: Layout, warmup: float) -> Iterator[str]:
    made: dict[str, Any] = deepspeed_config(config, layout.shards)
    assert made["gradient_accumulation_steps"] == layout.micro_batches, made
    tokens = config.train.global_batch_size * config.data.sequence_length
    yield (
        f"batch: {config.train.global_batch_size:,} sequences = {layout.replicas} data-parallel processes x "
        f"{layout.micro_batches} micro-batches x {layout.micro_batch}; {tokens:,} tokens a step"
    )
    if layout.tensor * layout.sequence > 1:
        yield f"mesh: {layout.replicas} data x {layout.sequence} sequence x {layout.tensor} tensor parallel"
    budget = Budget.from_config(config)
    steps, about = _steps(config)
    yield f"budget: {budget.total:,} {budget.unit.replace('_', ' ')}: {about}{steps:,} steps, {warmup:.1%} of it warmup"


def _steps(config: Config) -> tuple[int, str]:
    """Steps of the run, and "about " where the mask decides how many."""
    budget = Budget.from_config(config)
    per_step = config.train.global_batch_size * config.data.sequence_length
    if budget.unit == "steps":
        return budget.total, ""
    if budget.unit == "tokens":
        return -(-budget.total // per_step), ""
    return max(1, round(budget.total / (per_step * kept_share(config)))), "about "


def _shard_lines(config: Config, vocab_size: int, layout: Layout, model: Transformer) -> Iterator[str]:
    parameters = parameters_of(config, vocab_size, layout.tensor)
    if layout.tensor == 1:
        assert sorted(parameters.all) == sorted(p.numel() for p in model.parameters())
    if layout.stage == 0:
        yield f"shards: none (ZeRO-0): every process holds {parameters.total:,} parameters"
        return
    shards = layout.shards
    if layout.stage == 3:
        parts = [-(-size // shards) for size in parameters.all]
        last = sum(
            max(0, min(part, size - part * (shards - 1))) for part, size in zip(parts, parameters.all, strict=True)
        )
        first = sum(parts)
    else:
        padded = [-(-sum(group) // (2 * shards)) * 2 for group in parameters.groups]
        first = sum(padded)
        last = sum(
            max(0, min(part, sum(group) - part * (shards - 1)))
            for part, group in zip(padded, parameters.groups, strict=True)
        )
    what = {1: "optimizer's state", 2: "optimizer's state and gradients", 3: "weights too"}[layout.stage]
    yield (
        f"shards: ZeRO-{layout.stage} ({what}) over {shards} processes: the first holds {first:,} parameters, the last "
        f"{last:,} ({first * shards - parameters.total:,} of padding in all)"
    )


def _memory_lines(config: Config, vocab_size: int, layout: Layout) -> Iterator[str]:
    memory = plan_memory(config, vocab_size, layout)
    states = memory.states
    yield (
        f"memory of a process: {memory.total / GIB:.1f} GiB at its peak on {layout.device}, of which weights "
        f"{states.parameters / GIB:.1f}, masters and moments {(states.masters + states.moments) / GIB:.1f}, gradients "
        f"{states.gradients / GIB:.1f} (megafish plan has the details)"
    )


def _data_lines(config: Config, layout: Layout, run: RunDir) -> Iterator[str]:
    if not config.data.train:
        yield "data: no corpus is named (data.train=...), so the order of samples is not checked"
        return
    corpora = open_corpora(config)
    train, stream = corpora.train, corpora.stream
    latest = run.latest()
    if latest is not None:
        optimizer = {"adamw": AdamW, "muon": Muon}[config.optimizer.name].__name__
        check_resume(load_state(latest), identity(config, corpora.identity(), optimizer), run)
        yield f"continues: {latest}"
    steps, about = _steps(config)
    batch = config.train.global_batch_size
    epochs = stream.epochs(steps * batch)
    yield (
        f"data: {about}{steps * batch:,} samples, "
        + ", ".join(
            f"{epoch:.2f} passes over {source.corpus.path}" for epoch, source in zip(epochs, train, strict=True)
        )
    )
    for name, first in (("first", 0), ("last", (steps - 1) * batch)):
        found = stream.locate(first, batch)
        own = layout.micro_batch
        yield (
            f"{name} step: samples {first:,} to {first + batch - 1:,}; process 0 begins with {_place(found, 0)}, the "
            f"last with {_place(found, (layout.replicas - 1) * own)}"
        )


def _place(found: Locations, row: int) -> str:
    return (
        f"sample {int(found.number[row]):,} (source {int(found.source[row])}, pass {int(found.epoch[row])}, token "
        f"{int(found.start[row]):,})"
    )
