"""The batch script of a Slurm job: launch/submit.sbatch.j2, filled in from a cluster profile."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from megafish.config import shipped_folder
from megafish.jobs.profile import Profile

TEMPLATE = "submit.sbatch.j2"


@dataclass(frozen=True)
class RunList:
    """Runs of a job array."""

    file: Path
    """One run directory a line."""
    count: int
    """Lines of the file."""
    at_once: int
    """Runs at one time."""


def batch_script(
    profile: Profile,
    *,
    name: str,
    script: Path,
    logs: Path,
    run: Path | None = None,
    runs: RunList | None = None,
    overrides: Sequence[str] = (),
) -> str:
    """The script of a job for one run, or of an array for several.

    `name`: the job's, in the queue. `script`: where the text will lie. `logs`: folder of what the script itself prints.
    `overrides`: settings that change a run which is there already.
    """
    assert (run is None) != (runs is None)
    mounts = _mounts(profile, script.parent)
    what = str(run) if run is not None else f"{runs.count if runs else 0} runs of {runs.file if runs else ''}"
    environment = Environment(
        loader=FileSystemLoader(shipped_folder("launch")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # a shell script: every value goes through `quote`
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    return environment.get_template(TEMPLATE).render(
        **profile.model_dump(exclude={"container", "srun_options", "signal"}),
        title=f"{what} on {profile.size}",
        command=" ".join(shlex.join(["megafish", *sys.argv[1:]]).split("\n")),
        script=script.absolute(),
        directives=_directives(profile, name, logs, runs),
        array=runs is not None,
        runs_file=runs.file.absolute() if runs is not None else None,
        run=run.absolute() if run is not None else None,
        folder=Path.cwd(),
        train=_train(profile, mounts),
        overrides="".join(f" {shlex.quote(override)}" for override in overrides),
        srun_options="".join(f" {shlex.quote(option)}" for option in _srun_options(profile, mounts)),
    )


def _directives(profile: Profile, name: str, logs: Path, runs: RunList | None) -> list[str]:
    """Options of sbatch, one a line."""
    kind = f"{profile.gpu_type}:" if profile.gpu_type else ""
    gpus = f"--gres=gpu:{kind}" if profile.gpus_by == "gres" else f"--gpus-per-node={kind}"
    number = "%j" if runs is None else "%A_%a"
    given = [
        f"--job-name={name}",
        f"--nodes={profile.nodes}",
        f"--ntasks-per-node={profile.tasks}",
        f"{gpus}{profile.gpus_per_node}" if profile.gpus_per_node else None,
        *(
            f"--{option}={value}" if value is not None else None
            for option, value in (
                ("cpus-per-task", profile.cpus_per_process),
                ("mem", profile.memory),
                ("partition", profile.partition),
                ("account", profile.account),
                ("qos", profile.qos),
                ("time", profile.time),
                ("constraint", profile.constraint),
                ("reservation", profile.reservation),
                ("nodelist", profile.nodelist),
                ("exclude", profile.exclude),
            )
        ),
        "--exclusive" if profile.exclusive else None,
        # Without B: the signal goes to the processes under srun, which answer it.
        f"--signal={profile.signal}@{profile.signal_seconds}" if profile.signal else None,
        "--requeue" if profile.requeue else "--no-requeue",
        "--open-mode=append",
        f"--output={logs.absolute()}/slurm_{number}.log",
        f"--array=0-{runs.count - 1}%{runs.at_once}" if runs is not None else None,
        *profile.sbatch_options,
    ]
    return [shlex.quote(option) if _needs_quotes(option) else option for option in given if option is not None]


def _needs_quotes(option: str) -> bool:
    # sbatch takes the characters of its own patterns (%j, a[1-4]) as they are.
    return any(character.isspace() or character in "'\"\\" for character in option)


def _mounts(profile: Profile, place: Path) -> str:
    """Folders that a container shows under their own names: where the job was submitted, where the run lies, more."""
    here = Path.cwd()
    places = [here] if place.absolute().is_relative_to(here) else [here, place.absolute()]
    return ",".join([*(f"{folder}:{folder}" for folder in places), *profile.container.mounts])


def _train(profile: Profile, mounts: str) -> str:
    """The command of each process, up to the run directory."""
    container = profile.container
    python = profile.python or (sys.executable if container.runtime == "none" else "python")
    command = [python, "-m", "megafish", "train"]
    if container.runtime == "apptainer":
        around = ["apptainer", "exec", f"--bind={mounts}", f"--pwd={Path.cwd()}"]
        around += ["--nv"] if profile.gpus_per_node else []
        command = [*around, *container.options, os.path.expanduser(str(container.image)), *command]
    return shlex.join(command)


def _srun_options(profile: Profile, mounts: str) -> list[str]:
    """Options of srun besides those that stand in the template."""
    options = list(profile.srun_options)
    if profile.cpus_per_process is not None:
        # Since Slurm 22.05 srun does not inherit it from sbatch.
        options.append(f"--cpus-per-task={profile.cpus_per_process}")
    container = profile.container
    if container.runtime == "pyxis":
        options += [f"--container-image={container.image}", f"--container-mounts={mounts}"]
        options += [f"--container-workdir={Path.cwd()}", *container.options]
    return options
