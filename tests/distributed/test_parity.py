"""The same global batches give the same loss curve at every ZeRO stage and on every mesh of processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from megafish.model.load import load_run
from tests.helpers import Launch, finish, read_metrics

STEPS = 50

# Layouts (curves.py) by number of processes. Each stage meets each axis, with accumulation and without.
LAYOUTS = {
    1: ["0-1-1-2", "1-1-1-4", "2-1-1-8", "3-1-1-2"],
    2: ["0-1-1-2", "1-1-1-2", "2-1-1-4", "3-1-1-2", "0-2-1-8", "3-2-1-4", "1-1-2-4", "2-1-2-8"],
    4: ["0-1-1-2", "1-1-1-2", "2-1-1-2", "3-1-1-1", "1-2-1-2", "0-1-2-4", "2-2-2-4", "3-2-2-8"],
}


def test_loss_curves_agree(launch: Launch, settings: list[str], tmp_path: Path) -> None:
    worker = str(Path(__file__).with_name("curves.py"))
    curves, runs = {}, {}
    for processes, layouts in LAYOUTS.items():
        folder = tmp_path / f"p{processes}"
        overrides = [*settings, f"train.steps={STEPS}", "checkpoint.interval=null"]
        finish(launch(processes, worker, str(folder), ",".join(layouts), *overrides))
        for layout in layouts:
            runs[processes, layout] = folder / layout
            curves[processes, layout] = read_metrics(folder / layout)
    reference = curves[1, "0-1-1-2"]
    assert len(reference["train"]) == STEPS
    assert reference["train"][-1]["loss"] < 0.9 * reference["train"][0]["loss"], "the model does not learn"
    for key, curve in curves.items():
        compare(key, curve, reference)
    # Tensor-parallel checkpoints hold whole weights: any process loads them.
    whole = load_run(runs[1, "0-1-1-2"]).model.state_dict()
    for key in ((2, "0-2-1-8"), (4, "2-2-2-4"), (4, "3-2-2-8")):
        for name, weight in load_run(runs[key]).model.state_dict().items():
            torch.testing.assert_close(weight, whole[name], rtol=1e-3, atol=1e-4, msg=f"{key}: {name}")


# A weight that is normalized over the global batch, whatever part of it a process sees at a time, and wherever
# DeepSpeed holds the gradients meanwhile.
MILE = {
    1: {
        "reference": ["engine.zero_stage=0", "train.micro_batch_size=8"],
        "accumulated": ["engine.zero_stage=0", "train.micro_batch_size=2"],
        "stage 1": ["engine.zero_stage=1", "train.micro_batch_size=4"],
        "stage 2": ["engine.zero_stage=2", "train.micro_batch_size=2"],
        "stage 3": ["engine.zero_stage=3", "train.micro_batch_size=2"],
        "offloaded 2": ["engine={zero_stage: 2, offload_optimizer: cpu}", "train.micro_batch_size=2"],
        "offloaded 3": ["engine={zero_stage: 3, offload_optimizer: cpu}", "train.micro_batch_size=2"],
    },
    2: {
        "data": ["engine.zero_stage=2", "train.micro_batch_size=2"],
        "tensor": ["engine={zero_stage: 1, tensor_parallel: 2}", "train.micro_batch_size=4"],
        "sequence": ["engine={zero_stage: 3, sequence_parallel: 2}", "train.micro_batch_size=4"],
    },
}


def test_mile_is_normalized_over_the_global_batch(launch: Launch, settings: list[str], tmp_path: Path) -> None:
    worker = str(Path(__file__).with_name("variants.py"))
    common = [*settings, "train.steps=12", "checkpoint.interval=null", "loss.mile_gamma=1.5", "loss.mile_sigma=0.5"]
    for processes, runs in MILE.items():
        finish(launch(processes, worker, str(tmp_path), json.dumps(runs), *common))
    finish(launch(1, worker, str(tmp_path), json.dumps({"plain": MILE[1]["reference"]}), *common[:-2]))
    reference = read_metrics(tmp_path / "reference")
    for runs in MILE.values():
        for name in runs:
            compare(name, read_metrics(tmp_path / name), reference)
    plain = read_metrics(tmp_path / "plain")["train"]
    assert abs(plain[0]["loss"] - reference["train"][0]["loss"]) < 1e-6, "what is reported is the plain cross-entropy"
    # A model that has hardly learned anything is about as uncertain of all of its predictions, which makes the weights
    # about equal; what is left is still beyond the rounding of two runs of the same objective.
    assert abs(plain[-1]["loss"] - reference["train"][-1]["loss"]) > 1e-6 * plain[-1]["loss"]


def test_patch_stage_agrees(launch: Launch, settings: list[str], tmp_path: Path) -> None:
    """Losses, mask and the change from patches to tokens are the same however the run is spread out."""
    worker = str(Path(__file__).with_name("variants.py"))
    common = [*settings, "train.steps=12", "checkpoint.interval=null", "patch={size: 4, fraction: 0.5}"]
    alone = {f"stage {stage}": [f"engine.zero_stage={stage}"] for stage in range(4)}
    alone["offloaded"] = ["engine={zero_stage: 3, offload_optimizer: cpu}"]
    alone["kept"] = ["engine.zero_stage=0", "patch.restart=false"]
    two = {
        "data": ["engine.zero_stage=2"],
        "sequence": ["engine={zero_stage: 3, sequence_parallel: 2}"],
    }
    finish(launch(1, worker, str(tmp_path), json.dumps(alone), *common))
    finish(launch(2, worker, str(tmp_path), json.dumps(two), *common))
    reference = read_metrics(tmp_path / "stage 0")
    for name in [*alone, *two]:
        if name != "kept":
            compare(name, read_metrics(tmp_path / name), reference)
    steps = reference["train"]
    assert [step["patch_size"] for step in steps] == [4] * 6 + [1] * 6
    # A patch of 4 needs less than a quarter of the operations, but for the head of the tokens that the mask drops.
    assert steps[0]["flops"] < 0.4 * (steps[-1]["flops"] - steps[-2]["flops"])
    # A token keeps its fate: the rates of dropped targets are about alike.
    assert abs(steps[0]["drop_rate"] - steps[-1]["drop_rate"]) < 0.08
    kept = read_metrics(tmp_path / "kept")["train"]
    assert [step["loss"] for step in kept[:1]] == [step["loss"] for step in steps[:1]]
    assert kept[-1]["loss"] != steps[-1]["loss"]


def test_contrast_agrees(launch: Launch, settings: list[str], tmp_path: Path) -> None:
    """A second run against the repetitions of a first one is the same however both models are spread out."""
    worker = str(Path(__file__).with_name("variants.py"))
    common = [*settings, "train.steps=8", "checkpoint.interval=null", "model.init_std=0.5"]
    first = tmp_path / "first"
    finish(launch(1, worker, str(tmp_path), json.dumps({"first": ["engine.zero_stage=0"]}), *common))
    common += [f"train.initial_weights={first}", f"contrast={{premature: {first}, strength: 2.0, context: 32}}"]
    one = {"stage 0": ["engine.zero_stage=0"], "stage 3": ["engine.zero_stage=3"]}
    two = {
        "data": ["engine.zero_stage=1"],
        "sharded": ["engine.zero_stage=3"],
        "sequence": ["engine={zero_stage: 3, sequence_parallel: 2}"],
    }
    finish(launch(1, worker, str(tmp_path), json.dumps(one), *common))
    finish(launch(2, worker, str(tmp_path), json.dumps(two), *common))
    reference = read_metrics(tmp_path / "stage 0")
    corrected = [step["corrected_tokens"] for step in reference["train"]]
    assert min(corrected) > 0 and max(corrected) < reference["train"][0]["kept_tokens"] / 2
    for name in [*one, *two]:
        curve = read_metrics(tmp_path / name)
        compare(name, curve, reference)
        assert [step["corrected_tokens"] for step in curve["train"]] == corrected


PREMATURE = """
import sys
import torch
from torch.distributed.tensor import DTensor
from megafish.config import ContrastConfig
from megafish.model.load import load_run
from megafish.objective.contrast import Premature
from megafish.train.engine import start_processes

