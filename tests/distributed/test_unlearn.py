"""Unlearning over several processes and ZeRO stages: killed and resumed bit for bit, and the same on one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megafish.model.load import load_run
from megafish.unlearn.choices import accuracy, chosen, read_questions
from megafish.unlearn.options import ChoiceBy
from tests.distributed.test_resume import kill_tree, wait_for_step, without_timings
from tests.helpers import Launch, finish, read_metrics

TEXTS = ("forget", "retain")


@pytest.fixture
def begun(launch: Launch, settings: list[str], tmp_path: Path) -> list[str]:
    """What starts an unlearning run from a run of a few steps."""
    start = tmp_path / "start"
    finish(launch(1, "-m", "megafish", "train", "tiny", *settings, "name=start", f"run_dir={start}", "train.steps=3"))
    for name in TEXTS:
        rows = [f'{{"question": "What is {name} {i}?", "answer": "It is {i * 7} {name}."}}\n' for i in range(10)]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    files = [f"unlearn.{name}={tmp_path / name}.jsonl" for name in TEXTS]
    return [
        "-m",
        "megafish",
        "unlearn",
        str(tmp_path / "start"),
        *files,
        "train={global_batch_size: 4, micro_batch_size: 1}",
    ]


@pytest.mark.parametrize(
    ("stage", "precision", "method"),
    [
        (1, "fp32", "npo"),
        (3, "bf16", "ga_kl"),
        (3, "fp32", "rmu"),
        (1, "fp32", "npo sure"),
        (3, "bf16", "ga_kl lora"),
        (3, "fp32", "task_vector"),
    ],
)
def test_killed_and_resumed(
    launch: Launch, begun: list[str], tmp_path: Path, stage: int, precision: str, method: str
) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    own = [f"unlearn.method={method.split()[0]}", f"engine.zero_stage={stage}", f"train.precision={precision}"]
    own += ["unlearn.lora_rank=4"] if method.endswith("lora") else []
    own += ["unlearn.sure_percentile=80"] if method.endswith("sure") else []
    own += ["optimizer.lr=1e-3", "train.steps=30", "checkpoint.interval=6", "eval.interval=10"]
    finish(launch(2, *begun, *own, f"run_dir={undisturbed}"))
    process = launch(2, *begun, *own, f"run_dir={killed}")
    wait_for_step(killed, 14)
    kill_tree(process)
    reached = int((killed / "latest").read_text().strip().removeprefix("step_"))
    assert 6 <= reached < 30, "killed too late for the test to mean anything"
    output = finish(launch(2, "-m", "megafish", "unlearn", str(killed)))
    assert f"continues at step {reached}" in " ".join(output.split())
    assert without_timings(killed) == without_timings(undisturbed)
    weights = [run / "checkpoints" / "step_00000030" / "model.safetensors" for run in (killed, undisturbed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_two_processes_do_what_one_does(launch: Launch, begun: list[str], tmp_path: Path) -> None:
    records = []
    # A file for each answer: their accuracies are how often each of the choices is the likeliest one.
    files = [tmp_path / f"asked_{answer}.jsonl" for answer in range(3)]
    for answer, path in enumerate(files):
        rows = [
            {
                "question": f"What is forget {i}?",
                "choices": [f"It is {i * k} forget." for k in (3, 7, 11)],
                "answer": answer,
            }
            for i in range(1, 12)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for processes, stage in ((1, 0), (2, 3)):
        run = tmp_path / f"on_{processes}"
        own = ["unlearn.method=relearn", f"unlearn.substitutes={tmp_path / 'vague.jsonl'}", "optimizer.lr=1e-3"]
        (tmp_path / "vague.jsonl").write_text('{"question": "What is it?", "answer": "Hard to say."}\n' * 6)
        own += [f"unlearn.choices=[{','.join(map(str, files))}]", f"engine.zero_stage={stage}", "train.steps=5"]
        finish(launch(processes, *begun, *own, f"run_dir={run}"))
        records.append(read_metrics(run)["train"])
        loaded, last = load_run(run, device="cpu"), read_metrics(run)["unlearned"][-1]
        assert loaded.step == 5 and loaded.config.unlearn is not None
        shares = [last[f"{path.stem}_accuracy"] for path in files]
        questions = [read_questions([path]) for path in files]
        picks = chosen(loaded, questions[0], loaded.config.unlearn, ChoiceBy.text, 8)
        assert shares == [accuracy(picks, each) for each in questions] and max(shares) < 1
    for one, two in zip(*records, strict=True):
        for key in ("loss", "forget_loss", "retain_loss", "grad_norm"):
            assert one[key] == pytest.approx(two[key], rel=2e-5, abs=1e-7), (one["step"], key)


def test_batches_that_do_not_divide_are_refused(launch: Launch, begun: list[str], tmp_path: Path) -> None:
    output = finish(launch(2, *begun, "train.micro_batch_size=4", f"run_dir={tmp_path / 'run'}"), code=1)
    assert "train.global_batch_size=4 is not a multiple of train.micro_batch_size=4 x 2 processes" in output
