"""Worker of test_parity: one run for each layout, in the processes that a launcher started.

A layout is STAGE-TENSOR-SEQUENCE-MICRO: ZeRO stage, the degrees of the mesh, micro-batch size.
"""

from __future__ import annotations

import sys

import torch

from megafish.config import load_config
from megafish.train.loop import train

if __name__ == "__main__":
    folder, layouts, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    for layout in layouts.split(","):
        stage, tensor, sequence, micro = layout.split("-")
        changes = [
            f"engine={{zero_stage: {stage}, tensor_parallel: {tensor}, sequence_parallel: {sequence}}}",
            f"train.micro_batch_size={micro}",
            f"run_dir={folder}/{layout}",
        ]
        train(load_config("tiny", [*overrides, *changes]))
