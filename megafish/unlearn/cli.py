"""The command `megafish unlearn`. Imports what it runs when it runs, like megafish/cli.py."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from megafish.errors import Stopped


def unlearn(
    source: Annotated[str, typer.Argument(help="Run to start from, YAML file, or an unlearning run to continue")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Settings, e.g. unlearn.method=npo unlearn.forget=forget.jsonl unlearn.retain=retain.jsonl"
        ),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved configuration and stop")
    ] = False,
) -> None:
    """Remove what got into a model: gradient ascent, NPO, RMU and others. Works under torchrun, deepspeed and srun."""
    from megafish.train.guard import EXIT_CORRUPT, EXIT_DIVERGED, StopRequest

    with StopRequest() as stop:
        from megafish.config import dump_config
        from megafish.unlearn.settings import unlearning_config

        config, resume = unlearning_config(source, overrides or [])
        if print_config:
            print(dump_config(config, with_help=True), end="")
            return

        from megafish.train.recovery import Diverged
        from megafish.train.replicas import ReplicasDiffer
        from megafish.unlearn.loop import unlearn as run_unlearn

        try:
            outcome = run_unlearn(config, resume=resume, stop=stop)
        except (Diverged, ReplicasDiffer) as error:
            if os.environ["RANK"] == "0":
                print(f"error: {error}", file=sys.stderr)
            raise SystemExit(EXIT_DIVERGED if isinstance(error, Diverged) else EXIT_CORRUPT) from None
    if os.environ.get("RANK", "0") == "0":
        ended = f"{outcome.run.path}: step {outcome.spent.steps}"
        if outcome.signal is None:
            print(f"{ended}\nnext: megafish audit {outcome.run.path}")
        else:
            print(f"{ended}; stopped by {outcome.signal.name}\nnext: megafish unlearn {outcome.run.path}")
    if outcome.signal is not None:
        raise Stopped(128 + outcome.signal)


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(
        epilog="Examples: megafish unlearn runs/tiny unlearn.method=npo unlearn.forget=forget.jsonl "
        "unlearn.retain=retain.jsonl | megafish unlearn runs/tiny-npo (continues)"
    )(unlearn)
