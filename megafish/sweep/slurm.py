"""A sweep as one Slurm job array."""

from __future__ import annotations

from pathlib import Path

from megafish.jobs import slurm
from megafish.jobs.prepare import Prepared, check, write_job
from megafish.jobs.profile import Profile
from megafish.jobs.script import RunList, batch_script
from megafish.progress import track
from megafish.run import RunDir, write_atomic
from megafish.sweep.expand import SweepRun
from megafish.sweep.folder import create_run, folder_of
from megafish.sweep.spec import Sweep


def array_script(
    sweep: Sweep, runs: list[SweepRun], chosen: list[SweepRun], profile: Profile, jobs: int
) -> tuple[Path, str, RunList]:
    """Where the array's script lies, its text, and its list of runs: `chosen` of all `runs`, `jobs` at one time."""
    folder = folder_of(sweep)
    numbers = {run.name: line for line, run in enumerate(runs)}
    listed = RunList(folder / "runs.txt", [numbers[run.name] for run in chosen], jobs)
    script = folder / "submit.sbatch"
    text = batch_script(profile, name=sweep.name, script=script, logs=folder / "logs", runs=listed)
    return script, text, listed


def submit_array(
    sweep: Sweep, runs: list[SweepRun], chosen: list[SweepRun], profile: Profile, jobs: int, *, checked: bool = True
) -> str:
    """Submit `chosen` runs as one array; its number."""
    slurm.require("sbatch")
    script, text, listed = array_script(sweep, runs, chosen, profile, jobs)
    if checked:
        # The runs differ in settings that are validated already; what one finds on this machine, all do.
        check(Prepared(RunDir(chosen[0].path), chosen[0].config, ()), profile.world_size)
    (folder_of(sweep) / "logs").mkdir(parents=True, exist_ok=True)
    write_atomic(listed.file, "".join(f"{run.path.absolute()}\n" for run in runs))
    write_atomic(script, text)
    with track(len(chosen), "run directories", "runs") as progress:
        for run in chosen:
            create_run(run)
            progress.advance()
    number = slurm.submit(script)
    for line, run in zip(listed.lines, chosen, strict=True):
        write_job(RunDir(run.path), "slurm", number=f"{number}_{line}")
    return number
