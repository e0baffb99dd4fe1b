"""Validation loss of AdamW and Muon on the demo's corpus, each at several learning rates.

    python benchmarks/optimizers.py [--save] [--steps 200]

Preset tiny on Python's standard library (2 MB of text), plain loss, the same samples in the same order.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from common import save, table
from rich.console import Console

from megafish.config import load_config
from megafish.demo import make_corpus
from megafish.train.loop import train

RATES = (1e-3, 2e-3, 4e-3)
MARKS = (0.5, 1.0)
BATCH, LENGTH = 4, 256


def curve(folder: Path, corpus: Path, optimizer: str, rate: float, steps: int) -> tuple[list[float], float, float]:
    """(validation loss at MARKS of the run, seconds a step, seconds of its optimizer phase: medians)."""
    run = folder / f"{optimizer}_{rate:g}"
    config = load_config(
        "tiny",
        [
            f"run_dir={run}",
            f"data.train={corpus}",
            f"data.sequence_length={LENGTH}",
            "goldfish.k=null",
            f"train.steps={steps}",
            f"train.global_batch_size={BATCH}",
            f"train.micro_batch_size={BATCH}",
            f"optimizer={{name: {optimizer}, lr: {rate}}}",
            "schedule={warmup_fraction: 0.05, min_lr_ratio: 0}",
            f"eval={{interval: {steps // 2}, sequences: 128}}",
            "checkpoint.interval=null",
            "profile.phases=true",
        ],
    )
    train(config, console=Console(quiet=True))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = {record["step"]: record["valid_loss"] for record in records if record["kind"] == "valid"}
    steps_s = [BATCH * LENGTH / record["tokens_per_s"] for record in records if record["kind"] == "train"]
    optimizer_s = [record["seconds_optimizer"] for record in records if record["kind"] == "train"]
    marks = [losses[int(steps * mark)] for mark in MARKS]
    return marks, sorted(steps_s)[len(steps_s) // 2], sorted(optimizer_s)[len(optimizer_s) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save", action="store_true", help="write results/DATE_optimizers.md")
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_corpus(Path(folder) / "demo", seed=0)
        started = time.monotonic()
        for optimizer in ("adamw", "muon"):
            for rate in RATES:
                marks, step, update = curve(Path(folder), corpus, optimizer, rate, asked.steps)
                cells = [f"{loss:.4f}" for loss in marks]
                rows.append([optimizer, f"{rate:g}", *cells, f"{step * 1e3:.0f} ms", f"{update * 1e3:.0f} ms"])
                print(*rows[-1], f"after {time.monotonic() - started:.0f} s", flush=True)
    head = ["optimizer", "rate", *(f"loss at {asked.steps * mark:.0f}" for mark in MARKS), "step", "of it optimizer"]
    text = (
        f"Preset tiny, batches of {BATCH} x {LENGTH} tokens, {asked.steps} steps, validation loss in nats a token; "
        f"torch {torch.__version__} with {torch.get_num_threads()} threads.\n\n{table(rows, head)}"
    )
    print(text)
    if asked.save:
        print(save("optimizers", text))


if __name__ == "__main__":
    main()
