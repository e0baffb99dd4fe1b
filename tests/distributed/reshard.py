"""Worker of test_reshard: several runs, one after the other, in the processes that a launcher started.

Arguments: a JSON list of [run to continue or null, its new folder, overrides of this run], the name of the checkpoint
to continue from, then overrides of all.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megafish.config import load_config
from megafish.train.engine import start_processes
from megafish.train.loop import train

if __name__ == "__main__":
    jobs, checkpoint, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    processes = start_processes("cpu")
    for begun, folder, own in json.loads(jobs):
        if begun is not None and processes.is_main:
            shutil.copytree(begun, folder)
            (Path(folder) / "latest").write_text(f"{checkpoint}\n")
        dist.barrier()
        train(load_config("tiny", [*overrides, *own]), resume=begun is not None)
