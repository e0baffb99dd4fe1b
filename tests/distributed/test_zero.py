"""ZeRO's options change where tensors lie, not what is learned; a ZeRO-3 model is never whole in one process."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers import Launch, finish, read_metrics

STEPS = 10

MUON = ["optimizer.name=muon", "optimizer.weight_decay=0.1"]
OFFLOAD = "engine.offload_optimizer=cpu"
ZERO = "engine.deepspeed.zero_optimization"


def run(launch: Launch, folder: Path, processes: int, variants: dict[str, list[str]], settings: list[str]) -> str:
    worker = str(Path(__file__).with_name("variants.py"))
    overrides = [*settings, f"train.steps={STEPS}", "checkpoint.interval=null", "eval.interval=null"]
    return finish(launch(processes, worker, str(folder), json.dumps(variants), *overrides))


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder)["train"]]


def far(ours: list[float], theirs: list[float]) -> float:
    """Largest relative difference of two loss curves."""
    return max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))


def test_options_leave_the_loss_curve_alone(launch: Launch, settings: list[str], tmp_path: Path) -> None:
    alone = {
        "adamw": ["engine.zero_stage=0"],
        "adamw_bf16": ["engine.zero_stage=2", "train.precision=bf16"],
        "muon": ["engine.zero_stage=0", *MUON],
        "muon_bf16": ["engine.zero_stage=1", "train.precision=bf16", *MUON],
    }
    run(launch, tmp_path / "p1", 1, alone, settings)
    both = {
        **{f"adamw offload {stage}": [f"engine.zero_stage={stage}", OFFLOAD] for stage in (1, 3)},
        "adamw offload all": ["engine.zero_stage=3", OFFLOAD, "engine.offload_parameters=cpu"],
        "adamw hpz": ["engine.zero_stage=3", f"{ZERO}.zero_hpz_partition_size=2"],
        "adamw small": [
            "engine.zero_stage=3",
            f"{ZERO}={{sub_group_size: 20000, reduce_bucket_size: 9000, stage3_prefetch_bucket_size: 5000, "
            "stage3_param_persistence_threshold: 100}",
        ],
        "adamw overlap": ["engine.zero_stage=2", f"{ZERO}={{overlap_comm: true, reduce_bucket_size: 30000}}"],
        "adamw_bf16 offload": ["engine.zero_stage=2", "train.precision=bf16", OFFLOAD],
        "muon 1": ["engine.zero_stage=1", *MUON],
        "muon 3": ["engine.zero_stage=3", *MUON, "checkpoint.interval=5"],
        "muon offload": ["engine.zero_stage=2", OFFLOAD, *MUON],
        "muon small": ["engine.zero_stage=3", f"{ZERO}.sub_group_size=9000", *MUON],
        "muon_bf16 1": ["engine.zero_stage=1", "train.precision=bf16", *MUON],
        "muon_bf16 3": ["engine.zero_stage=3", "train.precision=bf16", *MUON],
        "refused quantized": ["engine.zero_stage=3", f"{ZERO}.zero_quantized_weights=true"],
        "refused hpz": ["engine.zero_stage=3", f"{ZERO}.zero_hpz_partition_size=3"],
        "refused key": ["engine.zero_stage=2", f"{ZERO}.reduce_bucket=3"],
    }
    output = run(launch, tmp_path / "p2", 2, both, settings)
    reference = {name: losses(tmp_path / "p1" / name) for name in alone}
    assert far(reference["muon"], reference["adamw"]) > 1e-2
    assert all(curve[-1] < 0.98 * curve[0] for curve in reference.values())
    for name in both:
        kind = name.split()[0]
        if kind != "refused":
            limit = 5e-3 if "bf16" in kind else 1e-5 if kind == "adamw" else 1e-4
            assert far(losses(tmp_path / "p2" / name), reference[kind]) < limit, name
    # Back to step 5, and on in one process that shards nothing.
    latest = tmp_path / "p2" / "muon 3" / "latest"
    latest.write_text("step_00000005\n")
    run(launch, tmp_path / "p2", 1, {"muon 3": ["engine.zero_stage=0", *MUON]}, settings)
    resumed = losses(tmp_path / "p2" / "muon 3")
    assert len(resumed) == STEPS and far(resumed, reference["muon"]) < 1e-4
    assert "refused refused quantized: engine.deepspeed.zero_optimization.zero_quantized_weights=true" in output
    assert "zero_hpz_partition_size=3 does not divide the 2 " in output
    assert "refused refused key: engine.deepspeed: refused by DeepSpeed:" in output and "reduce_bucket" in output


def test_a_zero_3_model_is_never_whole_in_one_process(launch: Launch, tmp_path: Path) -> None:
    """21M parameters, 85 MB in fp32, on two processes; the largest matrix has 4 MB."""
    shape = "{num_layers: 8, hidden_size: 512, num_heads: 8, intermediate_size: 1024, tie_embeddings: true}"
    worker, output = str(Path(__file__).with_name("building.py")), tmp_path / "result.json"
    finish(launch(2, worker, str(output), f"model={shape}", "engine.zero_stage=3", "train.precision=fp32"))
    result = json.loads(output.read_text())
    whole = 4 * result["parameters"]
    assert result["equal"], "not the weights of a model that is built alone"
    assert abs(result["tensors"] - whole / 2) < 1024
    assert result["peak"] < 0.8 * whole, result
