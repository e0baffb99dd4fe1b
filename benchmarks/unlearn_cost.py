"""What the methods of unlearning cost: a step of each beside a step of plain fine-tuning on the same texts, in turn.

Both are in DeepSpeed's hands (one process, ZeRO 1), forward, backward and AdamW. Fine-tuning learns the answers of all
texts that the method reads in that step: those to forget, to keep, and what is put in their place. What the starting
model has to be asked for is asked once; the last column says in how many fine-tuning steps' time, and for how many.

    python benchmarks/unlearn_cost.py [--steps 15] [--shape 8x256] [--precision fp32] [--save]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import save, table

from megafish.config import Config
from megafish.config_unlearn import OPTIONS
from megafish.model.transformer import Transformer
from megafish.train.engine import Engine, Processes, building, start_processes
from megafish.unlearn.data import Item, Sets, pack
from megafish.unlearn.objective import Objective, StepPlan
from megafish.unlearn.reference import Kind, Reference, make_reference

VOCAB, LENGTH, ANSWER, BATCH, TEXTS = 8192, 128, 64, 8, 64


def configure(method: str, shape: str, precision: str) -> Config:
    layers, width = map(int, shape.split("x"))
    model = {"num_layers": layers, "hidden_size": width, "num_heads": width // 64, "intermediate_size": width * 8 // 3}
    section = {"model": "start", "method": method, "forget": ["f.jsonl"], "retain": ["r.jsonl"]}
    if method == "relearn":
        section["substitutes"] = "vague.jsonl"
    train = {"steps": 1, "global_batch_size": BATCH, "micro_batch_size": BATCH, "precision": precision}
    return Config.model_validate({"name": "cost", "model": model, "train": train, "unlearn": section})


def texts(count: int, seed: int) -> list[Item]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (count, LENGTH), generator=generator)
    return [Item(tuple(row.tolist()), LENGTH - ANSWER) for row in ids]


def make_sets(method: str) -> Sets:
    forget = texts(TEXTS, 1)
    refused = [[item, item] for item in texts(TEXTS, 4)] if method in ("idk", "dpo") else []
    return Sets(forget, texts(TEXTS, 2), texts(TEXTS, 3), refused)


def make_engine(config: Config, processes: Processes, objective: Objective | None) -> Engine:
    with building(config, processes):
        model = Transformer(config.model, VOCAB)
    for name, parameter in model.named_parameters():
        if objective is not None and not objective.trained(name):
            parameter.register_hook(torch.zeros_like)
    return Engine(config, model, processes)


def fine_tune(engine: Engine, plan: StepPlan, device: torch.device) -> None:
    packed = pack([role.item for place in plan.places for role in place], device)
    bounds: dict[str, Any] = {"cu_seqlens": packed.cu_seqlens, "max_seqlen": packed.max_seqlen}
    engine.backward(engine(packed.tokens, targets=packed.targets, **bounds).loss, is_last=True)
    engine.step(1e-6)


def unlearn(engine: Engine, objective: Objective, plan: StepPlan, reference: Reference | None) -> None:
    terms = objective.loss(engine, plan, slice(0, BATCH), engine.processes.device, reference)
    engine.backward(terms.total, is_last=True)
    engine.step(1e-6)


def measure(method: str, arguments: argparse.Namespace, processes: Processes, folder: Path) -> list[str]:
    config = configure(method, arguments.shape, arguments.precision)
    objective = Objective(config, make_sets(method))
    engines = make_engine(config, processes, None), make_engine(config, processes, objective)
    reference, asked, wanted = None, 0.0, objective.wanted()
    if wanted:
        began = time.perf_counter()
        make_reference(folder / method, engines[1], wanted, "", BATCH)
        asked = time.perf_counter() - began
        weight = engines[1].module.head.weight.detach().clone()  # type: ignore[union-attr, operator]
        compared = any(each.kind is Kind.HIDDEN for each in wanted)
        reference = Reference(folder / method, processes.device, weight if compared else None)
    seconds: tuple[list[float], list[float]] = ([], [])
    plan = objective.plan(0)
    for step in range(arguments.steps + 2):
        plan = objective.plan(step)
        for engine in engines:
            engine.train()
        began = time.perf_counter()
        fine_tune(engines[0], plan, processes.device)
        between = time.perf_counter()
        unlearn(engines[1], objective, plan, reference)
        if step >= 2:  # the first ones allocate
            seconds[0].append(between - began)
            seconds[1].append(time.perf_counter() - between)
    plain, own = (statistics.median(each) for each in seconds)
    texts_read = sum(len(place) for place in plan.places)
    once = f"{asked / plain:.1f} for {sum(len(each.items) for each in wanted)} texts" if wanted else ""
    return [method, str(texts_read), f"{plain * 1e3:.0f}", f"{own * 1e3:.0f}", f"{own / plain:.2f}", once]


def main() -> None:
    """Every method, one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15, help="steps of each, of which the median is taken")
    parser.add_argument("--shape", default="8x256", help="layers x width")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--save", action="store_true", help="write results/DATE_unlearn_cost.md")
    arguments = parser.parse_args()
    processes = start_processes("cpu")
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(method, arguments, processes, Path(folder)) for method in OPTIONS]
    header = ["method", "texts a step", "fine-tuning [ms]", "method [ms]", "ratio", "asked once [fine-tuning steps]"]
    about = (
        f"{arguments.shape.replace('x', ' layers of width ')}, vocabulary {VOCAB}, {arguments.precision}, texts of "
        f"{LENGTH} tokens with answers of {ANSWER}, {BATCH} texts to forget a step, median of {arguments.steps} steps."
    )
    text = f"{about}\n\n{table(rows, header)}"
    print(text)
    if arguments.save:
        print(f"next: less {save('unlearn_cost', text)}")


if __name__ == "__main__":
    main()