processes = start_processes("cpu")
tokenizer = load_run(sys.argv[1], device="cpu").tokenizer
config = ContrastConfig(premature=sys.argv[1])
premature = Premature(config, tokenizer, processes.mesh, processes.device, torch.float32, sharded=True)
tokens, ends = torch.ones(1, 16, dtype=torch.int64), torch.tensor([0, 16], dtype=torch.int32)
for _ in range(2):
    with torch.no_grad():
        premature.model.hidden_rows(tokens, torch.arange(16), cu_seqlens=ends, max_seqlen=16)
    assert all(isinstance(parameter, DTensor) for parameter in premature.model.blocks.parameters())
"""


def test_blocks_of_a_sharded_premature_model_are_whole_only_while_they_compute(
    launch: Launch, settings: list[str], tmp_path: Path
) -> None:
    first = tmp_path / "first"
    own = ["train.steps=1", "checkpoint.interval=null", "name=first", f"run_dir={first}"]
    finish(launch(1, "-m", "megafish", "train", "tiny", *settings, *own))
    (tmp_path / "premature.py").write_text(PREMATURE, encoding="utf-8")
    finish(launch(2, str(tmp_path / "premature.py"), str(first)))


def compare(key: Any, curve: dict[str, list[dict[str, Any]]], reference: dict[str, list[dict[str, Any]]]) -> None:
    """All records of a run equal those of the reference, but for the order of sums."""
    for ours, theirs in zip(curve["train"], reference["train"], strict=True):
        for name in ("kept_tokens", "dropped_tokens", "data_hash", "lr", "tokens"):
            assert ours[name] == theirs[name], (key, name)
        for name in ("loss", "grad_norm", "bpb"):
            relative = abs(ours[name] - theirs[name]) / abs(theirs[name])
            assert relative < (1e-5 if name != "grad_norm" else 1e-3), (key, ours["step"], name, relative)
    for ours, theirs in zip(curve["valid"], reference["valid"], strict=True):
        assert ours["valid_tokens"] == theirs["valid_tokens"]
        assert abs(ours["valid_loss"] - theirs["valid_loss"]) < 1e-5 * theirs["valid_loss"], key
    for ours, theirs in zip(curve["canaries"], reference["canaries"], strict=True):
        assert ours.keys() == theirs.keys() and "memorized_0" in theirs
        for name in theirs:
            # A token that two ids are about equally likely for may count as right in one layout alone.
            tolerance = 1e-5 * theirs[name] if name.startswith("loss_") else 0.02
            assert ours[name] == theirs[name] or abs(ours[name] - theirs[name]) < tolerance, (key, name)
    for ours, theirs in zip(curve["dropped"], reference["dropped"], strict=True):
        assert ours["tokens_dropped"] == theirs["tokens_dropped"]
        assert abs(ours["loss_dropped"] - theirs["loss_dropped"]) < 1e-5 * theirs["loss_dropped"], key
