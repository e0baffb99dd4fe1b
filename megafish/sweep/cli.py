"""`megafish sweep`. Imports what it runs when it runs, like megafish/cli.py."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megafish.command_group import RunByDefault
from megafish.errors import InputError

if TYPE_CHECKING:
    from megafish.sweep.expand import SweepRun
    from megafish.sweep.folder import Entry
    from megafish.sweep.spec import Sweep


class Place(str, Enum):
    """Where the runs of a sweep go."""

    local = "local"
    slurm = "slurm"
    wandb = "wandb"


sweep = typer.Typer(
    cls=RunByDefault,
    help="Many runs from one file: megafish sweep FILE, then sweep status FILE and sweep report FILE.",
    epilog="Example: megafish sweep goldfish_k_by_h data.train=corpus --on local --jobs 2",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Source = Annotated[str, typer.Argument(help="Sweep file, or the name of one that ships with megafish")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings of all runs, e.g. data.train=corpus; of the jobs: slurm.time=1:00:00"),
]


@sweep.command(epilog="Example: megafish sweep goldfish_k_by_h data.train=corpus --on local --jobs 2")
def run(
    file: Source,
    overrides: Overrides = None,
    on: Annotated[Place, typer.Option(help="local: here; slurm: one job array; wandb: a file for `wandb sweep`")] = (
        Place.local
    ),
    jobs: Annotated[int, typer.Option(help="Runs at one time", min=1)] = 1,
    processes: Annotated[int, typer.Option(help="Processes of a run (local)", min=1)] = 1,
    profile: Annotated[str | None, typer.Option(help="Cluster profile (slurm)")] = None,
    output: Annotated[Path | None, typer.Option(help="File to write (wandb)")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the runs, and stop")] = False,
    no_check: Annotated[bool, typer.Option("--no-check", help="Start without checking the first run")] = False,
) -> None:
    """Start the runs of a sweep that are missing or have failed. A second call starts only what is left."""
    from megafish.sweep import folder
    from megafish.sweep.spec import load_sweep, sweep_file

    path = sweep_file(file)
    spec = load_sweep(path)
    words = [word for word in overrides or [] if not word.startswith("slurm.")]
    job_words = [word for word in overrides or [] if word.startswith("slurm.")]
    _refuse_idle(on, processes, profile, output, job_words, no_check)
    runs = _expand(spec, path, words)
    if on is Place.wandb:
        _write_wandb(spec, path, words, output)
        return
    folder.refuse_other_runs(runs)
    entries = folder.survey(runs, spec.metric)
    chosen = folder.to_start(entries)
    if dry_run:
        _print_plan(entries, chosen)
        return
    folder.claim(spec, path, words)
    again = f"megafish sweep report {file}"
    if not chosen:
        print(f"{len(runs)} runs of {spec.name}: nothing to start\nnext: {again}")
        return
    print(f"{len(runs)} runs of {spec.name}, {len(chosen)} to start, {jobs} at one time")
    if on is Place.slurm:
        from megafish.jobs.profile import load_profile
        from megafish.sweep.slurm import submit_array

        number = submit_array(spec, chosen, load_profile(profile, job_words), jobs, checked=not no_check)
        print(f"job array {number}: {len(chosen)} tasks\nnext: megafish sweep status {file}")
        return
    from megafish.sweep.local import run_locally

    code = run_locally(chosen, jobs=jobs, processes=processes, metric=spec.metric, checked=not no_check)
    _print_entries(spec, folder.survey(runs, spec.metric))
    print(f"next: {again}" if code == 0 else f"next: the same command again starts what is left; {again}")
    if code:
        raise SystemExit(code)


@sweep.command(epilog="Example: megafish sweep status goldfish_k_by_h")
def status(file: Source) -> None:
    """Show how the runs of a sweep are doing, the best first."""
    from megafish.jobs.status import ACTIVE, COMPLETED

    spec, entries = _survey(file)
    _print_entries(spec, entries)
    states = [entry.status.state for entry in entries]
    left = sum(state not in (COMPLETED, *ACTIVE) for state in states)
    done, active = states.count(COMPLETED), sum(state in ACTIVE for state in states)
    print(f"{done} of {len(entries)} runs completed, {active} waiting or running, {left} to start")
    print(f"next: megafish sweep {file} ..." if left and not active else f"next: megafish sweep report {file}")


@sweep.command(epilog="Example: megafish sweep report goldfish_k_by_h")
def report(file: Source) -> None:
    """Rank the runs of a sweep: table, CSV, plots, and a page with all of them."""
    from megafish.sweep.report import write_report

    spec, entries = _survey(file)
    page = write_report(spec, entries)
    _print_entries(spec, entries)
    print(f"{page.parent}: runs.csv, plots, index.html\nnext: open {page} in a browser")


def _expand(spec: Sweep, path: Path, words: list[str]) -> list[SweepRun]:
    from megafish.sweep.expand import expand

    return expand(spec, path, words)


def _survey(file: str) -> tuple[Sweep, list[Entry]]:
    """The sweep as it was started."""
    from megafish.sweep import folder
    from megafish.sweep.spec import load_sweep, sweep_file

    path = sweep_file(file)
    spec = load_sweep(path)
    words = folder.recorded_overrides(spec)
    if words is None:
        raise InputError(f"{folder.folder_of(spec)}: this sweep was not started here: megafish sweep {file} starts it")
    return spec, folder.survey(_expand(spec, path, words), spec.metric)


def _refuse_idle(
    on: Place, processes: int, profile: str | None, output: Path | None, job_words: list[str], no_check: bool
) -> None:
    """InputError for an option that the place does not read."""
    idle = {
        "--processes": processes != 1 and on is not Place.local,
        "--profile": profile is not None and on is not Place.slurm,
        "--output": output is not None and on is not Place.wandb,
        "--no-check": no_check and on is Place.wandb,
        " ".join(job_words[:1]): bool(job_words) and on is not Place.slurm,
    }
    for name, given in idle.items():
        if given:
            raise InputError(f"{name} means nothing with --on {on.value}: leave it out")


def _write_wandb(spec: Sweep, path: Path, words: list[str], output: Path | None) -> None:
    from megafish.run import write_atomic
    from megafish.sweep.wandb_file import wandb_sweep

    text = wandb_sweep(spec, path, words)
    if output is None:
        print(text, end="")
        print("next: --output FILE writes it, then: wandb sweep FILE", file=sys.stderr)
        return
    write_atomic(output, text)
    print(f"next: wandb sweep {output}")


def _print_plan(entries: list[Entry], chosen: list[SweepRun]) -> None:
    """The runs, and which of them would be started."""
    names = {run.name for run in chosen}
    width = max(len(str(entry.run.path)) for entry in entries)
    for entry in entries:
        what = "would start" if entry.run.name in names else entry.status.state
        point = " ".join(f"{key}={value}" for key, value in entry.run.point.items())
        print(f"{entry.run.path!s:{width}}  {what}  {point}")
    print(f"{len(chosen)} of {len(entries)} runs would start\nnext: the same command without --dry-run")


def _print_entries(spec: Sweep, entries: list[Entry]) -> None:
    from megafish.sweep.table import print_entries

    print_entries(spec, entries)
