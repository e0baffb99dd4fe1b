"""Predicted throughput beside published runs."""

from __future__ import annotations

from dataclasses import replace
from statistics import median

import pytest

from megafish.config import load_config
from megafish.plan.calibration import EFFICIENCY, FITTED, RUNS, errors, fit
from megafish.plan.communication import traffic_of
from megafish.plan.hardware import make_cluster
from megafish.plan.layout import Layout
from megafish.plan.report import calibration_report
from megafish.plan.states import parameters_of
from megafish.plan.throughput import step_time


def test_median_error_is_below_fifteen_per_cent() -> None:
    rows = errors()
    assert len(rows) >= 10
    assert median(abs(row.error) for row in rows) < 0.15
    assert median(abs(row.left_out_error) for row in rows) < 0.15
    text = calibration_report()
    for run in RUNS:
        assert f"{run.tokens_per_s:,.0f}" in text


def test_the_constants_are_the_fit() -> None:
    start = replace(EFFICIENCY, ampere=0.7, hopper=0.7, half=200.0, scale=0.03)
    again = fit(start=start)
    for name in FITTED:
        assert getattr(again, name) == pytest.approx(getattr(EFFICIENCY, name), rel=0.02), name


@pytest.mark.parametrize(("stage", "multiples"), [(0, 2 * 4), (1, 2 * 4 + 2), (2, 3 * 2 * 4 + 2), (3, 3 * (2 + 2 + 4))])
def test_traffic_in_closed_form(stage: int, multiples: int) -> None:
    """Bytes a weight that a process sends in a step of three micro-batches: fp32 gradients, bf16 weights."""
    config = load_config("7b")
    parameters = parameters_of(config, 32000)
    layout = Layout(world=64, micro_batch=2, micro_batches=3, stage=stage, bf16=True, reuse_distance=0)
    sent = sum(traffic.sent for traffic in traffic_of(config, parameters, layout))
    assert sent == pytest.approx(multiples * parameters.total * 63 / 64)


def test_tensor_and_sequence_parallel_traffic_in_closed_form() -> None:
    config = load_config("7b")
    layout = Layout(world=8, micro_batch=2, micro_batches=1, stage=1, bf16=True, tensor=4, sequence=2)
    found = {t.name: t.sent for t in traffic_of(config, parameters_of(config, 32000, 4), layout)}
    tokens, width = 4096, 4096
    ring = 3 / 4 * tokens * width
    assert found["tensor parallel, waited for"] == ring * (32 * 6 * 2 + 3 * 2 + 4)
    assert found["tensor parallel, beside products"] == ring * 32 * 4 * 2
    heads = (32 + 32) * 2 / 4 * 128
    assert found["sequence parallel, all-to-all"] == 2 * 32 * 2 * tokens * heads / 2


def test_time_follows_its_causes() -> None:
    config, cluster = load_config("7b"), make_cluster("h100", 64)
    layout = Layout(world=64, micro_batch=2, micro_batches=8, stage=2, bf16=True)

    def step(kept: float = 1.0, network: float = 400.0, **changed: object) -> float:
        on = make_cluster("h100", 64, network_gbps=network)
        return step_time(config, 32000, replace(layout, **changed), on, EFFICIENCY, kept_fraction=kept).seconds  # type: ignore[arg-type]

    assert step(kept=0.75) < step()
    assert step(checkpointing=True) > step()
    assert step(network=50.0) > step()
    result = step_time(config, 32000, layout, cluster, EFFICIENCY)
    assert 0.2 < result.mfu(cluster) < 0.6
    assert result.tokens == 1024 * 4096
