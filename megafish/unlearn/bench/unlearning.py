"""Unlearning runs of the bench: tuning within a budget, the final ones, and teaching it all again."""

from __future__ import annotations

import gc
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megafish.config import UnlearnConfig
from megafish.model.load import load_run
from megafish.run import RunDir, read_json, write_atomic
from megafish.train.recovery import Diverged
from megafish.unlearn.augment import augment
from megafish.unlearn.bench.models import data_of, model_of
from megafish.unlearn.bench.plan import AT_THE_END, OPTIONS, RETAIN_KEPT, START, VARIANTS, Plan, Suite
from megafish.unlearn.choices import chance, read_questions
from megafish.unlearn.items import extraction, read_texts
from megafish.unlearn.loop import unlearn
from megafish.unlearn.metrics import harmonic_mean
from megafish.unlearn.settings import unlearning_config

TUNED_ON = 0
"""Seed whose models the methods are tuned on."""


@dataclass(frozen=True)
class Chosen:
    """What tuning found."""

    settings: dict[str, Any]
    steps: int
    aim: float
    """Extraction strength, or accuracy on questions with choices, to come to."""
    trials: list[dict[str, Any]]
    """Every setting with its curve (`curve_of`)."""


def tuned(folder: Path, plan: Plan, suite: Suite, method: str) -> Chosen:
    """The settings of a method and its number of steps, by what a user can see.

    Where there are questions with choices, their accuracy decides, and the aim is that of guessing. Otherwise the
    extraction strength does: where nothing should show that something was removed, the aim is the strength that the
    starting model has on texts of the same kind that it never saw; elsewhere it is 0. Each trial is one run that is
    measured on its way. Neither the retain model nor any score takes part.
    """
    record = _tuning_of(folder, suite, method)
    if record.is_file():
        return Chosen(**read_json(record))
    aim = _aim(folder, suite)
    steps, every = plan.steps(method)
    trials = []
    for number, settings in enumerate(plan.trials(method)):
        run = folder / "tuning" / suite.name / f"{method}-{number}"
        records = _run(
            run, _start(folder, TUNED_ON), _settings(folder, plan, suite, method, TUNED_ON, settings),
            steps=steps, every=every, seed=TUNED_ON,
        )  # fmt: skip
        curve = curve_of(records, suite)
        trials.append({"settings": settings, "curve": [curve[0], curve[-1]] if method in AT_THE_END else curve})
        shutil.rmtree(run)
    chosen = choose(trials, aim)
    record.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(record, json.dumps(asdict(chosen)) + "\n")
    return chosen


def is_tuned(folder: Path, _plan: Plan, suite: Suite, method: str) -> bool:
    """Whether a method's settings are chosen."""
    return _tuning_of(folder, suite, method).is_file()


def _tuning_of(folder: Path, suite: Suite, method: str) -> Path:
    return folder / "tuning" / suite.name / f"{method}.json"


def curve_of(records: list[dict[str, Any]], suite: Suite) -> list[tuple[int, float, float]]:
    """(step, what the forget set comes to, share that is kept) of each measurement.

    The forget set comes to its extraction strength, or, where the suite asks questions with choices, to the accuracy on
    those to forget. Kept is the retain set's strength beside that before; with choices the accuracy on those about
    everything else too: the lower of the two shares.
    """
    gone, kept = "forget_extraction_strength", ["retain_extraction_strength"]
    if suite.choices:
        gone, *_, others = (f"{Path(name).name}_accuracy" for name in suite.choices)
        kept.append(others)
    first = records[0]
    return [
        (record["step"], record[gone], min(record[name] / max(first[name], 1e-9) for name in kept))
        for record in records
    ]


def choose(trials: list[dict[str, Any]], aim: float) -> Chosen:
    """Of the points that keep enough the one nearest to the aim, of equal ones (to 0.01) the one that keeps the most;
    where none does, the one whose harmonic mean of (1 - forget, kept) is the highest."""
    points = [(trial["settings"], *each) for trial in trials for each in trial["curve"] if each[0] > 0]
    keeping = [point for point in points if point[3] >= RETAIN_KEPT]
    if keeping:
        best = min(keeping, key=lambda point: (round(abs(point[2] - aim), 2), -point[3], point[1]))
    else:
        best = max(points, key=lambda point: (harmonic_mean([1 - point[2], point[3]]), -point[1]))
    return Chosen(best[0], best[1], aim, trials)


