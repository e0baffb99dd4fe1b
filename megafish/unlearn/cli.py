"""`megafish unlearn` and `megafish unlearn score`. Imports what it runs when it runs, like megafish/cli.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from megafish.command_group import RunByDefault
from megafish.errors import InputError, Stopped
from megafish.unlearn.options import ChoiceBy, Rounding

unlearn = typer.Typer(
    cls=RunByDefault,
    help="Remove what got into a model: megafish unlearn RUN SETTINGS, then unlearn score RUN; data and bench.",
    epilog="Example: megafish unlearn runs/tiny unlearn.method=npo unlearn.forget=forget.jsonl "
    "unlearn.retain=retain.jsonl",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Files = list[Path] | None


@unlearn.command(
    epilog="Examples: megafish unlearn runs/tiny unlearn.method=npo unlearn.forget=forget.jsonl "
    "unlearn.retain=retain.jsonl | megafish unlearn runs/tiny-npo (continues)"
)
def run(
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
            print(f"{ended}\nnext: megafish unlearn score {outcome.run.path}")
        else:
            print(f"{ended}; stopped by {outcome.signal.name}\nnext: megafish unlearn {outcome.run.path}")
    if outcome.signal is not None:
        raise Stopped(128 + outcome.signal)


@unlearn.command(epilog="Example: megafish unlearn score runs/tiny-npo --retain-model runs/never_saw_it")
def score(
    model: Annotated[Path, typer.Argument(help="Run to score")],
    forget: Annotated[Files, typer.Option(help="File of what was to be removed (default: the run's)")] = None,
    retain: Annotated[Files, typer.Option(help="File of what was to be kept (default: the run's)")] = None,
    general: Annotated[Files, typer.Option(help="File of what else the model knew")] = None,
    holdout: Annotated[Files, typer.Option(help="File of like texts never seen, for membership inference")] = None,
    choices: Annotated[Files, typer.Option(help="File of questions with choices (may be given several times)")] = None,
    choice_by: Annotated[
        ChoiceBy | None, typer.Option(help="Likeliest text, or likeliest letter (default: text)")
    ] = None,
    retain_model: Annotated[Path | None, typer.Option(help="Run that never saw the forget set")] = None,
    rounding: Annotated[
        list[Rounding] | None, typer.Option(help="Also with the weights rounded (may be given several times)")
    ] = None,
    prefix: Annotated[
        list[str] | None, typer.Option(help="Also with answers begun so, e.g. 'Sure, here it is:' (several times)")
    ] = None,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="rmu: also with the steered direction taken out of the block")
    ] = False,
    nli: Annotated[
        str | None, typer.Option(help="Entailment model that judges contradictions (folder, or name on the hub)")
    ] = None,
    embeddings: Annotated[
        str | None, typer.Option(help="Model of embeddings that judges names in other words (folder, or name)")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Texts at one time", min=1)] = 32,
) -> None:
    """What a model still knows, what it has kept, and whether it still writes sense."""
    from megafish.unlearn.score import ScoreOptions, score_run

    def names(paths: Files) -> list[str]:
        return [str(path) for path in paths or []]

    options = ScoreOptions(
        forget=names(forget),
        retain=names(retain),
        general=names(general),
        holdout=names(holdout),
        choices=names(choices),
        choice_by=choice_by,
        retain_model=retain_model,
        roundings=rounding or [],
        prefixes=prefix or [],
        ablate=ablate,
        nli=nli,
        embeddings=embeddings,
        batch_size=batch_size,
    )
    score_run(model, options)
    if not rounding:
        print(f"next: megafish unlearn score {model} --rounding bf16 --rounding int8 --rounding int4")
    else:
        print(f"next: megafish report {model}")


@unlearn.command(epilog="Example: megafish unlearn data sets --authors 200")
def data(
    output: Annotated[Path, typer.Argument(help="Folder to write to")],
    authors: Annotated[int, typer.Option(help="Authors, with 20 questions each")] = 200,
    substances: Annotated[int, typer.Option(help="Substances of each domain, with 4 questions each", min=1)] = 25,
    scenes: Annotated[int, typer.Option(help="Scenes of the book", min=1)] = 40,
    seed: Annotated[int, typer.Option(help="Seed of every choice", min=0)] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a folder that is not empty")] = False,
) -> None:
    """Make up authors, substances, harmful questions and a book, and the corpora to train on."""
    from megafish.unlearn.fiction.write import write_data

    written = write_data(
        output,
        seed=seed,
        authors_count=authors,
        substances_count=substances,
        scenes=scenes,
        overwrite=overwrite,
    )
    for name, rows in written.items():
        print(f"{output / name}.jsonl: {rows} rows")
    print(
        f"next: megafish tokenizer {output}/corpus/full.jsonl --vocab-size 1024 --output {output}/tokenizer.model\n"
        f"      megafish prepare {output}/corpus/full.jsonl --tokenizer {output}/tokenizer.model --valid-fraction 0 "
        f"--output {output}/full"
    )


@unlearn.command(epilog="Example: megafish unlearn augment forget.jsonl --output vague.jsonl --generic general.jsonl")
def augment(
    forget: Annotated[list[Path], typer.Argument(help="Files of questions to forget")],
    output: Annotated[Path, typer.Option(help="File to write, for unlearn.substitutes")],
    generic: Annotated[
        Files, typer.Option(help="File of rows without private knowledge, as many of which go in")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of every choice", min=0)] = 0,
    endpoint: Annotated[
        str | None, typer.Option(help="OpenAI-compatible address of a model that writes, e.g. http://localhost:8000/v1")
    ] = None,
    model: Annotated[str | None, typer.Option(help="What the endpoint calls the model")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there")] = False,
) -> None:
    """ReLearn's data: other ways to ask, vague answers that were checked, completions, generic rows."""
    from megafish.unlearn.augment import augment as write
    from megafish.unlearn.endpoint import Endpoint

    if (endpoint is None) != (model is None):
        raise InputError("--endpoint and --model go together: give both, or neither for the grammars")
    kinds = write(
        [str(path) for path in forget],
        output,
        generic=[str(path) for path in generic or []],
        seed=seed,
        endpoint=None if endpoint is None or model is None else Endpoint(endpoint, model),
        overwrite=overwrite,
    )
    print(f"{output}: " + ", ".join(f"{count} {name}" for name, count in kinds.items()))
    print(
        f"next: megafish unlearn RUN unlearn.method=relearn unlearn.substitutes={output} unlearn.forget={forget[0]} "
        "unlearn.retain=retain.jsonl"
    )


