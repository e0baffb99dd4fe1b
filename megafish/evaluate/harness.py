"""Tasks of lm-eval on a run: find them, evaluate, write down what came of it."""

from __future__ import annotations

import difflib
import json
import logging
import os
import random
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Our own bars are shown. tqdm reads this when it is imported, by lm-eval at the latest.
os.environ.setdefault("TQDM_DISABLE", "1")

import datasets
import jinja2
import numpy as np
import torch
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import handle_non_serializable, make_table

from megafish import __version__
from megafish.decode.packed import for_decoding
from megafish.errors import InputError
from megafish.evaluate.lm import RunLM
from megafish.model.flops import parameter_count
from megafish.model.load import checkpoint_of, load_run
from megafish.processes import Processes, device_of, joined_processes, together
from megafish.run import RunDir, write_atomic

# The seeds that `lm_eval` itself starts with, so that the same examples are shown to a model here and there.
_PYTHON_SEED, _SEED = 0, 1234
# Samples that an error bar without a closed form is taken from: lm-eval's default.
_BOOTSTRAP = 100_000


@dataclass(frozen=True)
class Evaluated:
    """Where the figures of an evaluation stand, and what stands there."""

    file: Path
    results: dict[str, Any]

    @property
    def table(self) -> str:
        """The figures with their standard errors, a second time by groups where there are any."""
        tables = [make_table(self.results)]
        if "groups" in self.results:
            tables.append(make_table(self.results, "groups"))
        return "\n".join(table.strip("\n") for table in tables)


def evaluate_run(
    path: str | Path,
    tasks: Sequence[str],
    *,
    task_files: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 16,
    step: int | None = None,
    device: str | None = None,
    output: Path | None = None,
    progress: bool = True,
) -> Evaluated | None:
    """Evaluate a run (or a checkpoint folder inside it) and write the figures to `output`, by default
    RUN/evals/step_XXXXXXXX_DATE.json. The file appears when it is complete.

    tasks: names of lm-eval's tasks, groups and tags (with * for several), or YAML files. task_files: a folder with
    tasks of one's own. limit: documents of each task, all by default. num_fewshot: examples before each, by default as
    the task says. Under torchrun the requests are shared among the processes; the first one gets the result, the others
    None. Raises InputError.
    """
    start = time.monotonic()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    with joined_processes() as processes:
        place = together(lambda: device_of(device))
        run, folder = together(lambda: _found(path, step, output))
        chosen = together(lambda: load_tasks(tasks, task_files, num_fewshot))
        loaded = together(lambda: load_run(path, step, place))
        loaded = replace(loaded, model=for_decoding(loaded.model))
        lm = RunLM(loaded, batch_size=batch_size, processes=processes, progress=progress)
        found = _evaluate(lm, chosen, limit, processes)
    if not processes.is_main:
        return None
    now = datetime.now(timezone.utc)
    file = output if output is not None else run.path / "evals" / f"{folder.name}_{now:%Y-%m-%dT%H-%M-%S}.json"
    results = {
        **found,
        "config": {
            "model": "megafish",
            "model_args": {"run": str(run.path), "step": loaded.step},
            "checkpoint": str(folder),
            "step": loaded.step,
            "model_num_parameters": parameter_count(loaded.model.config, loaded.model.vocab_size),
            "model_dtype": str(loaded.model.embedding.weight.dtype),
            "max_length": lm.max_length,
            "tokenizer_sha256": loaded.tokenizer.sha256,
            "tasks": list(tasks),
            "task_files": None if task_files is None else str(task_files),
            "limit": limit,
            "num_fewshot": num_fewshot,
            "batch_size": batch_size,
            "device": place.type,
            "processes": processes.size,
            "bootstrap_iters": _BOOTSTRAP,
        },
        "run_config": loaded.config.model_dump(mode="json"),
        "megafish_version": __version__,
        "lm_eval_version": version("lm_eval"),
        "date": now.timestamp(),
        "total_evaluation_time_seconds": round(time.monotonic() - start, 3),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(results, indent=2, ensure_ascii=False, default=handle_non_serializable) + "\n")
    return Evaluated(file, results)


def _found(path: str | Path, step: int | None, output: Path | None) -> tuple[RunDir, Path]:
    run, folder = checkpoint_of(path, step)
    if output is not None and output.exists():
        raise InputError(f"{output}: there is something already: name another file, nothing is overwritten")
    return run, folder


