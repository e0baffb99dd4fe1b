"""Cluster profiles, and the batch scripts that they make."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from megafish.errors import InputError
from megafish.jobs.profile import Profile, load_profile, minutes, profile_names
from megafish.jobs.script import RunList, batch_script


def script_of(profile: Profile, tmp_path: Path, runs: RunList | None = None) -> str:
    text = batch_script(
        profile,
        name="a run",
        script=tmp_path / "submit.sbatch",
        logs=tmp_path / "logs",
        run=None if runs else tmp_path / "it's here",
        runs=runs,
    )
    checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr
    return text


def directives(text: str) -> set[str]:
    return {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")}


@pytest.mark.parametrize("name", profile_names())
def test_shipped_profiles_make_scripts_that_bash_reads(name: str, tmp_path: Path) -> None:
    assert directives(script_of(load_profile(name, []), tmp_path))


def test_every_setting_reaches_the_script(tmp_path: Path) -> None:
    given = [
        "slurm.nodes=2", "slurm.gpus_per_node=4", "slurm.gpu_type=h100", "slurm.cpus_per_process=12",
        "slurm.memory=500G",
        "slurm.exclusive=true", "slurm.partition=gpu", "slurm.account=lab", "slurm.qos=high", "slurm.time=1-12:00:00",
        "slurm.constraint=a100|h100", "slurm.reservation=r", "slurm.nodelist=n[1-4]", "slurm.exclude=n3",
        "slurm.signal=USR2", "slurm.signal_seconds=300", "slurm.max_tries=5", "slurm.wait_seconds=30",
        "slurm.master_port=29500", "slurm.modules=[cuda/12.8, nccl]", "slurm.setup='source env.sh'",
        "slurm.environment={NCCL_DEBUG: WARN it}", "slurm.python=/opt/python", "slurm.sbatch_options=[--licenses=x]",
        "slurm.srun_options=[--cpu-bind=cores]",
    ]  # fmt: skip
    text = script_of(load_profile(None, given), tmp_path)
    assert directives(text) == {
        "'--job-name=a run'", "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=h100:4", "--cpus-per-task=12",
        "--mem=500G", "--exclusive", "--partition=gpu", "--account=lab", "--qos=high", "--time=1-12:00:00",
        "--constraint=a100|h100", "--reservation=r", "--nodelist=n[1-4]", "--exclude=n3", "--signal=USR2@300",
        "--requeue", "--open-mode=append", f"--output={tmp_path}/logs/slurm_%j.log", "--licenses=x",
    }  # fmt: skip
    for line in (
        "module load cuda/12.8", "source env.sh", "export NCCL_DEBUG='WARN it'", "MASTER_PORT=29500", "--wait=30",
        "if ((tries >= 5)); then", "--cpu-bind=cores --cpus-per-task=12", "/opt/python -m megafish train",
        "RUN='" + str(tmp_path) + "/it'\"'\"'s here'",
    ):  # fmt: skip
        assert line in text


def test_without_requeue_the_script_says_how_to_go_on(tmp_path: Path) -> None:
    text = script_of(load_profile("gpu", ["slurm.requeue=false", "slurm.signal=null", "slurm.gpus_by=gres"]), tmp_path)
    assert {"--no-requeue", "--gres=gpu:8"} <= directives(text)
    assert 'scontrol requeue "$' not in text and "--signal" not in text
    assert "the run can be continued: sbatch" in text


def test_containers(tmp_path: Path) -> None:
    given = ["slurm.container.mounts=[/data:/data]", "slurm.container.image=my image.sif"]
    apptainer = script_of(load_profile("apptainer", given), tmp_path)
    here = Path.cwd()
    mounts = f"{here}:{here},{tmp_path}:{tmp_path},/data:/data"
    assert f"apptainer exec --bind={mounts} --pwd={here} --nv 'my image.sif' python -m" in apptainer
    pyxis = script_of(load_profile("pyxis", given), tmp_path)
    assert f"--container-mounts={mounts}" in pyxis
    assert " python -m megafish train" in pyxis


def test_an_array_takes_its_run_from_a_line_of_the_list(tmp_path: Path) -> None:
    runs = RunList(tmp_path / "runs.txt", 10, 3)
    text = script_of(load_profile("local", []), tmp_path, runs)
    assert {"--array=0-9%3", f"--output={tmp_path}/logs/slurm_%A_%a.log"} <= directives(text)
    assert f'RUN=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {tmp_path}/runs.txt)' in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["slurm.nods=2"], "unknown key nods: did you mean nodes?"),
        (["slurm.nodes=0"], "nodes=0: must be a whole number, at least 1"),
        (["slurm.time=tomorrow"], "time=tomorrow: must be minutes, H:MM:SS or D-HH:MM:SS"),
        (["slurm.time=3"], "time=3 with signal_seconds=180: the signal would come at the start"),
        (["slurm.partition=a b"], "partition=a b: must be one word"),
        (["slurm.environment={A-B: x}"], "'A-B' is no name of a variable"),
        (["slurm.container.runtime=pyxis"], "set both, or neither"),
    ],
)
def test_bad_settings_are_named(words: list[str], told: str) -> None:
    with pytest.raises(InputError, match=re.escape(told)):
        load_profile(None, words)


@pytest.mark.parametrize(
    ("time", "length"),
    [("90", 90), ("2:30", 2.5), ("1:02:30", 62.5), ("2-3", 3060), ("1-00:30", 1470), ("1-00:30:30", 1470.5)],
)
def test_time_limits_are_read_as_slurm_does(time: str, length: float) -> None:
    assert minutes(time) == length


def test_an_unknown_profile_gets_a_hint() -> None:
    with pytest.raises(InputError, match=r"no profile 'pyxsi' \(did you mean pyxis\?\)"):
        load_profile("pyxsi", [])
