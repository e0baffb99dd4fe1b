"""Worker of test_parity: trains one run for each ZeRO stage in the processes that a launcher started."""

from __future__ import annotations

import sys

import torch

from megafish.config import load_config
from megafish.train.engine import stop_processes
from megafish.train.loop import train

if __name__ == "__main__":
    file, stages, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    for stage in stages.split(","):
        train(load_config(file, [*overrides, f"engine.zero_stage={stage}", f"name=zero{stage}"]))
    stop_processes()
