"""A sweep as one Slurm job array."""

from __future__ import annotations

import time

from megafish.jobs import slurm
from megafish.jobs.prepare import Prepared, check, write_job
from megafish.jobs.profile import Profile
from megafish.jobs.script import RunList, batch_script
from megafish.progress import track
from megafish.run import RunDir, write_atomic
from megafish.sweep.expand import SweepRun
from megafish.sweep.folder import create_run, folder_of
from megafish.sweep.spec import Sweep


def submit_array(sweep: Sweep, chosen: list[SweepRun], profile: Profile, jobs: int, *, checked: bool) -> str:
    """Submit runs as one array of which `jobs` run at one time; its number.

    Every submission has a script and a list of its own: tasks of an earlier one may still have to read theirs.
    """
    slurm.require("sbatch")
    if checked:
        # The runs differ in settings that are validated already; what one finds on this machine, all do.
        check(Prepared(RunDir(chosen[0].path), chosen[0].config, ()), profile.world_size)
    folder = folder_of(sweep)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    script = folder / f"submit_{len(list(folder.glob('submit_*.sbatch'))) + 1:03d}.sbatch"
    listed = RunList(script.with_suffix(".txt"), len(chosen), jobs)
    write_atomic(listed.file, "".join(f"{run.path.absolute()}\n" for run in chosen))
    write_atomic(script, batch_script(profile, name=sweep.name, script=script, logs=folder / "logs", runs=listed))
    with track(len(chosen), "run directories", "runs") as progress:
        for run in chosen:
            create_run(run)
            progress.advance()
    submitted = time.time()
    number = slurm.submit(script)
    for line, run in enumerate(chosen):
        write_job(RunDir(run.path), "slurm", submitted=submitted, number=f"{number}_{line}")
    return number