def _evaluate(lm: RunLM, chosen: dict[str, Any], limit: int | None, processes: Processes) -> dict[str, Any]:
    random.seed(_PYTHON_SEED)
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)
    try:
        with redirect_stdout(sys.stderr):  # lm-eval prints when it begins with an error bar
            found = evaluate(
                lm=lm,
                task_dict=chosen,
                limit=limit,
                # Every process computes the figures, but only the first one's are used.
                bootstrap_iters=_BOOTSTRAP if processes.rank == 0 else 0,
                log_samples=False,
            )
    except jinja2.TemplateError as error:
        names = ", ".join(chosen["tasks"])
        raise InputError(f"a template of {names} does not fit its documents ({_first_line(error)})") from None
    results: dict[str, Any] = dict(found)
    return results


def load_tasks(names: Sequence[str], task_files: Path | None = None, num_fewshot: int | None = None) -> dict[str, Any]:
    """lm-eval's tasks (as TaskManager.load gives them) with their data, tried on one document each. Raises InputError
    for a name that is not known, and for a task that cannot be used."""
    if task_files is not None and not task_files.is_dir():
        raise InputError(f"{task_files}: no such folder of task files")
    manager, specs = _find(names, task_files)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for spec in specs:
        try:
            part = manager.load([spec])
        except Exception as error:  # a task is a program of its own: it may fail in any way
            raise InputError(f"task {spec}: cannot be loaded ({_first_line(error)})") from None
        twice = part["tasks"].keys() & loaded["tasks"].keys()
        if twice:
            raise InputError(f"task {min(twice)} is asked for twice, the second time by {spec}: name it once")
        for kind in loaded:
            loaded[kind] |= part[kind]
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise InputError(f"task {name} runs code that the model writes: use lm_eval on the export, in a sandbox")
        if getattr(task, "MULTIMODAL", False):
            raise InputError(f"task {name} shows images or sounds: this model reads text")
        _set_fewshot(task, num_fewshot)
        try:
            empty = not len(task.eval_docs)
            if not empty:
                task.build_all_requests(limit=1)
        except Exception as error:
            raise InputError(f"task {name}: does not fit its documents ({_first_line(error)})") from None
        if empty or not task.instances:
            raise InputError(f"task {name}: its data holds no document to evaluate on")
        task.set_fewshot_seed(seed=_SEED)  # again: the trial has drawn examples
    return loaded


def _set_fewshot(task: Any, number: int | None) -> None:
    """lm-eval's rule: a task that says 0 keeps it, one that says nothing has 0."""
    default = task.get_config("num_fewshot")
    if number is None:
        number = default or 0
    if default is None or default != 0:
        task.set_config(key="num_fewshot", value=number)
    task.set_fewshot_seed(seed=_SEED)


def _find(names: Sequence[str], task_files: Path | None) -> tuple[TaskManager, list[str]]:
    """An index of tasks that knows the names, and the names with their patterns spelled out."""
    names = list(dict.fromkeys(name.strip() for name in names if name.strip()))
    if not names:
        raise InputError("no task: name some of lm-eval's, e.g. --tasks arc_easy,hellaswag")
    paths = None if task_files is None else str(task_files)
    # To read the ten thousand files of lm-eval's own tasks takes seconds. A group may name tasks among them.
    own = TaskManager(include_path=paths, include_defaults=False)
    if all(name in own.all_subtasks or _is_file(name) for name in names):
        return own, names
    manager = TaskManager(include_path=paths)
    specs: list[str] = []
    for name in names:
        if name in manager.all_tasks or _is_file(name):
            specs.append(name)
        elif any(sign in name for sign in "*?[") and (matches := manager.match_tasks([name])):
            specs += matches
        else:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            advice = f": did you mean {', '.join(near)}?" if near else ""
            raise InputError(f"no task {name!r}{advice}{_broken(task_files)}")
    return manager, list(dict.fromkeys(specs))


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


def _broken(task_files: Path | None) -> str:
    """What may be the reason that a task in a folder is not known."""
    for file in sorted(task_files.rglob("*.yaml")) if task_files is not None else ():
        try:
            load_yaml(file, resolve_func=False)
        except Exception as error:
            return f" ({file} cannot be read: {_first_line(error)})"
    return ""


def _first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
