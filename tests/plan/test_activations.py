"""What a plan says autograd keeps is what autograd keeps: the storages that it saves, each once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megafish.config import load_config
from megafish.model import attention
from megafish.model.transformer import Transformer
from megafish.plan.activations import activations_of
from megafish.plan.layout import layout_of
from megafish_kernels import triton_runtime

VOCABULARY = 500
SHAPE = "model={num_layers: 3, hidden_size: 128, num_heads: 8, num_kv_heads: 2, intermediate_size: 336}"


def saved_bytes(model: Transformer, batch: dict[str, Any]) -> int:
    """Bytes of the storages that the forward pass saves, without the model's own and without the batch's."""
    known = {p.untyped_storage()._cdata for p in model.parameters()}
    known |= {t.untyped_storage()._cdata for t in batch.values() if isinstance(t, torch.Tensor)}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            found[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(**batch)
    size = sum(storage.nbytes() for storage in found.values())
    del output
    return size


class FlashLike(torch.autograd.Function):
    """What flash-attn's varlen function keeps: queries, keys, values, its output and fp32 log-sum-exps [H, tokens]."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32))
        return out


def batch_of(config: Any, device: str) -> dict[str, Any]:
    rows, length = config.train.micro_batch_size, config.data.sequence_length
    tokens = torch.randint(VOCABULARY, (rows, length), device=device)
    batch = {"tokens": tokens, "targets": tokens.clone(), "denominator": 100.0}
    if device == "cpu":
        batch["drop"] = (torch.arange(rows * length) % 4 == 0).view(rows, length)
        batch["cu_seqlens"] = torch.arange(0, rows * length + 1, length // 2, dtype=torch.int32)
    return batch


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("extra", [[], ["model.qk_norm=true"], ["train.activation_checkpointing=true"]])
def test_on_a_cpu(precision: str, extra: list[str]) -> None:
    overrides = [SHAPE, f"train.precision={precision}", "engine.zero_stage=1", "data.sequence_length=256", *extra]
    config = load_config("tiny", [*overrides, "train.global_batch_size=4", "train.micro_batch_size=4"])
    checkpointing = config.train.activation_checkpointing
    model = Transformer(config.model, VOCABULARY, activation_checkpointing=checkpointing)
    if precision == "bf16":
        model = model.bfloat16()
    plan = activations_of(config, VOCABULARY, layout_of(config, 1, "cpu"), kept_fraction=0.75)
    expected = plan.blocks - (plan.block if checkpointing else 0.0)
    assert saved_bytes(model, batch_of(config, "cpu")) == pytest.approx(expected, rel=0.01)


def with_triton_kernels(extra: list[str]) -> tuple[float, float]:
    """Saved and planned bytes, on meta tensors, with every kernel's launch written down in place of a GPU's work, and
    flash-attn's, which is not installed here, in a form that keeps what it keeps."""
    attention._varlen_kernel = lambda *_: lambda q, k, v, *_: FlashLike.apply(q, k, v)  # type: ignore[assignment]
    config = load_config(
        "tiny",
        [
            *(SHAPE, "train.precision=bf16", "engine.zero_stage=1", "data.sequence_length=256", *extra),
            *("train.global_batch_size=4", "train.micro_batch_size=4", "goldfish.k=null"),
        ],
    )
    checkpointing = config.train.activation_checkpointing
    with torch.device("meta"), triton_runtime.record(90):
        model = Transformer(config.model, VOCABULARY, activation_checkpointing=checkpointing).bfloat16()
        saved = saved_bytes(model, batch_of(config, "meta"))
    plan = activations_of(config, VOCABULARY, layout_of(config, 1, "cuda"), kept_fraction=1.0)
    return saved, plan.blocks - (plan.block if checkpointing else 0.0)


@pytest.mark.parametrize("extra", [[], ["model.qk_norm=true"], ["train.activation_checkpointing=true"]])
def test_with_the_triton_kernels(extra: list[str]) -> None:
    pytest.importorskip("triton")
    # In a process of its own: other tests have set TRITON_INTERPRET here, in which kernels cannot be compiled.
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_activations as t; "
    code += "print(*t.with_triton_kernels(sys.argv[2:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), *extra],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    saved, planned = map(float, done.stdout.split())
    assert saved == pytest.approx(planned, rel=0.01)


# torch's fake backend answers every collective at once, so one process can run the part of any.
SPREAD = """
import sys
import torch.distributed as dist
from datetime import timedelta
from torch.testing._internal.distributed.fake_pg import FakeStore
from megafish.config import load_config
from megafish.model.mesh import make_mesh
from megafish.model.transformer import Transformer
from megafish.plan.activations import activations_of
from megafish.plan.layout import layout_of
sys.path.insert(0, sys.argv[1])
from test_activations import SHAPE, VOCABULARY, batch_of, saved_bytes

dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
config = load_config("tiny", [SHAPE, *sys.argv[2:], "data.sequence_length=256", "train.global_batch_size=8",
    "train.micro_batch_size=4", "goldfish.k=null"])
degrees = config.engine.tensor_parallel, config.engine.sequence_parallel
model = Transformer(config.model, VOCABULARY, mesh=make_mesh(0, 4, *degrees, timedelta(minutes=1)))
batch = batch_of(config, "cpu")
own = 256 // degrees[1]
batch = {**batch, "drop": None, **{name: batch[name][:, :own].contiguous() for name in ("tokens", "targets")}}
print(saved_bytes(model, batch), activations_of(config, VOCABULARY, layout_of(config, 4, "cpu"), 1.0).blocks)
"""


@pytest.mark.parametrize("degrees", [["engine.tensor_parallel=2"], ["engine.sequence_parallel=2"]])
def test_spread_over_processes(degrees: list[str]) -> None:
    command = [sys.executable, "-c", SPREAD, str(Path(__file__).parent), *degrees]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    saved, planned = map(float, done.stdout.split())
    assert saved == pytest.approx(planned, rel=0.03)