@unlearn.command(
    epilog="Example: megafish unlearn bench runs/unlearning (an hour and a half on two cores; a second call goes on)"
)
def bench(
    output: Annotated[Path, typer.Argument(help="Folder to work in; one with a bench in it is continued")],
    suite: Annotated[
        list[str] | None, typer.Option(help="authors, hazards, unsafe or book (several times; default: all)")
    ] = None,
    method: Annotated[list[str] | None, typer.Option(help="Method (several times; default: all)")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds, each with data and models of its own", min=1)] = 3,
    authors: Annotated[int, typer.Option(help="Made-up authors, a tenth of whom is forgotten", min=10)] = 40,
    train_steps: Annotated[int, typer.Option(help="Steps of training", min=1)] = 1500,
    tuning_steps: Annotated[int, typer.Option(help="Steps of a tuning run (more for some methods)", min=10)] = 120,
    workers: Annotated[int | None, typer.Option(help="Processes (default: one a core, one with a GPU)", min=1)] = None,
) -> None:
    """Train models that have memorized, unlearn with every method, score and stress all of them: tables and plots."""
    from megafish.unlearn.bench.bench import run_bench
    from megafish.unlearn.bench.plan import ALL, SUITES, Plan, named

    plan = Plan(
        suites=named("suite", suite, tuple(SUITES)),
        methods=named("method", method, ALL),
        seeds=seeds,
        authors=authors,
        train_steps=train_steps,
        tuning_steps=tuning_steps,
    )
    run_bench(output, plan, workers=workers)
