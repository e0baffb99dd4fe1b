"""What a checkpoint costs the training: the stall of an asynchronous save beside that of a synchronous one, in one run.

A model trains on random tokens in one process (ZeRO 1, fp32) and saves by turns: at once, while the training waits; and
asynchronously, while it goes on. The whole checkpoint is written each time: weights, fp32 weights, both moments; with
its checksums, synced to the disk. Steps beside a save are timed too, since the writing thread takes its share of the
processor.

    python benchmarks/checkpoint.py [--save]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import machine, run_isolated, save, table

VOCAB = 16_384
MODEL = {"num_layers": 8, "hidden_size": 640, "num_heads": 10, "intermediate_size": 1664}


def measure(folder: str, repeats: int, length: int, threads: int) -> dict[str, Any]:
    """Seconds of stalls, writes and steps; called in a process of its own."""
    from megafish.config import Config
    from megafish.model.transformer import Transformer
    from megafish.run import RunDir
    from megafish.train.engine import Engine, start_processes
    from megafish.train.saver import Saver

    torch.set_num_threads(threads)
    config = Config.model_validate(
        {
            "name": "benchmark",
            "model": {**MODEL, "tie_embeddings": True},
            "data": {"sequence_length": length},
            "checkpoint": {"keep": 1},
            "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "precision": "fp32"},
        }
    )
    model = Transformer(config.model, VOCAB)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    engine = Engine(config, model, start_processes("cpu"))
    tokens = torch.randint(0, VOCAB, (1, length), generator=torch.Generator().manual_seed(0))

    def step() -> float:
        started = time.perf_counter()
        engine.backward(engine(tokens, targets=tokens.roll(-1, 1)).loss, is_last=True)
        engine.step(1e-4)
        return time.perf_counter() - started

    figures: dict[str, list[float]] = {name: [] for name in ("sync", "async", "write", "quiet", "beside")}
    number = 0
    with Saver(RunDir(folder), engine, config.checkpoint) as saver:
        # Host memory for the copies is allocated beside the first steps, as in a run. The first turn is reported apart.
        step()
        saver.allocate()
        for turn in range(repeats + 1):
            figures["quiet"] += [step() for _ in range(3)]
            number += 1
            saver.save({"step": number, "valid_loss": None}, wait=True)
            synchronous = saver.records()[0]
            number += 1
            saver.save({"step": number, "valid_loss": None}, wait=False)
            beside = []
            while not (records := saver.records()):
                beside.append(step())
                saver.poll(*saver.flags())
            if turn == 0:
                first = records[0]["stall_s"]
                figures["quiet"].clear()
                continue
            figures["beside"] += beside
            figures["sync"].append(synchronous["stall_s"])
            figures["async"].append(records[0]["stall_s"])
            figures["write"].append(records[0]["write_s"])
    medians = {name: statistics.median(values) for name, values in figures.items()}
    ratios = [a / s for a, s in zip(figures["async"], figures["sync"], strict=True)]
    return {**medians, "first": first, "bytes": records[0]["bytes"], "parameters": parameters, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="saves of each kind, of which the median counts")
    parser.add_argument("--length", type=int, default=256, help="tokens of a step")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--folder", type=Path, default=None, help="where to write (default: the temporary directory)")
    parser.add_argument("--save", action="store_true", help="write results/DATE_checkpoint.md")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        print("measuring", file=sys.stderr, flush=True)
        found = run_isolated(measure, folder, args.repeats, args.length, args.threads).result
    ratios = found["ratios"]
    rows = [
        ["synchronous save: stall", f"{found['sync']:.3f}", ""],
        ["asynchronous save: stall", f"{found['async']:.3f}", f"{statistics.median(ratios):.3f}"],
        ["asynchronous save: until it is the latest", f"{found['write']:.3f}", f"{found['write'] / found['sync']:.2f}"],
        ["first asynchronous save: stall", f"{found['first']:.3f}", f"{found['first'] / found['sync']:.3f}"],
        ["step with no save on its way", f"{found['quiet']:.3f}", ""],
        ["step beside an asynchronous save", f"{found['beside']:.3f}", f"{found['beside'] / found['quiet']:.2f} *"],
    ]
    text = (
        f"{found['parameters'] / 1e6:.1f} M parameters, {found['bytes'] / 1e6:.0f} MB a checkpoint, fp32, ZeRO 1, one "
        f"process of {args.threads} threads, {args.length} tokens a step. Medians of {args.repeats} saves of each, "
        "by turns in one run. The stall is how long the training stands still; the first turn is reported apart.\n\n"
        f"{table(rows, ['', 's', 'ratio'])}\n\n"
        "Ratios are to the synchronous save; * to the step with no save. Ratio of the stalls in each turn: "
        f"{', '.join(f'{ratio:.3f}' for ratio in ratios)}."
    )
    print(f"{machine()}\n\n{text}")
    if args.save:
        print(f"saved {save('checkpoint', text)}")


if __name__ == "__main__":
    main()
