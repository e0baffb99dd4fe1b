"""Weights there and back on the grids that models are served on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megafish.unlearn.loop import unlearn
from megafish.unlearn.options import Rounding
from megafish.unlearn.score import ScoreOptions, score_run
from megafish.unlearn.settings import unlearning_config
from megafish.unlearn.stress import round_trip, rounded
from tests.unlearn.test_objective import make


def test_grids_by_hand() -> None:
    weight = torch.tensor([[1.27, 0.014, -0.636, 0.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(round_trip(weight, Rounding.int8)[0], torch.tensor([1.27, 0.01, -0.64, 0.0]))
    # 4 bits: the scale is 1.27 / 7; 0.014 falls to 0, 0.636 is 3.5 of them and goes to the even one.
    torch.testing.assert_close(round_trip(weight, Rounding.int4)[0], torch.tensor([7, 0, -4, 0]) * 1.27 / 7)
    assert not round_trip(weight, Rounding.int4)[1].any()
    assert round_trip(torch.tensor([[1 + 2**-8]]), Rounding.bf16).item() == 1


@pytest.mark.parametrize("columns", [64, 100, 7])
def test_each_group_has_its_scale(columns: int) -> None:
    weight = torch.randn(5, columns) * torch.logspace(-3, 3, columns)
    got = round_trip(weight, Rounding.int4)
    assert got.shape == weight.shape
    for start in range(0, columns, 64):
        part, back = weight[:, start : start + 64], got[:, start : start + 64]
        scale = part.abs().amax(dim=1, keepdim=True) / 7
        assert ((part - back).abs() <= scale * 0.5001).all()
        assert all(len(row.unique()) <= 15 for row in back)


def test_only_matrices_of_the_blocks() -> None:
    model = make(3).float()
    with torch.no_grad():
        model.norm.weight.fill_(1.234)
    changed = rounded(model, Rounding.int4)
    for (name, before), (_, after) in zip(model.named_parameters(), changed.named_parameters(), strict=True):
        assert torch.equal(before, after) == (not (name.startswith("blocks.") and before.ndim == 2)), name


def test_figures_of_the_rounded_model_stand_beside(learned: Path) -> None:
    forget = [str(learned / "forget.jsonl")]
    folder = score_run(learned / "start", ScoreOptions(forget=forget, roundings=list(Rounding)))
    models = json.loads((folder / "summary.json").read_text())["models"]
    assert list(models) == ["model", "bf16", "int8", "int4"]
    assert models["bf16"]["forget"]["probability"] == pytest.approx(models["model"]["forget"]["probability"], rel=0.01)
    assert models["int4"]["forget"]["probability"] != models["model"]["forget"]["probability"]


def test_a_steered_direction_is_taken_out_again(learned: Path, settings: list[str]) -> None:
    """RMU far enough that nothing is known; without the one direction the answers are there again."""
    steer = ["unlearn.method=adaptive_rmu", "unlearn.steering=4", "unlearn.retain_weight=1", "unlearn.epochs=60"]
    config, _ = unlearning_config(str(learned / "start"), [*settings, *steer, "optimizer.lr=3e-3"])
    run = unlearn(config).run.path
    folder = score_run(run, ScoreOptions(ablate=True))
    models = json.loads((folder / "summary.json").read_text())["models"]
    known = {title: figures["forget"]["extraction_strength"] for title, figures in models.items()}
    assert known["model"] < 0.3 and known["without the direction"] > known["model"] + 0.3
