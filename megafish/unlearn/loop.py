"""Unlearning, from a trained run and two sets of texts to a run that can be audited. `unlearn` reads top to bottom."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from megafish.config import Config, UnlearnConfig
from megafish.data.corpus import run_tokenizer
from megafish.errors import InputError
from megafish.model.load import MANIFEST, STATE, checkpoint_of, initial_weights
from megafish.model.lora import adapt
from megafish.model.transformer import Transformer
from megafish.processes import together
from megafish.run import RunDir, read_json, sha256_file
from megafish.train.checkpoint import check_resume, find_good, load_state
from megafish.train.engine import Engine, Processes, building, from_main, start_processes
from megafish.train.guard import StopRequest
from megafish.train.loop import Outcome, asked_to_stop, claim, due, memory_bytes, open_tracker, watchdog_of
from megafish.train.partition import full_shape
from megafish.train.recovery import Diverged, check_replicas, one_decision
from megafish.train.saver import Saver
from megafish.train.schedule import Budget, Spent
from megafish.train.spikes import StepGuard
from megafish.train.stages import Stages
from megafish.unlearn.adapters import lora_of, merged_weights
from megafish.unlearn.choices import read_asked
from megafish.unlearn.data import read_sets
from megafish.unlearn.locate import RowMask, freeze_others, located_tensors, read_located, term_gradients, write_located
from megafish.unlearn.measure import CutShort, measure, measure_choices
from megafish.unlearn.objective import Objective
from megafish.unlearn.reference import Kind, Reference, check_reference, make_reference

# Of a checkpoint's state what an unlearning run says of itself, and not of the training before it.
_OWN = ("step", "valid_loss", "owes_evaluation", "guard", "model", "optimizer", "premature", "unlearn", "unlearn_spent")


def unlearn(
    config: Config, *, resume: bool = False, console: Console | None = None, stop: StopRequest | None = None
) -> Outcome:
    """Run a method until its steps are done, or until a signal asks to stop. Called by every process of the group.

    With `resume` the run directory is continued from its latest checkpoint. Raises InputError, and Diverged when too
    many steps were not finite.
    """
    console = console or Console()
    settings = config.unlearn
    assert settings is not None
    with ExitStack() as stack:
        stop = stop or stack.enter_context(StopRequest())
        processes = start_processes(config.train.device)
        run = RunDir(config.run_path)
        life = together(lambda: claim(run, processes, resume, stack))
        watchdog = stack.enter_context(watchdog_of(config, run, processes))
        watchdog.mark("reading the texts", 0, slow=True)
        tokenizer = together(lambda: run_tokenizer(config.data))
        sets = together(lambda: read_sets(config, tokenizer))
        asked = together(lambda: read_asked(config, tokenizer))
        objective = Objective(config, sets)
        budget, device = Budget.from_config(config), processes.device
        stages = Stages(config, budget)
        together(lambda: _check_batch(config, processes))

        watchdog.mark("building the model", 0, slow=True)
        start = together(lambda: checkpoint_of(settings.model)[1])
        weights = together(lambda: initial_weights(start, config.model, tokenizer.vocab_size))
        with building(config, processes):
            model = Transformer(
                config.model,
                tokenizer.vocab_size,
                weights=weights,
                activation_checkpointing=config.train.activation_checkpointing,
            )
            shapes = {name: full_shape(parameter) for name, parameter in model.named_parameters()}
            lora = lora_of(settings)
            if lora is not None:
                adapt(model, lora, objective.trained)
        for name, parameter in model.named_parameters():
            if lora is None and not objective.trained(name):
                # Left as it is, but in the optimizer's hands, which is what checkpoints are made of.
                parameter.register_hook(torch.zeros_like)
        engine = Engine(config, model, processes)
        if lora is not None:
            engine.weights = merged_weights(shapes, weights, lora, model)

        origin = together(lambda: _origin(start))
        identity = _identity(config, sets.digest(), origin["model"], engine)
        wanted = objective.wanted()
        reference: Reference | None = None
        if wanted:
            watchdog.mark("asking the starting model", 0, slow=True)
            folder, digest = run.path / "reference", f"{origin['model']}/{sets.digest()}/{_kinds(wanted)}"
            if not together(partial(check_reference, folder, digest)):
                make_reference(folder, engine, wanted, digest, config.train.micro_batch_size)
            compared = any(each.kind is Kind.HIDDEN for each in wanted)
            head = "embedding.weight" if config.model.tie_embeddings else "head.weight"
            # A copy of its own: without ZeRO the model in training lives in the memory that the file is mapped to.
            known = weights(head).to(device, engine.dtype, copy=True) if compared else None
            reference = together(lambda: Reference(folder, device, known))

        shares = _shares(config, processes)
        if settings.method == "memflex":
            watchdog.mark("comparing gradients", 0, slow=True)
            known_by = f"{origin['model']}/{sets.digest()}"
            located = from_main(partial(read_located, run, settings, known_by), processes)
            if located is None:
                located = located_tensors(engine, objective, shares, reference)
                found = located
                together(lambda: write_located(run, settings, known_by, found) if processes.is_main else None)
            freeze_others(model, located)
        rows = None if settings.sure_percentile is None else RowMask(model, settings.sure_percentile)

        watchdog.mark("loading the checkpoint", 0, slow=True)
        guard = StepGuard(config.guard)
        spent, owed = Spent(), True  # owed: an evaluation
        checkpoint, note = find_good(run, processes) if resume else (None, None)
        if checkpoint is not None:
            state = together(partial(_fitting_state, checkpoint, identity, run))
            engine.load(checkpoint)
            guard.load(state["guard"])
            spent, owed = Spent(**state["unlearn_spent"]), state["owes_evaluation"]
            _check_taken_off(run, settings, state, budget.used_up(spent))
        tracker = together(lambda: open_tracker(run, config, spent, processes, console, stack))
        if tracker is not None:
            if note is not None:
                tracker.note(note)
            tracker.note(_opening_line(config, objective, model, spent, processes))
        saver = stack.enter_context(Saver(run, engine, config.checkpoint))

        def cut_short() -> bool:
            watchdog.mark("evaluation", spent.steps, slow=True)
            return asked_to_stop(stop, processes) != 0

        def evaluate() -> None:
            """What the model still knows of both sets. What a signal cuts short is owed to the next resume."""
            nonlocal owed
            owed = True
            record: dict[str, Any] = {}
            chunk = config.train.micro_batch_size
            try:
                for name, items in (("forget", sets.forget), ("retain", sets.retain)):
                    if items:
                        record |= measure(engine, name, items, chunk, cut_short)
                for each in asked:
                    record[f"{each.name}_accuracy"] = measure_choices(engine, each, chunk, cut_short)
            except CutShort:
                return
            owed = False
            if tracker is not None:
                tracker.log({"kind": "unlearned", "step": spent.steps, **record})
                tracker.note(_evaluation_line(spent.steps, record))

        def save(*, wait: bool) -> None:
            if config.guard.replica_check_interval is not None:
                watchdog.mark("comparing the replicas", spent.steps, slow=True)
                check_replicas(run, engine, saver, spent.steps)
            watchdog.mark("saving", spent.steps, slow=True)
            state = {"step": spent.steps, "unlearn_spent": asdict(spent), "valid_loss": None, "guard": guard.state()}
            state["owes_evaluation"] = owed
            state["taken_off"] = settings.method == "task_vector" and budget.used_up(spent)
            saver.save({**state, **origin["record"], **identity}, wait=wait)

        def report_checkpoints() -> None:
            for record in saver.records():
                if tracker is not None:
                    tracker.log(record)

        if owed:
            evaluate()
            if spent.steps and not owed:
                save(wait=True)
        saved, first = spent.steps, True
        number = asked_to_stop(stop, processes)
        while not budget.used_up(spent) and not number:
            # ---- one optimizer step
            began = time.perf_counter()
            watchdog.mark("forward", spent.steps + 1, slow=first)
            plan = objective.plan(spent.steps)
            tokens, answers = _tokens(plan), sum(plan.tokens.values())
            after = spent.plus(samples=len(plan.places), tokens=tokens, supervised_tokens=answers)
            learning_rate = stages.learning_rate(spent, after)
            engine.train()
            # The terms, then: processes asked to stop, that are writing a checkpoint, whose writing failed.
            sums = torch.tensor(
                [0, 0, 0, stop.received is not None, *saver.flags()], dtype=torch.float64, device=device
            )
            if rows is not None:
                rows.masks = {}  # of the step before
                rows.choose(term_gradients(engine, objective, plan, shares, reference, lambda terms: terms.forget))
            for index, mine in enumerate(shares):
                terms = objective.loss(engine, plan, mine, device, reference)
                watchdog.mark("backward", spent.steps + 1, slow=first)
                engine.backward(terms.total, is_last=index == len(shares) - 1)
                sums[:3] += torch.stack([term.detach().double() for term in terms])
            dist.all_reduce(sums)
            loss, forget_loss, retain_loss, stops, writing, failed = sums.tolist()
            saver.poll(int(writing), int(failed))
            watchdog.mark("optimizer", spent.steps + 1, slow=first)
            grad_norm, taken = engine.step(learning_rate, one_decision(guard, loss, processes))
            first = False
            if taken:
                guard.accept(loss, grad_norm)
            else:
                fault = guard.fault(loss, grad_norm) or "refused by another process"
                if tracker is not None:
                    tracker.note(f"step {after.steps} refused: {fault}")
                if guard.refuse(loss, grad_norm):
                    saver.finish()
                    raise Diverged(
                        f"{run.path}: {fault}: too many steps refused; lower optimizer.lr or unlearn.forget_weight, or "
                        "take a method that is bounded (npo, simnpo)"
                    )
            saver.allocate()
            spent = after
            last = budget.used_up(spent)

            # ---- report, measure, save
            if tracker is not None and taken:
                record = {
                    "kind": "train",
                    "step": spent.steps,
                    "time": time.time(),
                    "loss": loss,
                    "forget_loss": forget_loss,
                    "retain_loss": retain_loss,
                    "lr": learning_rate,
                    "grad_norm": grad_norm,
                    "drop_rate": 0.0,
                    "tokens": spent.tokens,
                    "supervised_tokens": spent.supervised_tokens,
                    "progress": budget.progress(spent),
                    "tokens_per_s": tokens / (time.perf_counter() - began),
                    "memory_bytes": memory_bytes(processes),
                }
                if last or spent.steps % config.track.log_interval == 0:
                    tracker.log(record)
                tracker.show(budget.progress(spent), record)
            if last and settings.method == "task_vector":
                watchdog.mark("taking the change off", spent.steps, slow=True)
                # Read anew: without ZeRO the model in training lives in the memory that the file is mapped to.
                unchanged = together(partial(initial_weights, start, config.model, tokenizer.vocab_size))
                engine.extrapolate(unchanged, settings.option("negation"))
            if last or due(spent.steps, config.eval.interval):
                evaluate()
            if last or due(spent.steps, config.checkpoint.interval):
                save(wait=last)
                saved = spent.steps
            report_checkpoints()
            if stops or owed:
                number = asked_to_stop(stop, processes)

        if spent.steps != saved:
            save(wait=True)
        saver.finish()
        report_checkpoints()
        signal = Signals(number) if number and (owed or not budget.used_up(spent)) else None
        if life is not None:
            life.end(signal)
        return Outcome(run, spent, signal)


def _check_taken_off(run: RunDir, settings: UnlearnConfig, state: dict[str, Any], ended: bool) -> None:
    """A task vector is taken off once, after the last step."""
    steps = state["step"]
    if state.get("taken_off") and not ended:
        raise InputError(
            f"{run.path}: its task vector has been taken off after step {steps}: start a run of its own for more steps"
        )
    if settings.method == "task_vector" and ended and not state.get("taken_off"):
        raise InputError(
            f"{run.path}: stands at step {steps}, where its task vector is not taken off: set train.steps above {steps}"
        )


def _check_batch(config: Config, processes: Processes) -> None:
    train = config.train
    if train.global_batch_size % (train.micro_batch_size * processes.world_size):
        raise InputError(
            f"train.global_batch_size={train.global_batch_size} is not a multiple of train.micro_batch_size="
            f"{train.micro_batch_size} x {processes.world_size} processes"
        )


def _shares(config: Config, processes: Processes) -> list[slice]:
    """The places of the global batch that this process reads, a forward pass each."""
    micro = config.train.micro_batch_size
    own = config.train.global_batch_size // processes.world_size
    start = own * processes.rank
    return [slice(at, at + micro) for at in range(start, start + own, micro)]


def _tokens(plan: Any) -> int:
    return sum(len(role.item.tokens) - 1 for place in plan.places for role in place)


def _origin(start: Path) -> dict[str, Any]:
    """Digest of the starting model, and what its checkpoint says of its training: an audit asks for that."""
    state = read_json(start / STATE)
    record = {key: value for key, value in state.items() if key not in _OWN}
    return {"model": sha256_file(start / MANIFEST) if (start / MANIFEST).is_file() else "", "record": record}


def _identity(config: Config, texts: str, start: str, engine: Engine) -> dict[str, Any]:
    """What a continuation must share with the run it continues."""
    assert config.unlearn is not None
    method = config.unlearn.identity()
    batch = config.train.global_batch_size
    return {
        "model": config.model.model_dump(mode="json"),
        "optimizer": engine.optimizer_name,
        "unlearn": {**method, "texts": texts, "start": start, "global_batch_size": batch},
    }


def _fitting_state(checkpoint: Path, identity: dict[str, Any], run: RunDir) -> dict[str, Any]:
    state = load_state(checkpoint)
    if "unlearn_spent" not in state:
        raise InputError(f"{checkpoint}: not a checkpoint of an unlearning run: continue it with `megafish train`")
    check_resume({key: state[key] for key in identity if key in state}, identity, run)
    return state


def _kinds(wanted: Any) -> str:
    return ",".join(f"{each.name}:{each.kind.value}:{each.block or ''}" for each in wanted)


def _opening_line(config: Config, objective: Objective, model: Transformer, spent: Spent, processes: Processes) -> str:
    settings, sets = config.unlearn, objective.sets
    assert settings is not None
    begin = f"continues at step {spent.steps}" if spent.steps else f"starts from {settings.model}"
    trained = "" if objective.layer is None else f", block {objective.layer} steered"
    if settings.sure_percentile is not None:
        trained += f", rows from percentile {settings.sure_percentile:g} on"
    trained += "" if settings.lora_rank is None else f", adapters of rank {settings.lora_rank}"
    return (
        f"{config.name} {begin}: {settings.method}, {len(sets.forget)} texts to forget, {len(sets.retain)} to retain"
        f"{trained}, {config.train.steps} steps of {config.train.global_batch_size}, {processes.world_size} x "
        f"{processes.device.type}, ZeRO {config.engine.zero_stage}, {config.train.precision}"
    )


def _evaluation_line(step: int, record: dict[str, Any]) -> str:
    parts = [
        f"{name} loss {record[f'{name}_loss']:.4f}, extraction strength {record[f'{name}_extraction_strength']:.3f}"
        for name in ("forget", "retain")
        if f"{name}_loss" in record
    ]
    end = "_accuracy"
    parts += [
        f"right choices of {key.removesuffix(end)} {value:.3f}" for key, value in record.items() if key.endswith(end)
    ]
    return f"step {step}: {'; '.join(parts)}"
