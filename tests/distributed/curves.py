"""Worker of test_parity: one run for each ZeRO stage, in the processes that a launcher started."""

from __future__ import annotations

import sys

import torch

from megafish.config import load_config
from megafish.train.loop import train

if __name__ == "__main__":
    folder, stages, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    for stage in stages.split(","):
        train(load_config("tiny", [*overrides, f"engine.zero_stage={stage}", f"run_dir={folder}/zero{stage}"]))
