"""How long large sweeps take: 1,000 runs from one file, and the state of 1,000 run directories.

The directories hold what real ones do: configuration, status, and metrics of 2,000 steps (the tail is read).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

FILE = """
config: tiny
parameters:
  goldfish.k: {from: 2, to: 11, step: 1}
  goldfish.h: {from: 5, to: 23, step: 2}
  optimizer.lr: {from: 1.0e-4, to: 1.0e-2, count: 10, scale: log}
"""


def seconds(action: Callable[[], Any], repeats: int) -> float:
    """Median time of a call."""
    found = []
    for _ in range(repeats):
        begun = time.perf_counter()
        action()
        found.append(time.perf_counter() - begun)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/DATE_sweep.md")
    args = parser.parse_args()
    from megafish.jobs.status import find_runs, statuses
    from megafish.run import RunDir
    from megafish.sweep.expand import expand
    from megafish.sweep.folder import claim, create_run
    from megafish.sweep.spec import load_sweep

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        file = Path("thousand.yaml")
        file.write_text(FILE, encoding="utf-8")

        def expanded() -> list[Any]:
            return expand(load_sweep(file), file, ["data.train=corpus"])

        runs = expanded()
        record = {"kind": "train", "time": time.time(), "loss": 4.2, "tokens_per_s": 1e4, "data_hash": "0" * 16}
        valid = json.dumps({"kind": "valid", "step": 1900, "valid_loss": 4.5}) + "\n"
        steps = [json.dumps({**record, "step": step, "progress": step / 4000}) + "\n" for step in range(2000)]
        metrics = "".join([*steps[:1900], valid, *steps[1900:]])
        life = {
            "state": "stopped", "reason": "stopped by SIGTERM", "host": "n1", "pid": 1, "born": 0.0, "started": 1.0,
            "ended": 2.0, "processes": 8, "job": None,
        }  # fmt: skip
        for run in runs:
            create_run(run)
            directory = RunDir(run.path)
            directory.metrics_file.write_text(metrics, encoding="utf-8")
            directory.status_file.write_text(json.dumps(life), encoding="utf-8")

        claim(load_sweep(file), file.resolve(), ["data.train=corpus"])

        def command(*words: str) -> None:
            subprocess.run([sys.executable, "-m", "megafish", *words], check=True, stdout=subprocess.DEVNULL)

        def asked() -> list[Any]:
            return statuses(find_runs([Path("runs")]))

        rows = [
            (f"a file to {len(runs):,} checked configurations", seconds(expanded, args.repeats)),
            (
                f"state of {len(runs):,} run directories",
                seconds(asked, args.repeats),
            ),
            ("`megafish status` of them, start to end", seconds(lambda: command("status"), args.repeats)),
            ("`megafish sweep status`", seconds(lambda: command("sweep", "status", "thousand.yaml"), args.repeats)),
        ]
    text = common.table([(what, f"{took:.2f}") for what, took in rows], ("work", "time [s]"))
    print(text)
    if args.save:
        print(f"saved {common.save('sweep', text)}")


if __name__ == "__main__":
    main()
