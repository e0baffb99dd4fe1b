"""The command `megafish eval`. Imports what it runs when it runs, like megafish/cli.py."""

from __future__ import annotations

import importlib.util
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from megafish.errors import InputError


class Device(str, Enum):
    """Where a model is evaluated."""

    cpu = "cpu"
    cuda = "cuda"


def eval_(
    run: Annotated[Path, typer.Argument(help="Run directory")],
    tasks: Annotated[
        str, typer.Option(help="Names of lm-eval's tasks and groups, or YAML files, separated by commas; * for many")
    ],
    task_files: Annotated[Path | None, typer.Option(help="Folder with task files of your own (YAML)")] = None,
    limit: Annotated[int | None, typer.Option(help="Documents of each task (default: all)", min=1)] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples before each document (default: as the task says)", min=0)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Requests in one forward pass", min=1)] = 16,
    step: Annotated[int | None, typer.Option(help="Checkpoint step (default: the latest)", min=0)] = None,
    device: Annotated[Device | None, typer.Option(help="Default: a GPU where there is one")] = None,
    output: Annotated[Path | None, typer.Option(help="File to write (default: a new one in RUN/evals)")] = None,
) -> None:
    """Evaluate a model on benchmarks, with the figures that lm-eval gives for its export. Works under torchrun."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("lm-eval is not installed: pip install 'lm-eval>=0.4.13'")

    from megafish.evaluate.harness import evaluate_run

    done = evaluate_run(
        run,
        tasks.split(","),
        task_files=task_files,
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        step=step,
        device=None if device is None else device.value,
        output=output,
    )
    if done is None:
        return
    print(done.table)
    if limit is not None:
        print(f"on the first {limit} documents of each task: without --limit the figures are of all")
    print(f"{done.file}: checkpoint of step {done.results['config']['step']}")
    print(f"next: megafish audit {run}")


def add_to(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(
        "eval",
        epilog="Examples: megafish eval runs/tiny --tasks arc_easy,lambada_openai | "
        "torchrun --nproc-per-node 8 --no-python megafish eval runs/1b --tasks 'mmlu*' --num-fewshot 5",
    )(eval_)
