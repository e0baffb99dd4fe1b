"""Training, from a configuration to a trained run directory. `train` reads top to bottom."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from signal import SIGTERM, Signals
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from megafish.config import Config
from megafish.data.loader import ReadOrder
from megafish.errors import InputError
from megafish.model.flops import device_peak_flops, flops_per_token, parameter_count
from megafish.model.transformer import Transformer
from megafish.plan.check import check_fits
from megafish.plan.memory import MemoryPlan
from megafish.progress import format_quantity
from megafish.run import RunDir
from megafish.train.checkpoint import changed_settings, check_resume, find_good, load_state, set_aside
from megafish.train.data import TrainingData, open_data
from megafish.train.engine import Engine, Processes, start_processes, together
from megafish.train.evaluate import dropped_loss, validate
from megafish.train.guard import StopRequest
from megafish.train.saver import Saver
from megafish.train.schedule import Budget, Spent, learning_rate_factor, warmup_fraction
from megafish.train.track import Tracker


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended."""

    run: RunDir
    spent: Spent
    signal: Signals | None  # what stopped it before the budget was used up


def train(config: Config, *, resume: bool = False, console: Console | None = None) -> Outcome:
    """Train until the budget is used up, or until SIGTERM or Ctrl-C asks to stop.

    With `resume` the run directory is continued from its latest checkpoint (from the start when it has none yet);
    without it a directory that holds a run already is refused. Called by every process of the group.
    """
    console = console or Console()
    processes = start_processes(config.train.device, config.engine.tensor_parallel, config.engine.sequence_parallel)
    run = RunDir(config.run_path)
    with ExitStack() as stack:
        together(lambda: _claim(run, processes, resume, stack))
        data = together(lambda: open_data(config, processes))
        budget = Budget.from_config(config)
        warmup = warmup_fraction(config, budget)
        ids, world = data.tokenizer.vocab_size, processes.world_size
        memory = together(lambda: check_fits(config, ids, world, processes.device))
        model = Transformer(
            config.model,
            data.tokenizer.vocab_size,
            loss=config.loss,
            seed=config.train.seed,
            activation_checkpointing=config.train.activation_checkpointing,
            mesh=processes.mesh,
        )
        parameters = parameter_count(config.model, data.tokenizer.vocab_size)
        engine = Engine(config, model, processes)

        spent, order = Spent(), ReadOrder()
        identity = _identity(config, data, engine)
        latest, fallback = find_good(run, processes) if resume else (None, None)
        if latest is not None:
            spent, order = together(partial(_continue_from, latest, identity, data, run))
            engine.load(latest)

        tracker = together(lambda: _open_tracker(run, config, spent, processes, console, stack))
        if tracker is not None:
            if fallback is not None:
                tracker.note(fallback)
            tracker.note(_opening_line(config, parameters, data, processes, latest is not None, spent, memory))
            if data.valid is None:
                tracker.note("no validation: the corpora have no validation text of one sample; data.valid names some")
        stop = stack.enter_context(StopRequest())
        # The peaks in the table are those of bf16.
        peak = device_peak_flops(processes.device) if config.train.precision == "bf16" else None

        stopped = False
        saver = stack.enter_context(Saver(run, engine, config.checkpoint))
        batches = stack.enter_context(closing(data.steps(spent.samples)))
        while not budget.used_up(spent) and not stopped:
            # ---- one optimizer step
            started = time.perf_counter()
            batch = next(batches)
            flags = stop.received is not None, *saver.flags()
            kept, dropped, target_bytes, stops, saving, failed = data.count(batch, *flags)
            stopped = stops > 0
            saver.poll(saving, failed)
            spent = spent.plus(samples=data.batch_samples, tokens=data.batch_tokens, supervised_tokens=kept)
            progress = budget.progress(spent)
            learning_rate = config.optimizer.lr * learning_rate_factor(config.schedule, warmup, progress)

            engine.train()
            cross_entropy = torch.zeros((), dtype=torch.float64, device=processes.device)
            for index, micro in enumerate(batch.micro_batches):
                output = engine(**data.to_model(micro), denominator=max(kept, 1))
                engine.backward(output.loss, is_last=index == len(batch.micro_batches) - 1)
                cross_entropy += output.ce_sum
            grad_norm = engine.step(learning_rate)
            dist.all_reduce(cross_entropy, group=processes.mesh.replicas.group)
            nats = float(cross_entropy)
            if not math.isfinite(nats + grad_norm):
                saver.finish()
                raise Diverged(
                    f"{run.path}: step {spent.steps}: loss {nats / max(kept, 1)}, gradient norm {grad_norm}: training "
                    "diverged; lower optimizer.lr or raise schedule.warmup_fraction, then resume or start again"
                )
            seconds = time.perf_counter() - started

            # ---- report
            order = order.plus(batch.data_hash, batch.first_sample, data.batch_samples)
            last = budget.used_up(spent)
            if tracker is not None:
                achieved = _step_flops(config, data, kept) / seconds
                record = {
                    "kind": "train",
                    "step": spent.steps,
                    "time": time.time(),
                    "loss": nats / max(kept, 1),
                    "bpb": nats / math.log(2) / max(target_bytes, 1),
                    "lr": learning_rate,
                    "grad_norm": grad_norm,
                    "kept_tokens": kept,
                    "dropped_tokens": dropped,
                    "drop_rate": dropped / max(kept + dropped, 1),
                    "tokens": spent.tokens,
                    "supervised_tokens": spent.supervised_tokens,
                    "epoch": data.epoch(spent.samples),
                    "data_hash": batch.data_hash,
                    "order_hash": order.order_hash,
                    "tokens_per_s": data.batch_tokens / seconds,
                    "model_flops_per_s": achieved,
                    "mfu": None if peak is None else achieved / (peak * processes.world_size),
                    "memory_bytes": _memory_bytes(processes),
                }
                if last or spent.steps % config.track.log_interval == 0:
                    tracker.log(record)
                tracker.show(progress, record)

            # ---- validate
            valid_loss = None
            if not stopped and (last or _due(spent.steps, config.eval.interval)):
                for result in (validate(engine, data), dropped_loss(engine, data)):
                    if result is not None and result["kind"] == "valid":
                        valid_loss = result["valid_loss"]
                    if result is not None and tracker is not None:
                        tracker.log({**result, "step": spent.steps})
                        tracker.note(_evaluation_line(result, spent.steps))

            # ---- save
            if last or stopped or _due(spent.steps, config.checkpoint.interval):
                state = {"step": spent.steps, "spent": asdict(spent), "order": asdict(order), "valid_loss": valid_loss}
                saver.save({**state, **identity}, wait=last or stopped)
            if tracker is not None:
                for record in saver.records():
                    tracker.log(record)

        cut_short = stopped and not budget.used_up(spent)
        return Outcome(run, spent, signal=(stop.received or SIGTERM) if cut_short else None)


