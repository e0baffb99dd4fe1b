"""Sweeps that run: on this machine, twice, after a failure, as a wandb sweep; and what is reported of them."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers import read_metrics

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
SWEEP = """
config: tiny
set:
  model: {{num_layers: 2, hidden_size: 64, num_heads: 4, num_kv_heads: 2, intermediate_size: 128}}
  data.train: {corpus}
  data.sequence_length: 64
  train.precision: fp32
  train.device: cpu
  train.global_batch_size: 4
  train.micro_batch_size: 4
  train.steps: {steps}
  eval: {{interval: null, sequences: 4, dropped_sequences: 0}}
parameters:
  goldfish.k: {ks}
"""


def write(
    folder: Path, corpus: Path, *, name: str = "ks", steps: int = 4, ks: str = "[4, null]", more: str = ""
) -> None:
    text = SWEEP.format(corpus=corpus, steps=steps, ks=ks) + more
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def call(folder: Path, *words: str, code: int = 0, env: dict[str, str] = ENV) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "megafish", *words],
        cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == code, done.stdout
    return done.stdout


def test_runs_are_started_once_and_reported(tmp_path: Path, corpus: Path) -> None:
    write(tmp_path, corpus)
    assert "2 of 2 runs would start" in call(tmp_path, "sweep", "ks.yaml", "--dry-run")
    assert not (tmp_path / "runs").exists()
    assert "was not started here" in call(tmp_path, "sweep", "status", "ks.yaml", code=2)
    told = call(tmp_path, "sweep", "ks.yaml", "--jobs=2")
    assert "2 runs of ks, 2 to start, 2 at one time" in told
    assert told.count("completed") == 2 and "next: megafish sweep report ks.yaml" in told
    assert "nothing to start" in call(tmp_path, "sweep", "ks.yaml")

    # More runs in the same file, one of them with a fault that only its start shows.
    write(tmp_path, corpus, ks="[4, null, 8]")
    (tmp_path / "runs/ks/k8").mkdir()
    (tmp_path / "runs/ks/k8/checkpoints").write_text("in the way", encoding="utf-8")
    told = call(tmp_path, "sweep", "ks.yaml", code=1)
    assert "3 runs of ks, 1 to start" in told and "k8: exit code" in told
    assert "2 of 3 runs completed, 0 waiting or running, 1 to start" in call(tmp_path, "sweep", "status", "ks.yaml")
    (tmp_path / "runs/ks/k8/checkpoints").unlink()
    assert "3 runs of ks, 1 to start" in call(tmp_path, "sweep", "ks.yaml")

    told = call(tmp_path, "sweep", "report", "ks.yaml")
    report = tmp_path / "runs/ks/report"
    rows = list(csv.DictReader((report / "runs.csv").read_text(encoding="utf-8").splitlines()))
    assert {row["run"] for row in rows} == {"runs/ks/k4", "runs/ks/k-none", "runs/ks/k8"}
    losses = [float(row["valid_loss"]) for row in rows]
    assert losses == sorted(losses)
    best = read_metrics(tmp_path / rows[0]["run"])["valid"][-1]["valid_loss"]
    assert losses[0] == best
    assert {path.name for path in report.glob("*.png")} == {"by_k.png", "curves_k.png"}
    page = (report / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2 and "k-none" in page


def test_two_sweeps_of_one_name_and_runs_with_other_settings_are_refused(tmp_path: Path, corpus: Path) -> None:
    write(tmp_path, corpus, ks="[4]")
    call(tmp_path, "sweep", "ks.yaml")
    write(tmp_path, corpus, ks="[4]", steps=5)
    assert "train.steps was 4, is 5" in call(tmp_path, "sweep", "ks.yaml", code=2)
    write(tmp_path, corpus, name="other", ks="[5]", more="name: ks\n")
    assert "holds the sweep of" in call(tmp_path, "sweep", "other.yaml", code=2)
    write(tmp_path, corpus, ks="[4]", more="metric: {name: audit.extraction.rate}\n")
    assert "no run has a value of audit.extraction.rate" in call(tmp_path, "sweep", "report", "ks.yaml", code=2)


def test_stopped_it_stops_its_runs_with_checkpoints(tmp_path: Path, corpus: Path) -> None:
    write(tmp_path, corpus, steps=100000)
    process = subprocess.Popen(
        [sys.executable, "-m", "megafish", "sweep", "ks.yaml", "--jobs=2"],
        cwd=tmp_path, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    metrics = [tmp_path / f"runs/ks/{name}/metrics.jsonl" for name in ("k4", "k-none")]
    end = time.monotonic() + 90
    while not all(file.is_file() and file.stat().st_size for file in metrics):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGINT, told
    assert told.count("stopped by SIGTERM") == 2
    assert all((file.parent / "latest").is_file() for file in metrics)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--profile=local"], "--profile means nothing with --on local"),
        (["--on=slurm", "--processes=2"], "--processes means nothing with --on slurm"),
        (["slurm.nodes=2"], "slurm.nodes=2 means nothing with --on local"),
        (["--output=x"], "--output means nothing with --on local"),
    ],
)
def test_options_that_would_be_ignored_are_refused(tmp_path: Path, corpus: Path, words: list[str], told: str) -> None:
    write(tmp_path, corpus)
    assert told in call(tmp_path, "sweep", "ks.yaml", *words, code=2)


def test_a_wandb_sweep_whose_command_runs_a_trial(tmp_path: Path, corpus: Path) -> None:
    from wandb.sdk.launch.sweeps.utils import (
        create_sweep_command,
        create_sweep_command_args,
        load_sweep_config,
    )

    write(tmp_path, corpus, more="  optimizer.lr: {log_uniform: [1e-4, 1e-2]}\nsamples: 5\n")
    assert "next: wandb sweep sweep.yaml" in call(
        tmp_path, "sweep", "ks.yaml", "track.wandb.mode=offline", "--on=wandb", "--output=sweep.yaml"
    )
    made: Any = load_sweep_config(str(tmp_path / "sweep.yaml"))
    assert made == yaml.safe_load((tmp_path / "sweep.yaml").read_text())
    assert (made["method"], made["run_cap"]) == ("random", 5)
    assert made["metric"] == {"name": "valid/valid_loss", "goal": "minimize"}
    assert made["parameters"]["optimizer.lr"] == {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}

    # What an agent does with it: fill in the macros, set the variable, start the command.
    trial = {"args": {"goldfish.k": {"value": "null"}, "optimizer.lr": {"value": 0.002}}}
    words: list[str] = []
    for word in create_sweep_command(made["command"]):
        macro = word.startswith("${") and word.endswith("}")
        words += create_sweep_command_args(trial)[word[2:-1]] if macro else [word]
    env = {**ENV, "WANDB_RUN_ID": "trial7", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(words, cwd=tmp_path, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs/ks/trial7"
    assert len(read_metrics(run)["train"]) == 4
    assert len(list((run / "wandb").glob("offline-run-*-trial7"))) == 1
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["goldfish"]["k"] is None and saved["optimizer"]["lr"] == 0.002


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("zip: [{goldfish.h: [5, 13]}]\n", "zip cannot be said"),
        ("exclude: [{goldfish.k: 4}]\n", "exclude cannot be said"),
        ("repeats: 2\n", "name one of them in repeat_keys"),
        ("metric: {name: audit.x}\n", "audits are not logged to wandb"),
    ],
)
def test_what_wandb_cannot_say_is_refused(tmp_path: Path, corpus: Path, more: str, told: str) -> None:
    write(tmp_path, corpus, more=more)
    assert told in call(tmp_path, "sweep", "ks.yaml", "--on=wandb", code=2)


def test_wandbs_own_schema_takes_the_file(tmp_path: Path, corpus: Path) -> None:
    write(tmp_path, corpus, more="repeats: 3\nrepeat_keys: [train.seed]\n")
    made = yaml.safe_load(call(tmp_path, "sweep", "ks.yaml", "--on=wandb").rpartition("next:")[0])
    assert made["parameters"]["train.seed"] == {"values": [0, 1, 2]}
    assert json.dumps(made["parameters"]["goldfish.k"]) == '{"values": [4, "null"]}'
