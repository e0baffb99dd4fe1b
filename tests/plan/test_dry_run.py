"""The command line's plan and dry run, as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megafish.config import load_config
from megafish.errors import InputError
from megafish.train.dry_run import dry_run

# Starts the command line and prints the peak of its resident memory behind it.
MEASURED = """
import resource, sys
from megafish.cli import main
sys.argv = ["megafish", *sys.argv[1:]]
try:
    main()
finally:
    print("peak MiB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, file=sys.stderr)
"""


def megafish(*arguments: str, code: int = 0, **env: str) -> tuple[str, str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True, env={**clean, **env}, timeout=120
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


def test_seven_billion_parameters_on_a_thousand_processes() -> None:
    """In seconds and a few hundred MB."""
    started = time.perf_counter()
    out, err = megafish("train", "7b", "--dry-run", "world=1024")
    assert time.perf_counter() - started < 30
    assert int(err.split("peak MiB")[1]) < 500
    assert "6,738,415,616 parameters" in out
    assert "128 nodes" in out
    assert "no corpus is named" in out
    assert "1,024 sequences = 1024 data-parallel processes x 1 micro-batches" in out or "not a multiple" in out


def test_order_of_samples_is_the_loaders(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    config = load_config("tiny", [f"data.train={corpus}", "train.steps=10", "data.sequence_length=64"])
    text = dry_run(config, 4)
    assert "first step: samples 0 to 31; process 0 begins with sample 0 " in text
    assert "the last with sample 24 " in text
    assert "last step: samples 288 to 319" in text
    assert "10 steps" in text
    assert "passes over" in text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["world=7"], "not a multiple"),
        (["world=12"], "nodes of 8"),
        (["world=none"], "whole number"),
        (["world=8", "world=16"], "given twice"),
        (["world=8", "data.train=nowhere"], "nowhere"),
        (["world=8", "schedule.warmup_steps=10"], "warmup"),
    ],
)
def test_mistakes_are_one_line(settings: list[str], words: str) -> None:
    _, err = megafish("train", "7b", "--dry-run", *settings, code=2)
    lines = [line for line in err.splitlines() if not line.startswith("peak MiB")]
    assert len(lines) == 1 and words in lines[0], err


def test_world_must_agree_with_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert "8 processes" in dry_run(load_config("1b"), None)
    with pytest.raises(InputError, match="leave world away"):
        dry_run(load_config("1b"), 16)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(InputError, match="MASTER_ADDR"):
        dry_run(load_config("1b"), None)


def test_world_belongs_to_a_dry_run() -> None:
    _, err = megafish("train", "7b", "--world", "8", code=2)
    assert "belongs to --dry-run" in err


def test_plan_prints_every_part() -> None:
    out, _ = megafish("plan", "7b", "--gpu", "h100", "--gpus", "64", "--price", "2")
    for words in ("moments", "matrix products", "all-gather", "MFU", "GPU hours, cost", "Best of", "days"):
        assert words in out, words
    out, _ = megafish("plan", "125m", "--vocab-size", "50257")
    assert "vocabulary 50,257" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan"], "name a preset"),
        (["plan", "125m"], "--vocab-size"),
        (["plan", "7b", "--gpu", "h10"], "did you mean h100"),
        (["plan", "7b", "--gpus", "7"], "not a multiple"),
    ],
)
def test_plan_refuses_in_one_line(arguments: list[str], words: str) -> None:
    _, err = megafish(*arguments, code=2)
    assert words in err