def _claim(run: RunDir, processes: Processes, resume: bool, stack: ExitStack) -> None:
    """Take the run directory for this run, on the main process."""
    if not processes.is_main:
        return
    stack.enter_context(run.lock())
    # metrics.jsonl comes to be after config.yaml, so that what is refused here can always be continued.
    if not resume and (run.latest_file.exists() or run.metrics_file.exists()):
        again = "" if run.latest_file.exists() else " (it has no checkpoint yet and will start over)"
        raise InputError(
            f"{run.path} holds a run already: continue it with `megafish train {run.path}`{again}, or choose another "
            "name=..."
        )


def _continue_from(folder: Path, identity: dict[str, Any], data: TrainingData, run: RunDir) -> tuple[Spent, ReadOrder]:
    """How far a checkpoint is, once it is found to be one that this run may continue."""
    saved = load_state(folder)
    check_resume(saved, identity, run)
    order = ReadOrder(**saved["order"])
    data.check_order(order)
    return Spent(**saved["spent"]), order


def _open_tracker(
    run: RunDir, config: Config, spent: Spent, processes: Processes, console: Console, stack: ExitStack
) -> Tracker | None:
    """The main process's tracker, once the directory says what the run is from here on."""
    if not processes.is_main:
        return None
    notes = []
    if spent.steps:
        changed = changed_settings(run.load_config(), config)
        if changed:
            run.path.joinpath(f"config.until_step_{spent.steps:08d}.yaml").write_text(
                run.config_file.read_text(encoding="utf-8"), encoding="utf-8"
            )
            notes.append(f"changed from step {spent.steps} on: {'; '.join(changed)}")
        aside = set_aside(run, spent.steps)
        if aside:
            notes.append(f"checkpoints of later steps are set aside as abandoned_step_*: {aside}")
    run.save_config(config)
    tracker = stack.enter_context(Tracker(run, config, resume_step=spent.steps, console=console))
    for note in notes:
        tracker.note(note)
    return tracker


def _step_flops(config: Config, data: TrainingData, kept: int) -> float:
    """Model FLOPs of a step in which `kept` targets went through the head."""
    per_token = flops_per_token(
        config.model, data.tokenizer.vocab_size, config.data.sequence_length, kept / data.batch_tokens
    )
    return per_token * data.batch_tokens


class Diverged(RuntimeError):
    """The loss or its gradient is not a finite number."""


def _due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0


def _identity(config: Config, data: TrainingData, engine: Engine) -> dict[str, Any]:
    """What a continuation must share with the run it continues."""
    return {
        **data.identity(),
        "model": config.model.model_dump(mode="json"),
        "optimizer": engine.optimizer_name,
    }


def _memory_bytes(processes: Processes) -> int:
    """Peak memory of this process: allocated on its GPU, or resident."""
    if processes.device.type == "cuda":
        return torch.cuda.max_memory_allocated(processes.device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def _opening_line(
    config: Config,
    parameters: int,
    data: TrainingData,
    processes: Processes,
    resumed: bool,
    spent: Spent,
    memory: MemoryPlan,
) -> str:
    """What is about to run, in one line."""
    goldfish = config.goldfish
    loss = "plain loss" if goldfish.k is None else f"goldfish k={goldfish.k} h={goldfish.h} ({goldfish.scheme})"
    start = f"continues at step {spent.steps}" if resumed else "starts"
    mesh, spread = processes.mesh, ""
    if mesh.data.size < processes.world_size:
        spread = f" ({mesh.data.size} data x {mesh.sequence.size} sequence x {mesh.tensor.size} tensor)"
    return (
        f"{config.name} {start}: {parameters / 1e6:.1f}M parameters, {loss}, "
        f"{data.batch_tokens:,} tokens a step, {processes.world_size} x {processes.device.type}{spread}, "
        f"ZeRO {config.engine.zero_stage}, {config.train.precision}, "
        f"about {format_quantity(memory.total, 'B')} a process"
    )


def _evaluation_line(result: dict[str, Any], step: int) -> str:
    if result["kind"] == "valid":
        return (
            f"step {step}: validation loss {result['valid_loss']:.4f} nats/token, {result['valid_bpb']:.4f} bits/byte"
        )
    return f"step {step}: loss on dropped tokens {result['loss_dropped']:.4f}, on kept tokens {result['loss_kept']:.4f}"
