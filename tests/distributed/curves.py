"""Worker of test_parity: one run for each layout, in the processes that a launcher started.

A layout is STAGE-TENSOR-SEQUENCE: the ZeRO stage and the degrees of the mesh.
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
        stage, tensor, sequence = layout.split("-")
        engine = f"engine={{zero_stage: {stage}, tensor_parallel: {tensor}, sequence_parallel: {sequence}}}"
        train(load_config("tiny", [*overrides, engine, f"run_dir={folder}/{layout}"]))
