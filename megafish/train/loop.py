"""Training, from a configuration to a trained run directory. `train` reads top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from signal import Signals
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from megafish.config import Config, changed_settings
from megafish.data.loader import StepBatch
from megafish.data.patches import patch_step
from megafish.errors import InputError
from megafish.life import Announcement
from megafish.model.flops import device_peak_flops, flops_per_token, parameter_count
from megafish.model.load import initial_weights
from megafish.model.transformer import Transformer
from megafish.objective.contrast import Premature
from megafish.plan.check import check_fits
from megafish.plan.memory import MemoryPlan
from megafish.processes import together
from megafish.progress import format_quantity
from megafish.run import RunDir
from megafish.train.checkpoint import identity, set_aside
from megafish.train.data import TrainingData, open_data
from megafish.train.engine import Engine, Processes, building, largest, start_processes
from megafish.train.evaluate import dropped_loss, validate
from megafish.train.guard import StopRequest
from megafish.train.probes import Recites, limit_passed, open_probe, recitation
from megafish.train.profile import Profiler
from megafish.train.recovery import (
    Restored,
    Restorer,
    check_replicas,
    go_back,
    one_decision,
    report_refusal,
    shared_quarantine,
)
from megafish.train.saver import Saver
from megafish.train.schedule import Budget, Spent
from megafish.train.spikes import StepGuard
from megafish.train.stages import Stages
from megafish.train.track import Tracker
from megafish.train.watchdog import WAITING_FOR_DATA, Watchdog


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended."""

    run: RunDir
    spent: Spent
    signal: Signals | None  # what stopped it before the budget was used up


