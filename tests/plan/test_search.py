"""The search finds what a person would, says why, and takes no time."""

from __future__ import annotations

import math
import time

import pytest

from megafish.config import load_config
from megafish.errors import InputError
from megafish.plan.calibration import EFFICIENCY
from megafish.plan.hardware import GPUS, make_cluster
from megafish.plan.layout import Layout, layout_of
from megafish.plan.memory import plan_memory
from megafish.plan.search import overrides, reasons, search
from megafish_kernels import cost


def test_winner_is_the_fastest_that_fits_and_is_found_at_once() -> None:
    config, cluster = load_config("7b"), make_cluster("h100", 64)
    started = time.perf_counter()
    found = search(config, 32000, cluster, EFFICIENCY)
    assert time.perf_counter() - started < 1
    fitting = [candidate for candidate in found if candidate.fits]
    assert fitting and len(found) > len(fitting)
    assert fitting[0].step.seconds == min(candidate.step.seconds for candidate in fitting)
    assert all(candidate.memory.total <= cluster.gpu.memory for candidate in fitting)
    assert reasons(found)


def test_overrides_give_the_winner() -> None:
    config, cluster = load_config("7b"), make_cluster("h100", 8)
    winner = next(candidate for candidate in search(config, 32000, cluster, EFFICIENCY) if candidate.fits)
    again = load_config("7b", overrides(config, winner.layout))
    assert layout_of(again, 8, "cuda") == winner.layout


@pytest.mark.parametrize(
    "settings",
    [
        ["engine.offload_optimizer=cpu", "engine.offload_parameters=cpu"],
        ["engine.deepspeed.zero_optimization.offload_optimizer.device=cpu"],
        ["engine.deepspeed.zero_optimization.stage3_max_reuse_distance=1000"],
    ],
)
def test_overrides_take_back_offload_and_leave_deepspeeds_keys(settings: list[str]) -> None:
    config, cluster = load_config("1b", ["engine.zero_stage=3", *settings]), make_cluster("h100", 8)
    winner = next(candidate for candidate in search(config, 32000, cluster, EFFICIENCY) if candidate.fits)
    assert not winner.layout.offload_optimizer
    again = load_config("1b", ["engine.zero_stage=3", *settings, *overrides(config, winner.layout)])
    assert layout_of(again, 8, "cuda") == winner.layout


def test_offload_is_tried_where_nothing_else_fits() -> None:
    config = load_config("7b", ["train.global_batch_size=8", "train.micro_batch_size=1"])
    without = search(config, 32000, make_cluster("a100-40gb", 1), EFFICIENCY)
    assert not any(candidate.fits for candidate in without)
    assert "nothing fits" in reasons(without)[0]
    found = search(config, 32000, make_cluster("a100-40gb", 1, host_memory_gib=512), EFFICIENCY)
    winner = next(candidate for candidate in found if candidate.fits)
    assert winner.layout.offload_optimizer
    too_little = search(config, 32000, make_cluster("a100-40gb", 1, host_memory_gib=32), EFFICIENCY)
    assert not any(candidate.fits for candidate in too_little)


def test_memory_falls_with_stage_and_checkpointing_and_rises_with_the_batch() -> None:
    config = load_config("7b")

    def total(**changed: object) -> float:
        settings = {"world": 64, "micro_batch": 2, "micro_batches": 8, "stage": 3, "bf16": True, "overlap": True}
        return plan_memory(config, 32000, Layout(**{**settings, **changed})).total  # type: ignore[arg-type]

    assert total(stage=1) > total(stage=2) > total(stage=3)
    assert total() > total(checkpointing=True)
    assert total(micro_batch=4) > total()
    assert total() > total(tensor=2)


@pytest.mark.parametrize(
    ("gpus", "settings", "words"),
    [
        (3, [], "not a multiple of train.micro_batch_size"),
        (8, ["train.micro_batch_size=3", "train.global_batch_size=1023"], "use 1008 or 1032"),
        (
            8,
            ["engine.zero_stage=2", "engine.deepspeed={zero_optimization: {offload_param: {device: cpu}}}"],
            "engine.zero_stage=3",
        ),
        (
            8,
            [
                "train.precision=fp32",
                "engine={zero_stage: 0, deepspeed: {zero_optimization: {offload_optimizer: {device: cpu}}}}",
            ],
            "engine.zero_stage=1",
        ),
    ],
)
def test_impossible_layouts_are_refused_in_one_line(gpus: int, settings: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        layout_of(load_config("7b", settings), gpus, "cuda")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gpu": "h10", "gpus": 8}, "did you mean h100"),
        ({"gpu": "h100", "gpus": 12, "gpus_per_node": 8}, "use 8 or 16"),
        ({"gpu": "h100", "gpus": 16, "network_gbps": 0.0}, "above 0"),
        ({"gpu": "h100", "gpus": 16, "network_gbps": math.nan}, "above 0"),
    ],
)
def test_impossible_clusters_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make_cluster(**options)  # type: ignore[arg-type]


def test_gpus_are_those_of_the_kernels_cost_model() -> None:
    for theirs in cost.GPUS:
        ours = GPUS[theirs.name.lower()]
        assert ours.peak == pytest.approx(theirs.flops, rel=1e-3)
        assert ours.bandwidth == pytest.approx(theirs.bandwidth, rel=1e-3)