def _aim(folder: Path, suite: Suite) -> float:
    if suite.choices:
        return chance(read_questions([data_of(folder, TUNED_ON) / f"{suite.choices[0]}.jsonl"]))
    if not suite.hides:
        return 0.0
    loaded = load_run(_start(folder, TUNED_ON))
    path = str(data_of(folder, TUNED_ON) / f"{suite.holdout}.jsonl")
    settings = UnlearnConfig(model="before", method="ga", forget=[path])
    return extraction(loaded, read_texts("holdout", [path], settings, loaded), batch_size=64)


def final(folder: Path, plan: Plan, suite: Suite, method: str, seed: int) -> Path | None:
    """The run of a method with the settings that tuning chose, left there to be scored; None where it diverged."""
    chosen = tuned(folder, plan, suite, method)
    run = run_of(folder, suite, method, seed)
    shutil.rmtree(run, ignore_errors=True)
    settings = _settings(folder, plan, suite, method, seed, chosen.settings)
    _run(run, _start(folder, seed), settings, steps=chosen.steps, every=None, seed=seed)
    return run if RunDir(run).latest() is not None else None


def run_of(folder: Path, suite: Suite, method: str, seed: int) -> Path:
    """Folder of a final run."""
    return folder / f"seed{seed}" / suite.name / method


def relearned(folder: Path, plan: Plan, suite: Suite, model: Path, seed: int) -> list[float]:
    """Extraction strength of the forget set after 0, 1, 2 ... steps of fine-tuning a model on it."""
    forget = data_of(folder, seed) / f"{suite.forget}.jsonl"
    run = model.with_name(f"{model.name}-{suite.name}-relearned")
    shutil.rmtree(run, ignore_errors=True)
    batch = {"global_batch_size": plan.batch, "micro_batch_size": plan.batch}
    settings = [
        "unlearn.method=relearn",
        f"unlearn.substitutes={forget}",
        f"unlearn.forget={forget}",
        "unlearn.retain_loss=none",
        f"train={json.dumps(batch)}",
        "optimizer.lr=1e-4",
    ]
    records = _run(run, model, settings, steps=plan.relearn_steps, every=1, seed=seed)
    shutil.rmtree(run)
    return [record["forget_extraction_strength"] for record in records]


def _start(folder: Path, seed: int) -> Path:
    return model_of(folder, seed, START)


def _settings(folder: Path, plan: Plan, suite: Suite, method: str, seed: int, chosen: dict[str, Any]) -> list[str]:
    sets = data_of(folder, seed)
    forget, *others = (sets / f"{name}.jsonl" for name in (suite.forget, *suite.retain, *suite.choices))
    retain, choices = others[: len(suite.retain)], others[len(suite.retain) :]
    batch = {"global_batch_size": plan.batch, "micro_batch_size": plan.batch}
    found = [
        f"unlearn.method={VARIANTS.get(method, method)}",
        f"unlearn.forget={forget}",
        f"unlearn.retain={json.dumps(list(map(str, retain)))}",
        f"unlearn.choices={json.dumps(list(map(str, choices)))}",
        f"train={json.dumps(batch)}",
        *(f"unlearn.{key}={value}" for key, value in OPTIONS.get(method, {}).items()),
        *(f"{key}={value}" for key, value in chosen.items()),
    ]
    if method == "relearn":
        vague = sets / suite.forget.replace("/", "-")
        if not vague.with_suffix(".vague.jsonl").is_file():
            augment([str(forget)], vague.with_suffix(".vague.jsonl"), generic=[str(sets / "unsafe/harmless.jsonl")])
        found.append(f"unlearn.substitutes={vague.with_suffix('.vague.jsonl')}")
    return found


def _run(
    run: Path, start: Path, settings: list[str], *, steps: int, every: int | None, seed: int
) -> list[dict[str, Any]]:
    """One unlearning run at a constant rate; its measurements."""
    constant = ["schedule.name=constant", "schedule.warmup_steps=0", "checkpoint.interval=null"]
    config, _ = unlearning_config(
        str(start),
        [
            *settings,
            *constant,
            f"unlearn.model={start}",
            f"run_dir={run}",
            f"train.steps={steps}",
            f"train.seed={seed}",
            f"unlearn.seed={seed}",
            f"eval.interval={'null' if every is None else every}",
        ],
    )
    shutil.rmtree(run, ignore_errors=True)
    try:
        outcome = unlearn(config, console=Console(quiet=True))
        if outcome.signal is not None:
            raise KeyboardInterrupt
    except Diverged:
        pass  # what was measured until then stands
    gc.collect()  # the engine's reference cycles hold the model and its moments
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record.get("kind") == "unlearned"]
