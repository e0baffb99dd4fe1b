"""The same global batches give the same loss curve at every ZeRO stage and number of processes."""

from __future__ import annotations

from pathlib import Path

from tests.helpers import Launch, finish, read_metrics

STEPS = 50


def test_loss_curves_agree(launch: Launch, settings: list[str], tmp_path: Path) -> None:
    worker = str(Path(__file__).with_name("curves.py"))
    curves = {}
    for processes in (1, 2, 4):
        folder = tmp_path / f"p{processes}"
        overrides = [*settings, f"train.steps={STEPS}", "checkpoint.interval=null"]
        finish(launch(processes, worker, str(folder), "0,1,2,3", *overrides))
        for stage in range(4):
            curves[processes, stage] = read_metrics(folder / f"zero{stage}")
    reference = curves[1, 0]
    assert len(reference["train"]) == STEPS
    assert reference["train"][-1]["loss"] < 0.9 * reference["train"][0]["loss"], "the model does not learn"
    for key, curve in curves.items():
        for ours, theirs in zip(curve["train"], reference["train"], strict=True):
            for name in ("kept_tokens", "dropped_tokens", "data_hash", "lr", "tokens"):
                assert ours[name] == theirs[name], (key, name)
            for name in ("loss", "grad_norm", "bpb"):
                relative = abs(ours[name] - theirs[name]) / abs(theirs[name])
                assert relative < (1e-5 if name != "grad_norm" else 1e-3), (key, ours["step"], name, relative)
        for ours, theirs in zip(curve["valid"], reference["valid"], strict=True):
            assert ours["valid_tokens"] == theirs["valid_tokens"]
            assert abs(ours["valid_loss"] - theirs["valid_loss"]) < 1e-5 * theirs["valid_loss"], key