def train(
    config: Config, *, resume: bool = False, console: Console | None = None, stop: StopRequest | None = None
) -> Outcome:
    """Train until the budget is used up, or until a signal asks to stop.

    With `resume` the run directory is continued from its latest checkpoint (from the start when it has none yet);
    without it a directory that holds a run already is refused. `stop`: the caller's, where it listens already. Called
    by every process of the group. Raises Diverged when going back to a checkpoint does not help against bad steps,
    ReplicasDiffer when processes that should hold the same weights do not.
    """
    console = console or Console()
    with ExitStack() as stack:
        stop = stop or stack.enter_context(StopRequest())
        processes = start_processes(config.train.device, config.engine.tensor_parallel, config.engine.sequence_parallel)
        run = RunDir(config.run_path)
        life = together(lambda: claim(run, processes, resume, stack))

        def ended(spent: Spent, number: int) -> Outcome:
            """The run leaves: its budget is used up, or signal `number` (0: none) stopped it."""
            signal = Signals(number) if number else None
            if life is not None:
                life.end(signal)
            return Outcome(run, spent, signal)

        watchdog = stack.enter_context(watchdog_of(config, run, processes))
        watchdog.mark("opening the data", 0, slow=True)
        data = together(lambda: open_data(config, processes))
        budget = Budget.from_config(config)
        stages = Stages(config, budget)
        if number := asked_to_stop(stop, processes):
            return ended(Spent(), number)

        memory = together(lambda: check_fits(config, data.tokenizer.vocab_size, processes.world_size, processes.device))
        watchdog.mark("building the model", 0, slow=True)
        resumed = resume and run.latest() is not None
        weights = None if resumed else together(lambda: _initial_weights(config, data))
        premature = None if config.contrast.premature is None else together(lambda: _premature(config, data))
        with building(config, processes):
            model = Transformer(
                config.model,
                data.tokenizer.vocab_size,
                loss=config.loss,
                seed=config.train.seed,
                weights=weights,
                activation_checkpointing=config.train.activation_checkpointing,
                mesh=processes.mesh,
            )
        parameters = parameter_count(config.model, data.tokenizer.vocab_size)
        engine = Engine(config, model, processes)
        if number := asked_to_stop(stop, processes):
            return ended(Spent(), number)

        watchdog.mark("loading the checkpoint", 0, slow=True)
        guard = StepGuard(config.guard)
        fixed = identity(
            config, data.identity(), engine.optimizer_name, None if premature is None else premature.digest
        )
        probe = together(lambda: open_probe(data))
        restorer = Restorer(run, engine, data, guard, fixed)
        point = restorer.restore() if resume else Restored()
        spent, order, owed = point.spent, point.order, point.owes_evaluation
        saved, rollbacks = spent.steps, 0
        quarantine = shared_quarantine(run, processes)

        profile = together(lambda: _open_profiler(run, config, spent, processes))
        tracker = together(lambda: open_tracker(run, config, spent, processes, console, stack))
        if tracker is not None:
            if point.note is not None:
                tracker.note(point.note)
            tracker.note(_opening_line(config, parameters, data, processes, spent, memory))
            if quarantine:
                tracker.note(f"{len(quarantine)} samples are left out: {run.quarantine_file}")
            if budget.used_up(spent):
                tracker.note(f"nothing is left to do: train.{budget.unit}={budget.total} is used up; raise it to go on")
            if probe is not None and probe.note is not None:
                tracker.note(probe.note)
            if data.valid is None:
                tracker.note("no validation: the corpora have no validation text of one sample; data.valid names some")
        stack.enter_context(profile)
        # The peaks in the table are those of bf16.
        peak = device_peak_flops(processes.device) if config.train.precision == "bf16" else None

        saver = stack.enter_context(Saver(run, engine, config.checkpoint))
        valid_loss = None
        too_much: str | None = None  # what the run ends for: more canaries are recited than allowed

        def cut_short() -> bool:
            """Between the batches of an evaluation: whether to leave it. One small collective."""
            nonlocal owed
            watchdog.mark("evaluation", spent.steps, slow=True)
            owed = owed or asked_to_stop(stop, processes) != 0
            return owed

        def evaluate(*, canaries_alone: bool = False) -> None:
            """Validate. What a signal cuts short is not reported; it is owed, and the next resume makes up for it."""
            nonlocal owed, valid_loss, too_much
            owed = False
            results = []
            if not canaries_alone:
                results += [validate(engine, data, cut_short), dropped_loss(engine, data, cut_short)]
            results.append(recitation(engine, data, probe, cut_short))
            for result in results:
                if result is None or owed:
                    continue
                if result["kind"] == "valid":
                    valid_loss = result["valid_loss"]
                if tracker is not None:
                    tracker.log({**result, "step": spent.steps})
                    tracker.note(_evaluation_line(result, spent.steps))
                passed = limit_passed(result, config.eval)
                if passed is not None and config.eval.recited_action == "stop":
                    too_much = passed
                elif passed is not None and tracker is not None:
                    tracker.note(f"warning: {passed}")

        def compare() -> None:
            """End the run where replicas differ."""
            if config.guard.replica_check_interval is not None:
                watchdog.mark("comparing the replicas", spent.steps, slow=True)
                check_replicas(run, engine, saver, spent.steps)

        def save(*, wait: bool) -> None:
            compare()  # what all replicas agree on is saved
            watchdog.mark("saving", spent.steps, slow=True)
            state = {"step": spent.steps, "spent": asdict(spent), "order": asdict(order), "valid_loss": valid_loss}
            state |= {"owes_evaluation": owed, "guard": guard.state()}
            saver.save({**state, **restorer.identity}, wait=wait)

        def report_checkpoints() -> None:
            if tracker is not None:
                for record in saver.records():
                    tracker.log(record)

        def begin(phase: str) -> None:
            """A part of the next step begins, for who watches it and for who times it."""
            watchdog.mark(phase, spent.steps + 1, slow=first)
            profile.begin(phase)

        if owed:
            evaluate()
            if budget.used_up(spent) and not owed:
                save(wait=True)
        stopped = False
        first = True  # kernels are compiled and memory is allocated in the first step
        batches = data.steps(spent.samples, quarantine, lambda: stop.received is not None)
        stack.callback(lambda: batches.close())
        while not budget.used_up(spent):
            # ---- one optimizer step
            watchdog.mark(WAITING_FOR_DATA, spent.steps + 1, slow=first)
            profile.begin("data")  # may start a trace, which is no part of the step
            started = time.perf_counter()
            batch, problem = _next_batch(batches)
            patch = stages.patch(spent)
            if batch is not None and patch is not None:
                batch = patch_step(batch, patch)
            watchdog.mark("counting tokens", spent.steps + 1, slow=first)
            flags = stop.received is not None, problem is not None, *saver.flags()
            kept, dropped, target_bytes, stops, problems, saving, failed = data.count(batch, *flags)
            stopped = stops > 0
            if stopped:
                break
            if problems:
                together(partial(_refuse, problem))
            assert batch is not None
            saver.poll(saving, failed)
            flops = _step_flops(config, data, kept, patch)
            if premature is not None:
                flops += _forward_flops(premature, data, kept)
            after = spent.plus(
                samples=batch.end - spent.samples,
                tokens=data.batch_tokens,
                supervised_tokens=kept,
                patches=patch is not None,
                flops=flops,
            )
            progress, learning_rate = budget.progress(after), stages.learning_rate(spent, after)
            if stages.starts_anew(spent):
                engine.reset_optimizer()
                guard.load(None)  # the losses of patches say nothing about those of tokens
                if tracker is not None:
                    tracker.note(f"step {after.steps}: from patches to tokens; optimizer and schedule start anew")

            engine.train()
            sums = torch.zeros(3, dtype=torch.float64, device=processes.device)
            for index, micro in enumerate(batch.micro_batches):
                begin("forward")
                contrast = None if premature is None else premature(micro)
                output = engine(**data.to_model(micro), patch=patch, contrast=contrast, denominator=max(kept, 1))
                begin("backward")
                engine.backward(output.loss, is_last=index == len(batch.micro_batches) - 1)
                sums[0] += output.ce_sum
                if output.weight_sum is not None:
                    sums[1] += output.weight_sum
                if contrast is not None:
                    sums[2] += contrast.mask.sum()
            begin("optimizer")
            dist.all_reduce(sums, group=processes.mesh.replicas.group)
            nats, weight, corrected = sums.tolist()
            if config.loss.entropy_weight is not None and weight > 0:
                # So that the mean weight over the global batch is 1. It is known now, and gradients are linear in it.
                engine.scale_gradients(kept / weight)
            loss = nats / max(kept, 1)
            grad_norm, taken = engine.step(learning_rate, one_decision(guard, loss, processes))
            first = False
            seconds = time.perf_counter() - started
            phase_seconds = profile.end_step()
            if not taken:
                fault = guard.fault(loss, grad_norm) or "refused by another process"
                for start, count in batch.ranges:
                    quarantine = quarantine.with_range(start, count)
                if tracker is not None:
                    report_refusal(run, tracker, batch, after.steps, loss, grad_norm, fault)
                spent = replace(spent, samples=batch.end)
                if guard.refuse(loss, grad_norm):
                    watchdog.mark("going back", spent.steps, slow=True)
                    rollbacks += 1
                    saver.finish()
                    point = go_back(restorer, tracker, rollbacks, fault)
                    spent, order, saved, valid_loss = point.spent, point.order, point.spent.steps, None
                    batches.close()
                    batches = data.steps(spent.samples, quarantine, lambda: stop.received is not None)
                continue
            guard.accept(loss, grad_norm)
            saver.allocate()
            spent = after

            # ---- report
            order = order.plus(batch.data_hash, batch.ranges)
            last = budget.used_up(spent)
            if tracker is not None:
                achieved = flops / seconds
                record = {
                    "kind": "train",
                    "step": spent.steps,
                    "time": time.time(),
                    "loss": loss,
                    "bpb": nats / math.log(2) / max(target_bytes, 1),
                    "lr": learning_rate,
                    "grad_norm": grad_norm,
                    "kept_tokens": kept,
                    "dropped_tokens": dropped,
                    "drop_rate": dropped / max(kept + dropped, 1),
                    "tokens": spent.tokens,
                    "supervised_tokens": spent.supervised_tokens,
                    "flops": spent.flops,
                    **({} if config.patch.size is None else {"patch_size": patch or 1}),
                    **({} if premature is None else {"corrected_tokens": int(corrected)}),
                    "progress": progress,
                    "epoch": data.epoch(spent.samples),
                    "data_hash": batch.data_hash,
                    "order_hash": order.order_hash,
                    "tokens_per_s": data.batch_tokens / seconds,
                    "model_flops_per_s": achieved,
                    "mfu": None if peak is None else achieved / (peak * processes.world_size),
                    "memory_bytes": memory_bytes(processes),
                    **phase_seconds,
                }
                if last or spent.steps % config.track.log_interval == 0:
                    tracker.log(record)
                tracker.show(progress, record)

            # ---- validate
            valid_loss = None
            if last or due(spent.steps, config.eval.interval):
                evaluate()
            elif due(spent.steps, config.eval.canary_interval):
                evaluate(canaries_alone=True)
            if too_much is not None:
                save(wait=True)
                report_checkpoints()
                raise Recites(f"{run.path}: step {spent.steps}: {too_much}")

            # ---- save
            if last or due(spent.steps, config.checkpoint.interval):
                save(wait=last)
                saved, rollbacks = spent.steps, 0
            elif due(spent.steps, config.guard.replica_check_interval):
                compare()
            report_checkpoints()

        if stopped:
            if spent.steps != saved:
                save(wait=True)
            watchdog.mark("saving", spent.steps, slow=True)
            saver.finish()
            report_checkpoints()
        for line in profile.report():
            if tracker is not None:
                tracker.note(line)
        return ended(spent, asked_to_stop(stop, processes) if stopped or owed else 0)


