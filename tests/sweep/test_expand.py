"""Sweep files: what they mean, what is refused, and the runs they make."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megafish.config_yaml import dump_yaml
from megafish.errors import InputError
from megafish.sweep.expand import SweepRun, expand, names_of, points_of
from megafish.sweep.spec import Sweep, load_sweep, parse_parameter, sweep_file, sweep_names


def sweep(folder: Path, **content: Any) -> list[SweepRun]:
    """The runs of a sweep file with this content."""
    file = folder / "s.yaml"
    file.write_text(dump_yaml({"config": "tiny", **content}), encoding="utf-8")
    return expand(load_sweep(file), file, ["data.train=corpus"])


def refused(folder: Path, told: str, **content: Any) -> None:
    with pytest.raises(InputError, match=re.escape(told)) as caught:
        sweep(folder, **content)
    assert "\n" not in str(caught.value)


def test_a_grid_in_the_order_of_the_file(tmp_path: Path) -> None:
    runs = sweep(tmp_path, parameters={"goldfish.k": [3, None], "goldfish.h": {"from": 5, "to": 13, "step": 4}})
    assert [run.name for run in runs] == ["k3-h5", "k3-h9", "k3-h13", "k-none-h5", "k-none-h9", "k-none-h13"]
    assert [run.config.goldfish.k for run in runs] == [3, 3, 3, None, None, None]
    assert runs[0].path == Path("runs/s/k3-h5")
    assert runs[0].config.name == "k3-h5" and runs[0].config.track.wandb.group == "s"


def test_zip_exclude_set_and_repeats(tmp_path: Path) -> None:
    runs = sweep(
        tmp_path,
        set={"train.steps": 7},
        parameters={"goldfish.k": [3, 4]},
        zip=[{"model.num_layers": [1, 2], "model.hidden_size": [96, 192]}],
        exclude=[{"goldfish.k": 4, "model.num_layers": 2}],
        repeats=2,
    )
    assert [run.name for run in runs] == [
        "k3-num_layers1-seed0", "k3-num_layers1-seed1", "k3-num_layers2-seed0", "k3-num_layers2-seed1",
        "k4-num_layers1-seed0", "k4-num_layers1-seed1",
    ]  # fmt: skip
    assert {(run.config.model.num_layers, run.config.model.hidden_size) for run in runs} == {(1, 96), (2, 192)}
    assert [(run.config.train.seed, run.config.data.seed) for run in runs[:2]] == [(0, 0), (1, 1)]
    assert all(run.config.train.steps == 7 and run.config.train.supervised_tokens is None for run in runs)


@pytest.mark.parametrize(
    ("given_range", "numbers"),
    [
        ({"from": 1, "to": 9, "step": 4}, [1, 5, 9]),
        ({"from": 9, "to": 1, "step": -4}, [9, 5, 1]),
        ({"from": 0.1, "to": 0.3, "step": 0.1}, [0.1, 0.2, 0.3]),
        ({"from": 0, "to": 1, "count": 3}, [0, 0.5, 1]),
        ({"from": 1e-4, "to": 1e-2, "count": 3, "scale": "log"}, [1e-4, 1e-3, 1e-2]),
    ],
)
def test_ranges(given_range: dict[str, Any], numbers: list[float]) -> None:
    assert list(parse_parameter("x", given_range).values) == numbers  # type: ignore[union-attr]


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    repeats=st.integers(1, 3),
    samples=st.one_of(st.none(), st.integers(1, 30)),
    seed=st.integers(0, 10),
)
def test_any_sweep_has_the_right_number_of_different_runs(
    sizes: list[int], repeats: int, samples: int | None, seed: int
) -> None:
    keys = ["goldfish.k", "goldfish.h", "train.micro_batch_size"]
    made = Sweep(
        name="s",
        config="tiny",
        parameters={key: list(range(2, 2 + size)) for key, size in zip(keys, sizes, strict=False)},
        repeats=repeats,
        samples=samples,
        seed=seed,
    )
    points = points_of(made)
    whole = 1
    for size in sizes:
        whole *= size
    assert len(points) == repeats * (whole if samples is None else min(samples, whole))
    names = names_of(made, points)
    assert len(set(names)) == len(points)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names)
    more = points_of(made.model_copy(update={"samples": samples + 5})) if samples is not None else points
    assert more[: len(points)] == points  # raising the number keeps the first draws


def test_draws_lie_where_they_should_and_come_again(tmp_path: Path) -> None:
    content: dict[str, Any] = {
        "parameters": {"optimizer.lr": {"log_uniform": [1e-4, 1e-2]}, "goldfish.k": {"integer": [2, 9]}},
        "samples": 200,
    }
    runs = sweep(tmp_path, **content)
    rates = sorted(run.config.optimizer.lr for run in runs)
    assert rates[0] >= 1e-4 and rates[-1] <= 1e-2
    assert 0.4e-3 < rates[100] < 2.5e-3  # the median of a log-uniform draw is the middle of the exponents
    assert {run.config.goldfish.k for run in runs} == set(range(2, 10))
    assert [run.name for run in sweep(tmp_path, **content)] == [run.name for run in runs]
    assert [run.name for run in sweep(tmp_path, **content, seed=1)] != [run.name for run in runs]


def test_names_do_not_change_when_values_are_added(tmp_path: Path) -> None:
    few = sweep(tmp_path, parameters={"goldfish.k": [4], "optimizer.lr": [1e-3]})
    more = sweep(tmp_path, parameters={"goldfish.k": [4, 8], "optimizer.lr": [1e-3, 3e-3]})
    assert few[0].name == more[0].name == "k4-lr0.001"


def test_keys_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = sweep(tmp_path, parameters={"train.seed": [1], "data.seed": [2], "goldfish.scheme": ["goldfish-v1"]})
    assert runs[0].name == "train.seed1-data.seed2-scheme-goldfish_v1"


@pytest.mark.parametrize("name", sweep_names())
def test_shipped_sweeps_expand(name: str) -> None:
    file = sweep_file(name)
    made = load_sweep(file)
    assert len(expand(made, file, ["data.train=corpus"])) > 5
    assert made.name == name


@pytest.mark.parametrize(
    ("told", "content"),
    [
        ("unknown key goldfish.kk: did you mean goldfish.k?", {"parameters": {"goldfish.kk": [1]}}),
        ("unknown key parametres: did you mean parameters?", {"parametres": {"goldfish.k": [3]}}),
        ("nothing varies", {}),
        ("goldfish.k: the list is empty", {"parameters": {"goldfish.k": []}}),
        ("goldfish.k=3: must be a list", {"parameters": {"goldfish.k": 3}}),
        ("{from, too} is none of", {"parameters": {"goldfish.k": {"from": 3, "too": 4}}}),
        ("give either step or count", {"parameters": {"goldfish.k": {"from": 3, "to": 4}}}),
        ("does not lead from 3 to 9", {"parameters": {"goldfish.k": {"from": 3, "to": 9, "step": -1}}}),
        ("both ends must be above 0", {"parameters": {"goldfish.k": {"from": 0, "to": 9, "count": 3, "scale": "log"}}}),
        ("the first must be below the second", {"parameters": {"goldfish.k": {"uniform": [3, 3]}}, "samples": 2}),
        ("say how many runs by samples", {"parameters": {"optimizer.lr": {"uniform": [1e-3, 1e-2]}}}),
        ("goldfish.k 2, goldfish.h 1", {"zip": [{"goldfish.k": [3, 4], "goldfish.h": [5]}]}),
        ("goldfish.k is given twice", {"parameters": {"goldfish.k": [3]}, "zip": [{"goldfish.k": [3]}]}),
        ("exclude: goldfish.h is none of", {"parameters": {"goldfish.k": [3]}, "exclude": [{"goldfish.h": 5}]}),
        ("exclude leaves no run", {"parameters": {"goldfish.k": [3]}, "exclude": [{"goldfish.k": 3}]}),
        ("name=a/b: must be a folder's name", {"name": "a/b", "parameters": {"goldfish.k": [3]}}),
        ("the sweep itself names its runs", {"parameters": {"run_dir": ["x"]}}),
        ("k0: goldfish.k=0: must be", {"parameters": {"goldfish.k": [0, 4]}}),
    ],
)
def test_bad_sweeps_are_refused_in_one_line(tmp_path: Path, told: str, content: dict[str, Any]) -> None:
    refused(tmp_path, told, **content)


def test_settings_of_the_command_line_may_not_be_what_varies(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("config: tiny\nparameters: {goldfish.k: [3, 4]}\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"goldfish\.k is what differs"):
        expand(load_sweep(file), file, ["data.train=corpus", "goldfish.k=5"])


def test_an_unknown_sweep_gets_a_hint() -> None:
    with pytest.raises(InputError, match=r"did you mean lr_by_batch\?"):
        sweep_file("lr_by_bach")
