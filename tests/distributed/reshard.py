"""Worker of test_reshard: several runs, one after the other, in the processes that a launcher started.

Arguments: a JSON list of [whether to resume, overrides of this run], then overrides of all.
"""

from __future__ import annotations

import json
import sys

import torch

from megafish.config import load_config
from megafish.train.loop import train

if __name__ == "__main__":
    jobs, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    for resume, own in json.loads(jobs):
        train(load_config("tiny", [*overrides, *own]), resume=resume)