def _next_batch(batches: Iterator[StepBatch | None]) -> tuple[StepBatch | None, Exception | None]:
    """The next batch, or what this process's loader has to complain about: the others are told before it leaves."""
    try:
        return next(batches), None
    except (InputError, OSError) as error:
        return None, error


def _refuse(problem: Exception | None) -> None:
    if problem is not None:
        raise problem


def asked_to_stop(stop: StopRequest, processes: Processes) -> int:
    """The signal that any process got, 0 for none. Collective: all stop together, and with the same exit code."""
    return largest(stop.received or 0, processes)


def watchdog_of(config: Config, run: RunDir, processes: Processes) -> Watchdog:
    """This process's watchdog, as the section guard asks for it."""
    command = "train" if config.unlearn is None else "unlearn"
    return Watchdog(
        processes.rank,
        processes.world_size,
        run.logs,
        stall_seconds=config.guard.stall_seconds,
        slow_seconds=config.guard.slow_stall_seconds,
        hint=f"; checkpoints are untouched: continue with `megafish {command} {run.path}`",
    )


def claim(run: RunDir, processes: Processes, resume: bool, stack: ExitStack) -> Announcement | None:
    """Take the run directory for this run, on the main process."""
    if not processes.is_main:
        return None
    stack.enter_context(run.lock())
    if not resume:
        run.refuse_if_used()
    return stack.enter_context(Announcement(run, processes.world_size))


