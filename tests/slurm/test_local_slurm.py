"""launch/local_slurm.sh: a cluster that works, twice on one machine, and that leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import psutil

from tests.slurm.cluster import SCRIPT, Slurm


def call(*words: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["bash", SCRIPT, *words], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


def processes_of(folder: Path) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SLURM_CONF") == str(folder / "slurm.conf"):
                found.append(process.name())
        except (psutil.Error, OSError):
            continue
    return found


def test_a_second_cluster_beside_the_first_starts_runs_and_leaves_nothing(slurm: Slurm, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    started = call("start", folder)
    assert started.stdout == f"export SLURM_CONF={folder}/slurm.conf\n"
    assert "next: " in started.stderr
    env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    nodes = subprocess.run(
        ["srun", "--nodes=2", "bash", "-c", "echo $SLURMD_NODENAME"], env=env, capture_output=True, text=True
    )
    assert sorted(nodes.stdout.split()) == ["n1", "n2"], nodes.stderr
    assert call("start", folder).stdout == started.stdout  # it runs already
    assert "n[1-2]" in call("status", folder).stdout

    job = ["sbatch", "--output=/dev/null", "--wrap", "trap '' TERM; srun sleep 1000"]
    subprocess.run(job, env=env, check=True, capture_output=True)
    assert processes_of(folder)
    call("stop", folder)
    assert not folder.exists()
    assert processes_of(folder) == []
    assert "main" in slurm.run("sinfo", cwd=tmp_path)  # the other one runs on


def test_it_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    assert "expected install, start, status or stop" in call("begin", code=2).stderr
    assert "no cluster runs in" in call("status", tmp_path / "none", code=1).stderr
    (tmp_path / "letter.txt").write_text("not a cluster", encoding="utf-8")
    assert "left alone" in call("stop", tmp_path, code=1).stderr
    assert (tmp_path / "letter.txt").exists()
