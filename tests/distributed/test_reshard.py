"""A checkpoint continues on any number of processes, at any ZeRO stage, in any micro-batches, to the same curve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from tests.helpers import Launch, finish, read_metrics

AT, STEPS = 10, 30


class Layout(NamedTuple):
    processes: int
    stage: int
    precision: str = "fp32"
    tensor_parallel: int = 1
    sequence_parallel: int = 1

    @property
    def name(self) -> str:
        return f"p{self.processes}z{self.stage}t{self.tensor_parallel}s{self.sequence_parallel}{self.precision}"


class Pair(NamedTuple):
    """A run that continues at step `AT` what was begun in another layout."""

    begun: Layout
    now: Layout
    micro_batch_size: int = 2

    @property
    def name(self) -> str:
        return f"{self.begun.name}_{self.now.name}_b{self.micro_batch_size}"


# Every stage is written and read, on fewer, as many and more processes, with and without tensor parallelism.
PAIRS = [
    *(Pair(Layout(2, stage), Layout(1, 3 - stage)) for stage in range(4)),
    *(Pair(Layout(2, stage), Layout(2, (stage + 1) % 4)) for stage in range(4)),
    Pair(Layout(1, 0), Layout(4, 2)),
    Pair(Layout(1, 3), Layout(4, 1)),
    Pair(Layout(2, 1), Layout(4, 3), micro_batch_size=1),
    Pair(Layout(2, 3), Layout(1, 1), micro_batch_size=8),
    Pair(Layout(2, 1, tensor_parallel=2), Layout(1, 2)),
    Pair(Layout(2, 3, tensor_parallel=2), Layout(2, 0)),
    Pair(Layout(2, 3, tensor_parallel=2), Layout(4, 1, tensor_parallel=2)),
    Pair(Layout(2, 2), Layout(4, 3, tensor_parallel=2, sequence_parallel=2)),
    Pair(Layout(2, 0), Layout(2, 2, sequence_parallel=2)),
    Pair(Layout(2, 1, "bf16"), Layout(1, 3, "bf16")),
    Pair(Layout(2, 3, "bf16"), Layout(2, 2, "bf16")),
    Pair(Layout(2, 2, "bf16", tensor_parallel=2), Layout(4, 1, "bf16", tensor_parallel=2)),
]


def job(folder: Path, layout: Layout, begun: Path | None = None, micro_batch_size: int = 2) -> list[Any]:
    own = [
        f"run_dir={folder}",
        f"engine.zero_stage={layout.stage}",
        f"train.precision={layout.precision}",
        f"engine.tensor_parallel={layout.tensor_parallel}",
        f"engine.sequence_parallel={layout.sequence_parallel}",
        f"train.micro_batch_size={micro_batch_size}",
    ]
    return [None if begun is None else str(begun), str(folder), own]


def test_matrix(launch: Launch, settings: list[str], tmp_path: Path) -> None:
    worker = str(Path(__file__).with_name("reshard.py"))
    settings = [*settings, f"train.steps={STEPS}", f"checkpoint={{interval: {AT}, keep: null}}", "eval.interval=null"]
    begun = sorted({pair.begun for pair in PAIRS})
    for processes in (2, 1, 4):  # none continues what a later one begins
        jobs = [job(tmp_path / old.name, old) for old in begun if old.processes == processes]
        jobs += [
            job(tmp_path / pair.name, pair.now, tmp_path / pair.begun.name, pair.micro_batch_size)
            for pair in PAIRS
            if pair.now.processes == processes
        ]
        finish(launch(processes, worker, json.dumps(jobs), f"step_{AT:08d}", *settings))

    for pair in PAIRS:
        ours = read_metrics(tmp_path / pair.name)["train"][AT:]
        theirs = read_metrics(tmp_path / pair.begun.name)["train"][AT:]
        assert [record["step"] for record in ours] == list(range(AT + 1, STEPS + 1)), pair
        for our, their in zip(ours, theirs, strict=True):
            assert our["order_hash"] == their["order_hash"], (pair, our["step"])
            # In bf16 sums of another order are rounded to other weights; the first loss is of the stored ones (no pair
            # changes the degree of tensor parallelism in bf16, whose partial sums are rounded).
            exact = pair.now.precision == "fp32" or our["step"] == AT + 1
            difference = abs(our["loss"] - their["loss"])
            assert difference <= (1e-5 if exact else 1e-2), (pair, our["step"], difference)
