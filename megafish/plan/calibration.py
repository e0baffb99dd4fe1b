"""Published runs, how far the model of the step's time is from each, and the fit of its four numbers to them.

All are dense bf16 runs of torch's FSDP (ZeRO-3) or Megatron whose shape, batch and machine are published. MPT has a 4 D
feed-forward without a gate, which costs what a gated one of 8/3 D does, and ties its embeddings. Throughputs are input
tokens a second and GPU. No run on a GPU has been made with megafish itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from megafish.config import Config
from megafish.plan.hardware import Cluster, make_cluster
from megafish.plan.layout import Layout
from megafish.plan.throughput import Efficiency, step_time


@dataclass(frozen=True)
class Run:
    """One published run."""

    name: str
    gpu: str
    gpus: int
    layers: int
    width: int
    heads: int
    inner: int
    vocab: int
    length: int
    micro_batch: int
    micro_batches: int
    tokens_per_s: float
    source: str
    kv_heads: int | None = None
    checkpointing: bool = False
    tensor: int = 1
    tied: bool = True

    @cached_property
    def config(self) -> Config:
        """The run as a configuration of megafish."""
        model = {
            "num_layers": self.layers,
            "hidden_size": self.width,
            "num_heads": self.heads,
            "num_kv_heads": self.kv_heads,
            "intermediate_size": self.inner,
            "vocab_size": self.vocab,
            "tie_embeddings": self.tied,
        }
        batch = self.micro_batch * self.micro_batches * self.gpus // self.tensor
        train = {"steps": 1, "global_batch_size": batch, "micro_batch_size": self.micro_batch}
        return Config.model_validate(
            {
                "name": "published",
                "model": model,
                "data": {"sequence_length": self.length},
                "goldfish": {"k": None},
                "train": train,
            }
        )

    @cached_property
    def layout(self) -> Layout:
        """ZeRO-3, or tensor parallelism alone where there is any."""
        return Layout(
            world=self.gpus,
            micro_batch=self.micro_batch,
            micro_batches=self.micro_batches,
            stage=3 if self.tensor == 1 else 0,
            bf16=True,
            tensor=self.tensor,
            checkpointing=self.checkpointing,
            overlap=True,
        )

    @cached_property
    def cluster(self) -> Cluster:
        """Nodes of 8 GPUs with the maker's adapters, as MosaicML had (1,600 Gb/s a node of A100s)."""
        return make_cluster(self.gpu, self.gpus)

    def predicted(self, efficiency: Efficiency) -> float:
        """Tokens a second and GPU by the model."""
        step = step_time(self.config, self.vocab, self.layout, self.cluster, efficiency, fsdp=True)
        return step.tokens / step.seconds / self.gpus


_FOUNDRY = "mosaicml/llm-foundry scripts/train/benchmarking/README.md"


def _mpt(
    name: str,
    gpu: str,
    gpus: int,
    tokens_per_s: float,
    micro_batch: int,
    micro_batches: int,
    *,
    length: int = 2048,
    checkpointing: bool = False,
) -> Run:
    layers, width, heads = {
        "125M": (12, 768, 12),
        "350M": (24, 1024, 16),
        "760M": (24, 1536, 12),
        "1B": (24, 2048, 16),
        "3B": (32, 2560, 20),
        "7B": (32, 4096, 32),
        "13B": (40, 5120, 40),
        "70B": (80, 8192, 64),
    }[name]
    inner = round(8 * width / 3)
    batch = (length, micro_batch, micro_batches)
    return Run(
        f"MPT {name}", gpu, gpus, layers, width, heads, inner, 50368, *batch, tokens_per_s, _FOUNDRY,
        checkpointing=checkpointing,
    )  # fmt: skip


