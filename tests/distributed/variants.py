"""Worker of test_zero: several short runs in the processes that a launcher started, each with overrides of its own. A
run that is there already is continued."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megafish.config import load_config
from megafish.errors import InputError
from megafish.train.loop import train

if __name__ == "__main__":
    folder, variants, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    runs = json.loads(variants)
    # Looked for before the processes meet: none has made a folder yet.
    there = {name for name in runs if Path(folder, name).exists()}
    for name, own in runs.items():
        try:
            train(load_config("tiny", [*overrides, *own, f"run_dir={folder}/{name}"]), resume=name in there)
        except InputError as error:
            if dist.get_rank() == 0:
                print(f"refused {name}: {error}")
