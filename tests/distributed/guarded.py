"""Worker of test_guard: runs with faults in some batches, in the processes that a launcher started.

    guarded.py FOLDER CASES OVERRIDE...

A fault is put into the gradient of ONE process, the last: what the others do about it they know from the collective
decision alone. FOLDER/CASE/faulty meets the faults, FOLDER/CASE/clean is a run that never reads those samples.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from megafish import cli
from megafish.config import load_config
from megafish.data.loader import Loader
from megafish.errors import InputError
from megafish.train import loop
from megafish.train.data import TrainingData
from megafish.train.engine import Engine

CASES = {
    **{f"fp32_zero{stage}": [f"engine.zero_stage={stage}", "train.precision=fp32"] for stage in range(4)},
    **{f"bf16_zero{stage}": [f"engine.zero_stage={stage}", "train.precision=bf16"] for stage in (1, 3)},
    "tensor": ["engine={zero_stage: 1, tensor_parallel: 2}", "train.precision=bf16"],
    "sequence": ["engine={zero_stage: 3, sequence_parallel: 2}", "train.precision=bf16"],
    "offload": ["engine={zero_stage: 2, offload_optimizer: cpu}", "train.precision=bf16"],
    "muon": ["engine.zero_stage=2", "train.precision=bf16", "optimizer.name=muon"],
}
FACTORS = {24: float("nan"), 64: 1e4}
"""First sample of a faulty batch: what its gradient is multiplied by in the last process."""

faults: dict[int, float] = {}
current = {"sample": -1}
count, backward = TrainingData.count, Engine.backward


def watch_count(self: TrainingData, batch: Any, *flags: int) -> Any:
    current["sample"] = -1 if batch is None else batch.first_sample
    return count(self, batch, *flags)


def faulty_backward(self: Engine, loss: torch.Tensor, *, is_last: bool) -> None:
    last = self.processes.rank == self.processes.world_size - 1
    backward(self, loss * faults.get(current["sample"], 1.0) if last else loss, is_last=is_last)


def flipped(folder: Path, overrides: list[str]) -> None:
    """A bit of one weight changes in the last process after step 3."""
    step = Engine.step

    def step_and_flip(self: Engine, *args: Any) -> Any:
        result = step(self, *args)
        flip.steps += 1
        if flip.steps == 3 and self.processes.rank == self.processes.world_size - 1:
            self.module.get_parameter("norm.weight").data.view(torch.int32)[5] ^= 1
        return result

    class flip:
        steps = 0

    Engine.step = step_and_flip  # type: ignore[method-assign]
    command([*overrides, "guard.replica_check_interval=2", f"run_dir={folder}"])
    Engine.step = step  # type: ignore[method-assign]


def unreadable(folder: Path, overrides: list[str]) -> None:
    """The loader of the last process meets data that it refuses."""
    make = Loader._make_step

    def refuse(self: Loader, locations: Any) -> Any:
        if self.rank == self.world_size - 1 and locations.number[0] == 24:
            raise InputError("a sample is damaged")
        return make(self, locations)

    Loader._make_step = refuse  # type: ignore[method-assign]
    command([*overrides, f"run_dir={folder}"])
    Loader._make_step = make  # type: ignore[method-assign]


def command(overrides: list[str]) -> None:
    """`megafish train`, and its exit code as a line of the output."""
    sys.argv = ["megafish", "train", "tiny", *overrides]
    try:
        cli.run()
    except SystemExit as end:
        print(f"exit code {end.code}\n", end="", flush=True)  # in one piece, whatever the others print


def main() -> None:
    folder, cases, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    TrainingData.count, Engine.backward = watch_count, faulty_backward  # type: ignore[method-assign]
    for case in cases.split(","):
        if case in ("flipped", "unreadable"):
            {"flipped": flipped, "unreadable": unreadable}[case](Path(folder) / case, overrides)
            continue
        for kind in ("faulty", "clean"):
            run = Path(folder) / case / kind
            faults.clear()
            if kind == "faulty":
                faults.update(FACTORS)
            else:
                run.mkdir(parents=True, exist_ok=True)
                lines = [json.dumps({"first_sample": first, "samples": 8}) + "\n" for first in FACTORS]
                (run / "quarantine.jsonl").write_text("".join(lines))
            loop.train(load_config("tiny", [*overrides, *CASES[case], f"run_dir={run}"]))


if __name__ == "__main__":
    main()
