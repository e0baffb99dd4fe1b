"""The commands that start, watch and stop runs. Imports what it runs when it runs, like megafish/cli.py."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megafish.jobs.status import RunStatus

Source = Annotated[str, typer.Argument(help="Preset, YAML file, or a run directory to continue")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings on top of it, e.g. optimizer.lr=3e-4")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would run, and stop")]
NoCheck = Annotated[
    bool, typer.Option("--no-check", help="Start without checking first what the run would refuse (no corpus here)")
]

launch = typer.Typer(
    help="Start a run: on this machine, by DeepSpeed's launcher, or as a Slurm job.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@launch.command(epilog="Example: megafish launch local 125m data.train=corpus --processes 8")
def local(
    config: Source,
    overrides: Overrides = None,
    processes: Annotated[int | None, typer.Option(help="Processes (default: one a GPU, or 1)", min=1)] = None,
    dry_run: DryRun = False,
    no_check: NoCheck = False,
) -> None:
    """Train in several processes on this machine. Continues the run if it is there already."""
    from megafish.jobs.local import default_processes, process_environment, run_local
    from megafish.jobs.prepare import check, create, refuse_active, resolve, train_command

    prepared = resolve(config, overrides or [])
    processes = processes or default_processes()
    if dry_run:
        command = shlex.join(train_command(prepared.run, prepared.overrides))
        for rank in range(processes):
            variables = process_environment(rank, processes, 0).items() - os.environ.items()
            given = {name: value for name, value in variables if name != "MASTER_PORT"}
            print(
                " ".join([*(f"{name}={value}" for name, value in sorted(given.items())), "MASTER_PORT=FREE", command])
            )
        print("next: the same command without --dry-run")
        return
    refuse_active(prepared.run)
    if not no_check:
        check(prepared, processes)
    create(prepared)
    code = run_local(prepared, processes)
    if code:
        print(f"{prepared.run.path}: exit code {code}; next: megafish status {prepared.run.path}", file=sys.stderr)
        raise SystemExit(code)


@launch.command(epilog="Example: megafish launch deepspeed 1b data.train=corpus --hostfile hosts --include node1,node2")
def deepspeed(
    config: Source,
    overrides: Overrides = None,
    hostfile: Annotated[Path | None, typer.Option(help="Nodes and their processes, `name slots=8` a line")] = None,
    include: Annotated[str | None, typer.Option(help="Nodes and devices to use: node1:0,1@node2")] = None,
    exclude: Annotated[str | None, typer.Option(help="Nodes and devices to leave out")] = None,
    nodes: Annotated[int | None, typer.Option(help="The first N nodes of the hostfile", min=1)] = None,
    processes_per_node: Annotated[
        int | None, typer.Option(help="Processes of each node (default: its slots, or this machine's devices)", min=1)
    ] = None,
    master_addr: Annotated[str | None, typer.Option(help="The first node's name or address")] = None,
    master_port: Annotated[int | None, typer.Option(help="Port there (default: 29500)", min=1, max=65535)] = None,
    launcher: Annotated[
        str | None, typer.Option(help="How it reaches the nodes: pdsh (default), openmpi, mpich, impi, mvapich, slurm")
    ] = None,
    node_rank: Annotated[
        int | None, typer.Option(help="Number of this node, without ssh: run the command on every node", min=0)
    ] = None,
    rank_logs: Annotated[bool, typer.Option("--rank-logs", help="Processes write to logs, not here")] = False,
    dry_run: DryRun = False,
) -> None:
    """Train by the deepspeed launcher, on the nodes of a hostfile. Continues the run if it is there already."""
    import subprocess

    from megafish.jobs.deepspeed import DeepSpeedOptions, deepspeed_command, deepspeed_environment
    from megafish.jobs.prepare import create, resolve, wait_for, write_job

    prepared = resolve(config, overrides or [])
    options = DeepSpeedOptions(
        hostfile, include, exclude, nodes, processes_per_node, master_addr, master_port, launcher, node_rank, rank_logs
    )
    command, variables = deepspeed_command(prepared, options), deepspeed_environment(prepared)
    if dry_run:
        print(" ".join([*(f"{name}={value}" for name, value in variables.items()), shlex.join(command)]))
        print("next: the same command without --dry-run")
        return
    if node_rank:
        wait_for(prepared)
    else:
        create(prepared)
        write_job(prepared.run, "deepspeed", submitted=time.time())
    os.environ.update(variables)
    code = subprocess.run(command).returncode
    if code:
        print(f"{prepared.run.path}: exit code {code}; next: megafish status {prepared.run.path}", file=sys.stderr)
        raise SystemExit(code if code > 0 else 128 - code)


@launch.command(
    epilog="Example: megafish launch slurm 7b data.train=corpus --profile gpu slurm.nodes=4 slurm.time=1-00"
)
def slurm(
    config: Source,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings of the run, and of the job: slurm.nodes=4 slurm.account=lab")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="Cluster profile: a YAML file, or one that ships with megafish")
    ] = None,
    dry_run: DryRun = False,
    print_profile: Annotated[
        bool, typer.Option("--print-profile", help="Print the job's settings with their help, and stop")
    ] = False,
    no_check: NoCheck = False,
) -> None:
    """Submit a run as a Slurm job that saves before its time limit, goes back to the queue and continues."""
    from megafish.config import with_help_text
    from megafish.jobs import slurm as commands
    from megafish.jobs.prepare import check, create, refuse_active, resolve, write_job
    from megafish.jobs.profile import load_profile
    from megafish.jobs.script import batch_script
    from megafish.run import write_atomic

    words = overrides or []
    job = load_profile(profile, [word for word in words if word.startswith("slurm.")])
    if print_profile:
        print(with_help_text(job), end="")
        return
    prepared = resolve(config, [word for word in words if not word.startswith("slurm.")])
    run = prepared.run
    script = batch_script(
        job,
        name=prepared.config.name,
        script=run.batch_script,
        logs=run.logs,
        run=run.path,
        overrides=prepared.overrides,
    )
    if dry_run:
        print(script, end="")
        print(f"# would be written to {run.batch_script} and submitted: sbatch {run.batch_script}")
        return
    commands.require("sbatch")
    refuse_active(run)
    if not no_check:
        check(prepared, job.world_size)
    create(prepared)
    write_atomic(run.batch_script, script)
    submitted = time.time()
    number = commands.submit(run.batch_script)
    write_job(run, "slurm", submitted=submitted, number=number)
    print(f"job {number}: {run.path} on {job.size}, script: {run.batch_script}")
    print(f"next: megafish status {run.path}")


def status(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Run directories, or folders of them (default: runs)")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line")] = False,
) -> None:
    """Show how runs are doing: state, step, speed, loss, time left, and why one has failed."""
    from megafish.jobs.status import find_runs, statuses
    from megafish.jobs.table import advice, print_json, print_table

    paths = find_runs(runs or [Path("runs")])
    found: list[RunStatus] = statuses(paths)
    if as_json:
        print_json(found)
        return
    print_table(found)
    print(f"next: {advice(found)}")


def logs(
    run: Annotated[Path, typer.Argument(help="Run directory")],
    rank: Annotated[int, typer.Option(help="Number of the process", min=0)] = 0,
    batch: Annotated[bool, typer.Option("--batch", help="What the batch script and Slurm said instead")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", help="Lines of the end to show", min=0)] = 50,
) -> None:
    """Show what a process of a launched run printed."""
    from megafish.jobs.logs import awaited, log_file, show
    from megafish.run import RunDir

    directory = RunDir.existing(run)
    find = awaited if follow else log_file
    show(directory, find(directory, None if batch else rank), lines=lines, follow=follow)
    print(f"next: megafish status {run}", file=sys.stderr)


def cancel(runs: Annotated[list[Path], typer.Argument(help="Run directories")]) -> None:
    """Stop runs that wait or run, on this machine or in Slurm. They write a checkpoint first if they have the time."""
    from megafish.jobs.cancel import cancel_runs

    for line in cancel_runs(runs):
        print(line)
    print(f"next: megafish status {' '.join(map(str, runs))}")


def add_to(app: typer.Typer) -> None:
    """Put the commands into megafish's command line."""
    app.add_typer(launch, name="launch")
    app.command(epilog="Example: megafish status runs")(status)
    app.command(epilog="Example: megafish logs runs/tiny --rank 3 --follow")(logs)
    app.command(epilog="Example: megafish cancel runs/tiny")(cancel)
