"""What the loop does about bad steps, a way back, and replicas that differ."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megafish.data.loader import ReadOrder, StepBatch
from megafish.data.quarantine import Quarantine, append_entry
from megafish.errors import InputError
from megafish.processes import together
from megafish.run import RunDir
from megafish.train.checkpoint import check_resume, find_good, load_state, set_aside
from megafish.train.data import TrainingData
from megafish.train.engine import Engine, Processes, from_main, largest
from megafish.train.replicas import ReplicasDiffer, differing_replicas
from megafish.train.saver import Saver
from megafish.train.schedule import Spent
from megafish.train.spikes import StepGuard
from megafish.train.track import Tracker


class Diverged(RuntimeError):
    """Too many steps had a loss or a gradient norm that was not finite, or a spike."""


@dataclass(frozen=True)
class Restored:
    """Where a run continues: all zero where there is no checkpoint."""

    spent: Spent = field(default_factory=Spent)
    order: ReadOrder = field(default_factory=ReadOrder)
    owes_evaluation: bool = False
    """Whether a signal cut short the evaluation of that step."""
    note: str | None = None
    """A line to say where it is not the latest checkpoint."""


@dataclass(frozen=True)
class Restorer:
    """Brings a run to the state of its newest good checkpoint: on a resume, and on the way back from bad steps."""

    run: RunDir
    engine: Engine
    data: TrainingData
    guard: StepGuard
    identity: dict[str, Any]
    """What a checkpoint must share with the run that continues it."""

    def restore(self) -> Restored:
        """Load the newest good checkpoint, if there is one. Collective."""
        folder, note = find_good(self.run, self.engine.processes)
        if folder is None:
            return Restored()
        state = together(partial(self._fitting_state, folder))
        self.engine.load(folder)
        self.guard.load(state.get("guard"))
        return Restored(Spent(**state["spent"]), ReadOrder(**state["order"]), state.get("owes_evaluation", False), note)

    def _fitting_state(self, folder: Path) -> dict[str, Any]:
        """state.json, once it is found to be one that this run may continue."""
        state = load_state(folder)
        if "imported" in state:
            raise InputError(
                f"{self.run.path}: an imported model has no optimizer state to continue from: start a run from "
                f"it with `megafish train {self.run.config_file} name=NAME data.train=CORPUS`"
            )
        check_resume(state, self.identity, self.run)
        self.data.check_order(ReadOrder(**state["order"]))
        return state


def one_decision(guard: StepGuard, loss: float, processes: Processes) -> Callable[[float], bool]:
    """Takes a gradient norm and says whether to take the step, in the same way in every process. Collective.

    The numbers are the same everywhere unless a device miscalculates. Exchanging the verdict (one number) makes sure
    that no process takes a step that another refuses, which would make them wait for each other, or drift apart.
    """
    return lambda norm: largest(int(guard.fault(loss, norm) is not None), processes) == 0


def report_refusal(
    run: RunDir, tracker: Tracker, batch: StepBatch, step: int, loss: float, grad_norm: float, fault: str
) -> None:
    """Quarantine the samples of a refused step, in the file that every resume reads, and say so. Main process."""
    numbers = {"loss": loss, "grad_norm": grad_norm}
    why = {
        **{key: value if math.isfinite(value) else None for key, value in numbers.items()},  # JSON has no infinity
        "fault": fault,
        "data_hash": batch.data_hash,
    }
    for first, count in batch.ranges:
        append_entry(run.quarantine_file, {"step": step, "first_sample": first, "samples": count, **why})
    samples = sum(count for _, count in batch.ranges)
    tracker.log({"kind": "skipped", "step": step, "first_sample": batch.first_sample, "samples": samples, **why})
    tracker.note(
        f"step {step} refused: {fault}; samples {batch.first_sample} to {batch.end - 1} are left out from now on"
    )


def go_back(restorer: Restorer, tracker: Tracker | None, rollbacks: int, fault: str) -> Restored:
    """Return to the newest checkpoint, the `rollbacks`-th time in a row; Diverged when that has been tried enough."""
    run = restorer.run
    advice = (
        "training diverged; lower optimizer.lr or raise schedule.warmup_fraction, then resume or start again. The "
        f"samples of refused steps stay left out unless you remove {run.quarantine_file}"
    )
    if rollbacks > restorer.guard.config.max_rollbacks:
        tried = f", also after going back to a checkpoint {rollbacks - 1} times" if rollbacks > 1 else ""
        raise Diverged(f"{run.path}: {fault}: too many steps refused{tried}: {advice}")
    point = restorer.restore()
    if not point.spent.steps:
        raise Diverged(f"{run.path}: {fault}: too many steps refused, and no checkpoint to go back to: {advice}")
    if point.note is not None:
        together(lambda: set_aside(run, point.spent.steps) if restorer.engine.processes.is_main else None)
    if tracker is not None:
        tracker.go_back(point.spent.steps)
        if point.note is not None:
            tracker.note(point.note)
        tracker.note(f"too many steps refused: back to step {point.spent.steps}, without the samples of those steps")
    return point


def shared_quarantine(run: RunDir, processes: Processes) -> Quarantine:
    """The samples to leave out, as the main process reads them. Collective."""
    return Quarantine(from_main(lambda: Quarantine.read(run.quarantine_file).ranges, processes))


def check_replicas(run: RunDir, engine: Engine, saver: Saver, step: int) -> None:
    """Raise ReplicasDiffer where processes that should hold the same weights do not. Collective."""
    difference = differing_replicas(engine.module, engine.processes.mesh.tensor.rank)
    if difference is not None:
        saver.finish()  # what is on its way was found good
        latest = run.latest()
        advice = "no checkpoint was written yet" if latest is None else f"{latest.name} was written before: resume"
        raise ReplicasDiffer(
            f"{run.path}: step {step}: {difference}: the memory or the arithmetic of a device is at fault; leave its "
            f"node out. {advice}"
        )
