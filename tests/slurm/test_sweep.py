"""A sweep as one job array on a real Slurm."""

from __future__ import annotations

import json
from pathlib import Path

from tests.slurm.cluster import SHAPE, Slurm, until

SWEEP = """
config: tiny
set:
  model: {shape}
  data.train: {corpus}
  data.sequence_length: 64
  train.precision: fp32
  train.device: cpu
  train.global_batch_size: 4
  train.micro_batch_size: 4
  train.steps: 3
  eval: {{interval: null, sequences: 4, dropped_sequences: 0}}
parameters:
  goldfish.k: [3, 4, null]
  optimizer.lr: [1.0e-3, 2.0e-3]
"""


def test_an_array_of_six_runs_two_at_a_time(slurm: Slurm, tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "kl.yaml").write_text(SWEEP.format(shape=SHAPE, corpus=corpus), encoding="utf-8")
    told = slurm.megafish(
        "sweep", "kl.yaml", "--on=slurm", "--jobs=2", "--profile=local", "slurm.nodes=1", cwd=tmp_path
    )
    assert "6 runs of kl, 6 to start" in told
    number = told.split("job array ")[1].split(":")[0]
    assert "#SBATCH --array=0-5%2" in (tmp_path / "runs/kl/submit_001.sbatch").read_text()
    most = 0

    def done() -> bool:
        nonlocal most
        states = slurm.run(
            "squeue", "--noheader", "--array", f"--jobs={number}", "--states=all", "--format=%T", cwd=tmp_path
        )
        most = max(most, states.split().count("RUNNING"))
        return states.split().count("COMPLETED") == 6

    until(done, 200)
    assert most == 2
    assert "6 of 6 runs completed" in slurm.megafish("sweep", "status", "kl.yaml", cwd=tmp_path)
    assert "nothing to start" in slurm.megafish("sweep", "kl.yaml", "--on=slurm", "--profile=local", cwd=tmp_path)
    assert "exit code 0" in slurm.megafish("logs", "runs/kl/k-none-lr0.001", "--batch", cwd=tmp_path)
    assert (tmp_path / "runs/kl/k3-lr0.002/logs/rank_00000.log").is_file()
    job = json.loads((tmp_path / "runs/kl/k4-lr0.001/job.json").read_text())
    assert job["number"] == f"{number}_2"
