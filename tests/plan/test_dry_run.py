"""The command line's plan and dry run, as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megafish.cli import main
from megafish.config import load_config
from megafish.errors import InputError
from megafish.train.dry_run import dry_run

# Starts the command line and prints behind it its peak of resident memory, KiB. (ru_maxrss would also count what this
# process held when it forked.)
MEASURED = """
import sys
from pathlib import Path
from megafish.cli import main
sys.argv = ["megafish", *sys.argv[1:]]
try:
    main()
finally:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(status["VmHWM"].split()[0], file=sys.stderr)
"""


def test_seven_billion_parameters_on_a_thousand_processes() -> None:
    """In a few hundred MB."""
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, "-c", MEASURED, *["train", "7b", "--dry-run", "world=1024"]]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stderr.split()[-1]) < 500 * 1024
    out = done.stdout
    assert "6,738,415,616 parameters" in out
    assert "128 nodes" in out
    assert "no corpus is named" in out
    assert "1,024 sequences = 1024 data-parallel processes x 1 micro-batches x 1" in out


def test_order_of_samples_is_the_loaders(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    config = load_config("tiny", [f"data.train={corpus}", "train.steps=10", "data.sequence_length=64"])
    text = dry_run(config, 4)
    assert "first step: samples 0 to 31; process 0 begins with sample 0 " in text
    assert "the last with sample 24 " in text
    assert "last step: samples 288 to 319" in text
    assert "10 steps" in text
    assert "passes over" in text


def refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which the command line refuses, in this process."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["megafish", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["world=7"], "not a multiple"),
        (["world=none"], "whole number"),
        (["world=8", "world=16"], "given twice"),
        (["world=8", "data.train=nowhere"], "nowhere"),
        (["world=8", "schedule.warmup_steps=10"], "warmup"),
        (["world=8", "profile.ranks=[8]"], "processes 0 to 7"),
        (["world=8", "engine.deepspeed.zero_optimization.overlap_com=true"], "overlap_com: "),
    ],
)
def test_mistakes_are_one_line(
    settings: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(["train", "7b", "--dry-run", *settings], monkeypatch, capsys)


def test_nodes_are_as_large_as_the_processes_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    text = dry_run(load_config("7b", ["train.global_batch_size=12", "train.micro_batch_size=1"]), 12)
    assert "--nproc-per-node 6 " in text and "(2 nodes)" in text


def test_refuses_the_data_and_the_directory_that_the_run_would(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    run = tmp_path / "run"
    settings = [f"data.train={corpus}", f"run_dir={run}", "train.steps=10", "data.sequence_length=64"]
    with pytest.raises(InputError, match="nowhere: neither a folder"):
        dry_run(load_config("tiny", [*settings, "data.valid=nowhere"]), 4)
    run.mkdir()
    (run / "metrics.jsonl").touch()
    with pytest.raises(InputError, match="holds a run already"):
        dry_run(load_config("tiny", settings), 4)
    assert "10 steps" in dry_run(load_config("tiny", settings), 4, resume=True)
    # As much of a checkpoint as a dry run reads.
    folder = run / "checkpoints" / "step_00000001"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text('{"model": {}}', encoding="utf-8")
    (run / "latest").write_text(folder.name, encoding="utf-8")
    with pytest.raises(InputError, match="cannot resume"):
        dry_run(load_config("tiny", settings), 4, resume=True)


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


def test_plan_prints_every_part(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["megafish", *["plan", "7b", "--gpu", "h100", "--gpus", "64", "--price", "2"]])
    with pytest.raises(SystemExit):
        main()
    out = capsys.readouterr().out
    for words in ("moments", "matrix products", "all-gather", "MFU", "GPU hours, cost", "Best of", "days"):
        assert words in out, words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "7b", "--world", "8"], "belongs to --dry-run"),
        (["plan"], "name a preset"),
        (["plan", "125m"], "--vocab-size"),
        (["plan", "7b", "--gpu", "h10"], "did you mean h100"),
        (["plan", "7b", "--gpus", "7"], "not a multiple"),
    ],
)
def test_commands_refuse_in_one_line(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(arguments, monkeypatch, capsys)