RUNS = (
    Run(
        "TinyLlama 1.1B", "a100-40gb", 16, 22, 2048, 32, 5632, 32000, 2048, 8, 8, 24000,
        "jzhang38/TinyLlama README.md", kv_heads=4, tied=False,
    ),
    _mpt("125M", "a100", 8, 142830, 40, 2),
    _mpt("350M", "a100", 8, 58782, 32, 2),
    _mpt("760M", "a100", 8, 32434, 24, 2),
    _mpt("1B", "a100", 8, 20513, 14, 4),
    _mpt("1B", "a100", 8, 17807, 7, 4, length=4096),
    _mpt("1B", "a100-40gb", 8, 19271, 8, 8),
    _mpt("1B", "a100-40gb", 128, 18647, 10, 1),
    _mpt("3B", "a100", 8, 10811, 10, 2),
    _mpt("7B", "a100", 8, 4641, 6, 2),
    _mpt("7B", "a100-40gb", 8, 3679, 12, 4, checkpointing=True),
    _mpt("7B", "a100-40gb", 128, 3623, 18, 1, checkpointing=True),
    Run(
        # 41.5 % of the peak by the paper's count of FLOPs, 6 N + 12 L d s a token.
        "Megatron 22B, TP 8", "a100", 8, 48, 6144, 64, 16384, 51200, 2048, 4, 1, 927,
        "Korthikanti et al. 2022 (arXiv 2205.05198), table 5", tensor=8,
    ),
    _mpt("1B", "h100", 8, 45455, 14, 1),
    _mpt("1B", "h100", 128, 44123, 20, 1),
    _mpt("1B", "h100", 512, 39837, 20, 1),
    _mpt("3B", "h100", 16, 24142, 10, 3),
    _mpt("7B", "h100", 8, 10643, 6, 1),
    _mpt("7B", "h100", 128, 10475, 6, 1),
    _mpt("7B", "h100", 512, 9670, 6, 1),
    _mpt("13B", "h100", 128, 5080, 2, 1),
    _mpt("70B", "h100", 128, 1058, 8, 4, checkpointing=True),
)  # fmt: skip
"""Micro-batches of the 128- and 512-GPU H100 runs are those published for the same model on fewer GPUs."""

LEFT_OUT = (
    ("torchtitan Llama 3.1 8B, 32 to 128 H100 and H200, NeMo FP8 rows", "fp8, or bf16 on a 96 GB, 500 W H100 whose "
     "peak nobody states, with selective checkpointing"),
    ("Megatron 2B to 462B, Megatron-DeepSpeed 175B to 1T", "pipeline parallel, and 41 to 48 % for a range of models"),
    ("picotron SmolLM-1.7B, Llama-2-7B", "batch and parallel degrees are not published with the figure"),
    ("SmolLM3 3B with nanotron", "a secondary source; its machine's network is not known"),
    ("nanochat d24", "sliding windows and Muon; its MFU is derived from an estimate of FLOPs"),
    ("2.8B DDP, plain PyTorch", "the model's shape is not published"),
)  # fmt: skip
"""Rows of the same collection that the model's assumptions do not cover, and why."""

FITTED = ("ampere", "hopper", "half", "scale")
EFFICIENCY = Efficiency()
"""The fit to RUNS (tests/plan/test_calibration.py repeats it)."""


@dataclass(frozen=True)
class Row:
    """A published run beside the model's figure for it."""

    run: Run
    predicted: float
    error: float
    """Predicted / published - 1."""
    left_out_error: float
    """The same with the numbers fitted to all other runs."""


def errors(efficiency: Efficiency = EFFICIENCY, runs: Sequence[Run] = RUNS) -> list[Row]:
    """Every run's error, and its error where it was no part of the fit (takes a second or two)."""
    rows = []
    for at, run in enumerate(runs):
        others = fit([*runs[:at], *runs[at + 1 :]], efficiency)
        predicted = run.predicted(efficiency)
        rows.append(Row(run, predicted, predicted / run.tokens_per_s - 1, run.predicted(others) / run.tokens_per_s - 1))
    return rows


def fit(runs: Sequence[Run] = RUNS, start: Efficiency = EFFICIENCY) -> Efficiency:
    """Least squares of the log errors by Gauss and Newton's method, over the logarithms of the four numbers."""

    def residuals(point: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        efficiency = replace(start, **dict(zip(FITTED, np.exp(point).tolist(), strict=True)))
        return np.array([np.log(run.predicted(efficiency) / run.tokens_per_s) for run in runs])

    point = np.log([asdict(start)[name] for name in FITTED])
    for _ in range(8):
        now, step = residuals(point), 1e-4
        slopes = np.stack([(residuals(point + step * unit) - now) / step for unit in np.eye(len(FITTED))], axis=1)
        move = np.linalg.lstsq(slopes, -now, rcond=None)[0]
        point = point + np.clip(move, -0.5, 0.5)
        if np.abs(move).max() < 1e-5:
            break
    return replace(start, **dict(zip(FITTED, np.exp(point).tolist(), strict=True)))