def open_tracker(
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


def _initial_weights(config: Config, data: TrainingData) -> Callable[[str], torch.Tensor] | None:
    """What a new run starts from, None for random weights."""
    folder = config.train.initial_weights
    return None if folder is None else initial_weights(folder, config.model, data.tokenizer.vocab_size)


def _open_profiler(run: RunDir, config: Config, spent: Spent, processes: Processes) -> Profiler:
    """This process's profiler."""
    return Profiler(
        config.profile,
        run.profile,
        rank=processes.rank,
        world_size=processes.world_size,
        device=processes.device,
        first_step=spent.steps + 1,
    )


def _premature(config: Config, data: TrainingData) -> Premature:
    """The model that this run is contrasted with. Collective."""
    processes = data.processes
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    sharded = config.engine.zero_stage == 3
    return Premature(config.contrast, data.tokenizer, processes.mesh, processes.device, dtype, sharded=sharded)


def _forward_flops(premature: Premature, data: TrainingData, kept: int) -> float:
    """Model FLOPs of the premature model in a step: a third of what training it would take."""
    vocab, length = data.tokenizer.vocab_size, data.config.data.sequence_length
    return flops_per_token(premature.model_config, vocab, length, kept / data.batch_tokens) * data.batch_tokens / 3


def _step_flops(config: Config, data: TrainingData, kept: int, patch: int | None) -> float:
    """Model FLOPs of a step in which `kept` targets went through the head; of patches, about all of them do."""
    vocab, length = data.tokenizer.vocab_size, config.data.sequence_length
    if patch is not None:
        return flops_per_token(config.model, vocab, length // patch) * data.batch_tokens / patch
    return flops_per_token(config.model, vocab, length, kept / data.batch_tokens) * data.batch_tokens


def due(step: int, interval: int | None) -> bool:
    """Whether something that happens every `interval` steps happens after this one. None: never."""
    return interval is not None and step % interval == 0


def memory_bytes(processes: Processes) -> int:
    """Peak memory of this process: allocated on its GPU, or resident."""
    if processes.device.type == "cuda":
        return torch.cuda.max_memory_allocated(processes.device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def _opening_line(
    config: Config, parameters: int, data: TrainingData, processes: Processes, spent: Spent, memory: MemoryPlan
) -> str:
    """What is about to run, in one line."""
    goldfish = config.goldfish
    loss = "plain loss" if goldfish.k is None else f"goldfish k={goldfish.k} h={goldfish.h} ({goldfish.scheme})"
    origin = config.train.initial_weights
    start = "starts" if origin is None else f"starts from {origin}"
    start = f"continues at step {spent.steps}" if spent.steps else start
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
    if result["kind"] == "canaries":
        levels = [key.removeprefix("loss_") for key in result if key.startswith("loss_")]
        low, high = levels[0], levels[-1]
        recited = result.get(f"recited_{high}")
        return (
            f"step {step}: loss on canaries with {high} copies {result[f'loss_{high}']:.4f}, "
            f"with {low} {result[f'loss_{low}']:.4f}" + (f"; recited {recited:.0%}" if recited is not None else "")
        )
    return f"step {step}: loss on dropped tokens {result['loss_dropped']:.4f}, on kept tokens {result['loss_kept']:.4f}"
