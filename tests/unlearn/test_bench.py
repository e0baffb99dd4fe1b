"""The bench from nothing to its page on models that are too small to know much, and its rules by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megafish.config_unlearn import OPTIONS as METHODS
from megafish.errors import InputError
from megafish.progress import track
from megafish.unlearn.bench.bench import run_bench
from megafish.unlearn.bench.plan import ALL, FASTER, GOLDFISH, OPTIONS, RETAIN, START, SUITES, VARIANTS, Plan, named
from megafish.unlearn.bench.pool import run_all
from megafish.unlearn.bench.table import COLUMNS, caution, cell, markdown, suite_table, verdict
from megafish.unlearn.bench.unlearning import _aim, _settings, choose, curve_of
from megafish.unlearn.settings import unlearning_config
from tests.helpers import place_kept

SMALL = Plan(
    suites=("authors", "hazards"),
    methods=("relearn", "adaptive_rmu"),
    seeds=1,
    authors=10,
    num_layers=3,
    hidden_size=64,
    vocab_size=600,
    train_steps=40,
    batch=8,
    learning_rates=(1e-3,),
    tuning_steps=4,
    measured_every=2,
    relearn_steps=2,
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "bench"
    with place_kept(), pytest.MonkeyPatch.context() as patch:
        # Models that have learned next to nothing do not end their answers.
        patch.setattr("megafish.unlearn.items.NEW_TOKENS", 20)
        patch.setattr("megafish.unlearn.items.VERBATIM_TOKENS", 20)
        run_bench(folder, SMALL, workers=1)
    return folder


def test_every_model_of_every_suite_is_scored(bench: Path) -> None:
    records = json.loads((bench / "report/results.json").read_text())
    found = {(record["suite"], record["model"]) for record in records}
    assert found == {
        ("authors", START), ("authors", RETAIN), ("authors", GOLDFISH), ("authors", "relearn"),
        ("authors", "adaptive_rmu"), ("hazards", START), ("hazards", RETAIN), ("hazards", GOLDFISH),
        ("hazards", "adaptive_rmu"),
    }  # fmt: skip
    for record in records:
        figures = record["figures"]
        assert len(figures["relearned"]) == 3 and set(figures["rounded"]) == {"bf16", "int8", "int4"}
        assert ("ablated" in figures) == (record["model"] == "adaptive_rmu")
        assert set(figures["choices"]) == set(SUITES[record["suite"]].choices)
        if record["model"] == RETAIN:  # beside itself
            assert set(figures["privacy_leak"].values()) == {0.0}
            assert figures.get("forget_quality", {"p_value": 1.0})["p_value"] == pytest.approx(1.0)
    page = (bench / "report/index.html").read_text()
    assert page.count("<img") == 6 and "adaptive_rmu" in page and "What tuning chose" in page
    assert (bench / "report/results.md").read_text().count("| **memory** |") == 2


def test_a_method_begins_where_it_was_measured_first(bench: Path) -> None:
    """The trial's first point is the starting model's, as it is scored."""
    records = json.loads((bench / "report/results.json").read_text())
    before = next(r for r in records if (r["suite"], r["model"]) == ("authors", START))["figures"]
    trials = json.loads((bench / "tuning/authors/relearn.json").read_text())["trials"]
    assert trials[0]["curve"][0][:2] == [0, pytest.approx(before["forget"]["extraction_strength"])]
    assert [point[0] for point in trials[0]["curve"]] == [0, 8, 16]  # of ReLearn's steps, four times the others'
    trials = json.loads((bench / "tuning/hazards/adaptive_rmu.json").read_text())["trials"]
    assert [point[0] for point in trials[1]["curve"]] == [0, 2, 4]
    assert before["relearned"][0] == pytest.approx(before["forget"]["extraction_strength"])


def test_a_second_call_makes_nothing_anew(bench: Path) -> None:
    times = {path: path.stat().st_mtime_ns for path in (bench / "results").rglob("*.json")}
    made = {path: path.stat().st_mtime_ns for path in bench.glob("seed0/*/trained.json")}
    with place_kept():
        run_bench(bench, SMALL, workers=1)
    assert times == {path: path.stat().st_mtime_ns for path in (bench / "results").rglob("*.json")}
    assert made == {path: path.stat().st_mtime_ns for path in bench.glob("seed0/*/trained.json")} and len(made) == 3


def test_processes_do_all_and_the_first_error_ends_it(tmp_path: Path) -> None:
    with track(4, "write", "file", enabled=False) as bar:
        run_all([(Path.write_text, (tmp_path / str(i), "x")) for i in range(4)], 2, bar)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "3"] and bar.done == 4
    with pytest.raises(FileNotFoundError), track(2, "write", "file", enabled=False) as bar:
        run_all([(Path.write_text, (tmp_path / "none" / str(i), "x")) for i in range(2)], 2, bar)


def test_folders_that_hold_something_else(bench: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds a bench of train_steps 40 \(not 41\): give the same"):
        run_bench(bench, replace(SMALL, train_steps=41))
    replace(SMALL, suites=("authors",), seeds=2).keep(bench)  # another part of the same
    SMALL.keep(bench)
    (tmp_path / "other").write_text("")
    with pytest.raises(InputError, match="is not empty, and no bench is in it"):
        run_bench(tmp_path, SMALL)
    with pytest.raises(InputError, match="--method gaa: expected one of ga, graddiff"):
        named("method", ["gaa"], ALL)
    assert named("method", ["npo", "ga"], ALL) == ("ga", "npo") and named("method", None, ALL) == ALL


def trial(rate: float, *points: tuple[int, float, float]) -> dict[str, Any]:
    return {"settings": {"optimizer.lr": rate}, "curve": [[0, 1.0, 1.0], *map(list, points)]}


def test_what_tuning_chooses() -> None:
    quick = trial(1e-3, (10, 0.30, 0.96), (20, 0.0, 0.5))
    steady = trial(1e-4, (10, 0.60, 0.99), (20, 0.33, 0.98), (30, 0.10, 0.97))
    # Nearest to the aim among those that keep 0.97: 0.33; the lower one is too low, the quick one keeps too little.
    chosen = choose([quick, steady], 0.25)
    assert (chosen.settings, chosen.steps) == ({"optimizer.lr": 1e-4}, 20)
    assert choose([quick, steady], 0.0).steps == 30
    # Of equally near ones the one that keeps more.
    assert choose([steady, trial(2e-4, (40, 0.329, 1.0))], 0.25).steps == 40
    # None keeps enough: harmonic mean of (1 - forget, retain).
    chosen = choose([quick, trial(5e-4, (10, 0.5, 0.6))], 0.25)
    assert (chosen.settings, chosen.steps) == ({"optimizer.lr": 1e-3}, 10)


def test_what_a_curve_says() -> None:
    """Strength and the share of it that is kept; with choices, the accuracy on those to forget and the lower share."""
    measured = [
        {"step": step, "forget_extraction_strength": gone, "retain_extraction_strength": kept, **accuracies}
        for step, gone, kept, accuracies in (
            (0, 0.9, 0.8, {"forget_accuracy": 0.95, "general_accuracy": 1.0}),
            (10, 0.1, 0.76, {"forget_accuracy": 0.4, "general_accuracy": 1.0}),
            (20, 0.0, 0.8, {"forget_accuracy": 0.3, "general_accuracy": 0.78}),
        )
    ]
    assert curve_of(measured, SUITES["authors"]) == [(0, 0.9, 1.0), (10, 0.1, pytest.approx(0.95)), (20, 0.0, 1.0)]
    # 0.78 is less than what the retain set has before, and yet a fall by a fifth.
    curve = curve_of(measured, SUITES["hazards"])
    assert curve == [(0, 0.95, 1.0), (10, 0.4, pytest.approx(0.95)), (20, 0.3, 0.78)]


@pytest.mark.parametrize("suite", SUITES)
def test_settings_of_every_method_are_a_configuration(bench: Path, suite: str) -> None:
    """Of every suite and method, variants and several retain sets among them; each variant is one of its own."""
    assert set(ALL) - set(METHODS) == set(VARIANTS) and set(METHODS) <= set(ALL)
    found = {}
    for method in SUITES[suite].methods:
        words = _settings(bench, SMALL, SUITES[suite], method, 0, SMALL.trials(method)[0])
        config, _ = unlearning_config(str(bench / "seed0/before"), [*words, "train.steps=2"])
        assert config.unlearn is not None and config.unlearn.method == VARIANTS.get(method, method)
        names = [Path(path).relative_to(bench / "seed0/data").with_suffix("") for path in config.unlearn.retain]
        assert tuple(map(str, names)) == SUITES[suite].retain
        assert len(config.unlearn.choices) == len(SUITES[suite].choices)
        assert config.optimizer.lr == 1e-3 * FASTER.get(method, 1)
        for key, value in OPTIONS.get(method, {}).items():
            assert getattr(config.unlearn, key) == value
        found[method] = config.unlearn
    for variant in VARIANTS.keys() & found.keys():
        assert found[variant] != found[VARIANTS[variant]]


def test_what_is_aimed_at(bench: Path) -> None:
    """Guessing, where there are choices; nothing, where nothing has to be hidden; else the strength on unseen texts."""
    assert _aim(bench, SUITES["hazards"]) == 0.25 and _aim(bench, SUITES["unsafe"]) == 0
    chosen = json.loads((bench / "tuning/hazards/adaptive_rmu.json").read_text())
    before = json.loads((bench / f"results/hazards/{START}-seed0.json").read_text())["figures"]
    assert chosen["aim"] == 0.25 and chosen["trials"][0]["curve"][0][1] == before["choices"]["hazards/forget"]
    start = json.loads((bench / f"results/authors/{START}-seed0.json").read_text())["figures"]
    assert _aim(bench, SUITES["authors"]) == pytest.approx(start["holdout"]["extraction_strength"])


def record(model: str, seed: int, strength: float, utility: float) -> dict[str, Any]:
    figures = {"forget": {"extraction_strength": strength}, "utility": utility, "relearned": [strength, 0.5]}
    return {"suite": "authors", "model": model, "seed": seed, "figures": figures}


@pytest.mark.parametrize(
    ("strength", "utility", "wanted"),
    [
        (0.25, 0.76, "yes"),
        (0.26, 0.76, "remembers"),
        (0.25, 0.75, "loses utility"),
        (0.9, 0.1, "remembers, loses utility"),
    ],
)
def test_verdicts(strength: float, utility: float, wanted: str) -> None:
    records = [record(START, 0, 1.0, 0.8), record(RETAIN, 0, 0.2, 0.9), record("npo", 0, strength, utility)]
    by_model = {each["model"]: [each] for each in records}
    assert verdict("npo", by_model) == wanted and verdict(START, by_model) == verdict(RETAIN, by_model) == ""


def test_what_was_never_known_is_said() -> None:
    assert caution([record(START, 0, 0.91, 0.8), record("npo", 0, 0.1, 0.8)]) is None
    line = caution([record(START, seed, strength, 0.8) for seed, strength in enumerate((0.7, 0.8))]) or ""
    assert line.startswith("Before, the extraction strength is 0.75, below 0.9: the forget set is not known by heart")


def test_means_and_deviations_over_seeds() -> None:
    records = [record(START, seed, strength, 0.8) for seed, strength in enumerate((0.9, 1.0, 0.95))]
    table = suite_table("authors", records)
    assert [column.name for column in table.columns] == ["extraction strength", "utility", "strength relearned"]
    assert cell(COLUMNS[0], table.rows[0].values[0]) == "0.95 ± 0.05" and cell(COLUMNS[0], [0.8, 0.8]) == "0.80"
    assert "| extraction strength | 0.95 ± 0.05 |" in markdown(table)
