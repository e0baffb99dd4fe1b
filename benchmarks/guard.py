"""What tracking, guard and watchdog cost: steps of one real run, with and without them in turn.

The run is `megafish.train.loop.train` itself on a corpus of random tokens. In every other block of steps the tracker
writes and shows nothing, the guard judges and exchanges nothing, the watchdog gets no marks and its threads rest. The
time that the main thread spends inside these calls is added up as well: it does not suffer from the noise of the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np

SHAPES: dict[str, dict[str, int]] = {
    "4M": {"layers": 4, "width": 256, "vocab": 2048, "batch": 8, "length": 256},
    "25M": {"layers": 10, "width": 384, "vocab": 8192, "batch": 8, "length": 512},
}
BLOCK = 5


def make_corpus(folder: Path, vocab: int) -> None:
    """A Megatron corpus of random tokens with a tokenizer of that size beside it."""
    from megafish.data.prepare import prepare
    from megafish.data.readers import ReadOptions
    from megafish.data.tokenizer import train_tokenizer

    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 5)) for _ in range(20000)]
    text = folder / "text.txt"
    text.write_text("\n\n".join(" ".join(rng.choice(words, 400)) for _ in range(200)), encoding="utf-8")
    train_tokenizer([text], folder / "tokenizer.model", vocab, options=ReadOptions(), progress=False)
    prepare([text], folder / "corpus", folder / "tokenizer.model", documents="blank-line", workers=1, progress=False)


class Switch:
    """Turns the calls on and off, and measures."""

    def __init__(self) -> None:
        self.on = True
        self.steps = 0
        self.inside = 0.0
        self.started: float | None = None
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self.inside_steps: list[float] = []
        self.check_seconds: list[float] = []
        self.watchdog: Any = None

    def wrap(self, owner: Any, name: str, idle: Any) -> None:
        """Count the time of a method; where it is turned off, `idle` is its answer."""
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.on:
                return idle
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.inside += time.perf_counter() - begin

        setattr(owner, name, timed)

    def at_step(self) -> None:
        """Between two steps."""
        now = time.perf_counter()
        if self.started is not None and self.steps > BLOCK:
            self.seconds[self.on].append(now - self.started)
            if self.on:
                self.inside_steps.append(self.inside)
        self.steps += 1
        on = self.steps // BLOCK % 2 == 0
        if on != self.on:
            self.on = on
            if on:
                self.watchdog._end = threading.Event()
                type(self.watchdog).__enter__(self.watchdog)
            else:
                self.watchdog._end.set()
        self.inside = 0.0
        self.started = time.perf_counter()


def work(job: dict[str, Any]) -> dict[str, Any]:
    """One run, in the processes that a launcher started."""
    import torch

    from megafish.config import load_config
    from megafish.train import loop, recovery
    from megafish.train.data import TrainingData
    from megafish.train.spikes import StepGuard
    from megafish.train.track import Tracker
    from megafish.train.watchdog import Watchdog

    torch.set_num_threads(1)
    switch = Switch()
    switch.wrap(Watchdog, "mark", None)
    switch.wrap(StepGuard, "fault", None)
    switch.wrap(StepGuard, "accept", None)
    switch.wrap(recovery, "largest", 0)
    switch.wrap(Tracker, "log", None)
    switch.wrap(Tracker, "show", None)

    enter: Callable[[Any], Any] = Watchdog.__enter__

    def remember(self: Any) -> Any:
        switch.watchdog = self
        return enter(self)

    Watchdog.__enter__ = remember  # type: ignore[method-assign]
    steps = TrainingData.steps

    def marked(self: Any, *args: Any) -> Any:
        for batch in steps(self, *args):
            switch.at_step()
            yield batch

    TrainingData.steps = marked  # type: ignore[method-assign]
    check = loop.check_replicas

    def timed_check(*args: Any) -> None:
        begin = time.perf_counter()
        check(*args)
        switch.check_seconds.append(time.perf_counter() - begin)

    loop.check_replicas = timed_check
    shape, folder = job["shape"], Path(job["folder"])
    run = folder / f"run_{job['processes']}"
    loop.train(
        load_config(
            "tiny",
            [
                f"data.train={folder / 'corpus'}",
                f"run_dir={run}",
                f"model={{num_layers: {shape['layers']}, hidden_size: {shape['width']}, "
                f"num_heads: {shape['width'] // 64}, intermediate_size: {shape['width'] * 8 // 3 // 32 * 32}}}",
                f"data.sequence_length={shape['length']}",
                f"train={{steps: {job['steps']}, global_batch_size: {shape['batch']}, micro_batch_size: 4}}",
                "eval={interval: null, sequences: 1, dropped_sequences: 0}",
                "checkpoint.interval=null",
                f"engine.zero_stage={job['stage']}",
                "track.tensorboard=true",
            ],
        )
    )
    return {
        "on": switch.seconds[True],
        "off": switch.seconds[False],
        "inside": switch.inside_steps,
        "check": switch.check_seconds,
    }


def start(job: dict[str, Any]) -> dict[str, Any]:
    """`work` in fresh processes; the numbers of the main one."""
    python = [sys.executable]
    if job["processes"] > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job['processes']}"]
    result = Path(job["folder"]) / "result.json"
    command = [*python, __file__, "--worker", json.dumps({**job, "result": str(result)})]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, check=True)
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["4M"], help="model shapes")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2], help="processes of a run")
    parser.add_argument("--stages", nargs="+", type=int, default=[1], help="ZeRO stages")
    parser.add_argument("--steps", type=int, default=205, help="steps of a run")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/DATE_guard.md")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        job = json.loads(options.worker)
        result = work(job)
        if os.environ.get("RANK", "0") == "0":
            Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")
        return
    rows = []
    for name in options.shapes:
        with tempfile.TemporaryDirectory() as folder:
            make_corpus(Path(folder), SHAPES[name]["vocab"])
            for stage in options.stages:
                for processes in options.processes:
                    job = {"shape": SHAPES[name], "folder": folder, "steps": options.steps, "stage": stage}
                    found = start({**job, "processes": processes})
                    on, off = (statistics.median(found[key]) for key in ("on", "off"))
                    inside, check = statistics.median(found["inside"]), statistics.median(found["check"])
                    rows.append(
                        [
                            f"{name}, {processes} processes, ZeRO {stage}",
                            f"{off * 1e3:.1f}",
                            f"{on * 1e3:.1f}",
                            f"{on / off:.4f}",
                            f"{inside * 1e3:.3f}",
                            f"{inside / off:.2%}",
                            f"{check * 1e3:.1f}",
                            f"{check / 100 / off:.2%}",
                        ]
                    )
    text = "\n\n".join(
        [
            f"Median step of one run of {options.steps} steps (fp32, one thread a process), in blocks of {BLOCK} steps "
            "without and with tracking (metrics.jsonl, TensorBoard, the line), guard and watchdog. Inside: what the "
            "main process spends in their calls, the exchange of the verdict with its waiting included. Check: one "
            "comparison of the replicas, and its share of the step time at the default of one in 100 steps.",
            common.table(
                rows,
                ["run", "without [ms]", "with [ms]", "ratio", "inside [ms]", "share", "check [ms]", "share of checks"],
            ),
        ]
    )
    print(text)
    if options.save:
        print(f"\nsaved {common.save('guard', text)}")


if __name__ == "__main__":
    main()
