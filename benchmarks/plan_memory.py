"""The plan's memory beside what processes really take: DeepSpeed's states tensor by tensor, and peak resident memory.

    python benchmarks/plan_memory.py                    states of ZeRO 0 to 3 on 1, 2 and 4 processes, in fp32 and bf16
    python benchmarks/plan_memory.py --peak             peak memory of whole training steps, small shapes
    python benchmarks/plan_memory.py --350m             the 350m preset under ZeRO-3 on 2 processes (10 GiB)

Every process is a real one over gloo. States are counted after the last backward pass of the second step, as the
union of the memory that live tensors lie in; "alive" is that of all tensors that Python's garbage collector knows. The
peak is the kernel's high-water mark of resident memory while the steps run; the plan's base is the resident memory just
before the model is built.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import common
import torch

SMALL = "model={num_layers: 3, hidden_size: 96, num_heads: 6, num_kv_heads: 2, intermediate_size: 248}"
MEDIUM = "model={num_layers: 8, hidden_size: 512, num_heads: 8, intermediate_size: 1408}"
VOCABULARY = 1000
MEDIUM_VOCABULARY = 16000
STEPS = 2
"""The optimizer's state exists from the end of the first step on."""


# ------------------------------------------------------------------------------------------ what a process really holds


class Extents:
    """Memory that tensors lie in, each byte once."""

    def __init__(self) -> None:
        self.ranges: dict[int, list[tuple[int, int]]] = {}

    def add(self, tensors: Iterable[torch.Tensor]) -> int:
        """Bytes of the tensors that were not there before."""
        return sum(self._add(tensor) for tensor in tensors)

    def add_storages(self, tensors: Iterable[torch.Tensor]) -> int:
        """The same of all the memory that the tensors keep alive, also where they see a part of it."""
        return self.add(torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()) for tensor in tensors)

    def _add(self, tensor: torch.Tensor) -> int:
        if tensor.device.type == "meta" or tensor.numel() == 0:
            return 0
        begin = tensor.storage_offset() * tensor.element_size()
        spread = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        new = [(begin, begin + spread * tensor.element_size())]
        known = self.ranges.setdefault(tensor.untyped_storage().data_ptr(), [])
        for low, high in known:
            new = [part for a, b in new for part in ((a, min(b, low)), (max(a, high), b)) if part[0] < part[1]]
        known.extend(new)
        return sum(b - a for a, b in new)


def live() -> list[torch.Tensor]:
    """All tensors that Python knows."""
    gc.collect()
    return [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]


def held(engine: Any, before: set[int]) -> dict[str, int]:
    """Bytes of weights, masters, moments and gradients in DeepSpeed's hands, of its bucket, and of all other live
    tensors but those whose storages were there `before`."""
    optimizer = engine.optimizer
    parameters = list(engine.module.parameters())
    inner = getattr(optimizer, "optimizer", optimizer)
    names = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")
    masters = [tensor for name in names for tensor in getattr(optimizer, name, [])]
    gradients = [p.grad for p in parameters] + [getattr(p, "grad_accum", None) for p in parameters]
    gradients += getattr(optimizer, "fp32_groups_gradients_flat", [])
    averaged = [g for group in getattr(optimizer, "averaged_gradients", {}).values() for g in group or []]
    gradients += [getattr(optimizer, "grad_partitions_flat_buffer", None)]
    extents = Extents()
    found = {
        "parameters": extents.add([*_weights(parameters), *getattr(optimizer, "bit16_groups_flat", [])]),
        "masters": extents.add(masters),
        "moments": extents.add(t for state in inner.state.values() for t in state.values() if t.dim() > 0),
        "gradients": extents.add(g for g in gradients if g is not None) + extents.add_storages(averaged),
        "buckets": extents.add(_buckets(optimizer)),
    }
    found["other"] = extents.add(t for t in live() if t.device.type == "cpu" and _address(t) not in before)
    return found


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _weights(parameters: list[torch.nn.Parameter]) -> Iterator[torch.Tensor]:
    for parameter in parameters:
        yield parameter.data
        if hasattr(parameter, "ds_tensor"):
            yield parameter.ds_tensor.data


def _buckets(optimizer: Any) -> Iterator[torch.Tensor]:
    for bucket in getattr(optimizer, "ipg_buckets", {}).values():
        buffer = bucket.buffer
        yield from buffer if isinstance(buffer, list) else [buffer]


def work(case: dict[str, Any]) -> dict[str, Any]:
    """Train a few steps in this process and measure; called by every process of a group."""
    from megafish.config import load_config
    from megafish.model.transformer import Transformer
    from megafish.plan.layout import layout_of
    from megafish.plan.memory import plan_memory
    from megafish.plan.states import parameters_of, states_of
    from megafish.train.engine import Engine, start_processes

    config = load_config(case["preset"], case["overrides"])
    processes = start_processes("cpu")
    world = processes.world_size
    layout = layout_of(config, world, "cpu")
    torch.manual_seed(processes.rank)
    batch = random_batch(config, case["vocabulary"])
    import deepspeed  # noqa: F401  # part of the base

    before = {_address(tensor) for tensor in live() if tensor.device.type == "cpu"}
    base = common.reset_peak_rss()
    model = Transformer(
        config.model,
        case["vocabulary"],
        loss=config.loss,
        activation_checkpointing=config.train.activation_checkpointing,
    )
    engine = Engine(config, model, processes)
    del model
    built = common.peak_rss()
    states: dict[str, int] = {}
    common.reset_peak_rss()
    for step in range(STEPS):
        for index in range(layout.micro_batches):
            output = engine(**batch, denominator=1000.0)
            engine.backward(output.loss, is_last=index == layout.micro_batches - 1)
            del output
        if step == 1 and case["states"]:
            states = held(engine.engine, before)
        engine.step(1e-4)
    peak = common.peak_rss()
    engine.engine.destroy()
    kept = float((~batch["drop"]).float().mean())
    parameters = parameters_of(config, case["vocabulary"])
    planned = states_of(parameters, layout, processes.rank)
    plan = plan_memory(config, case["vocabulary"], layout, kept_fraction=kept, base=base)
    return {
        "rank": processes.rank,
        "world": world,
        "stage": config.engine.zero_stage,
        "precision": config.train.precision,
        "states": states,
        "planned": {name: getattr(planned, name) for name in ("parameters", "masters", "moments", "gradients")},
        "base": base,
        "built": built,
        "peak": peak,
        "total": plan.total,
        "moment": plan.moment,
        "parts": plan.parts,
    }


def random_batch(config: Any, vocabulary: int) -> dict[str, Any]:
    """A micro-batch of random tokens, two documents a row, of which goldfish.k drops its share."""
    rows, length = config.train.micro_batch_size, config.data.sequence_length
    tokens = torch.randint(vocabulary, (rows, length + 1))
    k = config.goldfish.k
    drop = torch.rand(rows, length) < 1 / k if k else torch.zeros(rows, length, dtype=torch.bool)
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "targets": tokens[:, 1:].contiguous(),
        "drop": drop,
        "cu_seqlens": torch.arange(0, rows * length + 1, length // 2, dtype=torch.int32),
        "max_seqlen": length // 2,
    }


# ------------------------------------------------------------------------------------------------------- starting them


def run_cases(processes: int, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What every process of a group measured in every case, one case after the other."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--worker", folder, json.dumps(cases)]
        if processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            command[1:1] = launcher
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        return [json.loads(line) for file in sorted(Path(folder).iterdir()) for line in file.read_text().splitlines()]


def state_cases(precisions: Iterable[str] = ("fp32", "bf16")) -> list[dict[str, Any]]:
    """Every stage in both precisions (bf16 has no stage 0), small."""
    return [
        case(SMALL, VOCABULARY, stage, precision, states=True, batch=16, micro=2, length=64)
        for precision in precisions
        for stage in range(4)
        if (stage, precision) != (0, "bf16")
    ]


def case(
    shape: str,
    vocabulary: int,
    stage: int,
    precision: str,
    *,
    states: bool = False,
    batch: int,
    micro: int,
    length: int,
    checkpointing: bool = False,
) -> dict[str, Any]:
    """One run for `work`."""
    overrides = [
        shape,
        f"engine.zero_stage={stage}",
        f"train.precision={precision}",
        f"train.global_batch_size={batch}",
        f"train.micro_batch_size={micro}",
        f"data.sequence_length={length}",
        f"train.activation_checkpointing={str(checkpointing).lower()}",
        "checkpoint.asynchronous=false",  # nothing is saved here
    ]
    return {"preset": "tiny", "overrides": overrides, "vocabulary": vocabulary, "states": states}


def state_rows(results: list[dict[str, Any]]) -> list[list[object]]:
    """Planned and measured, the process of each run that is furthest off."""
    worst: dict[tuple[Any, ...], list[object]] = {}
    errors: dict[tuple[Any, ...], float] = {}
    for result in results:
        key = (result["precision"], result["stage"], result["world"])
        planned, measured = sum(result["planned"].values()), sum(result["states"][name] for name in result["planned"])
        error = planned / measured - 1
        if key not in errors or abs(error) > abs(errors[key]):
            parts = [
                f"{result['planned'][n] / 2**10:,.0f} / {result['states'][n] / 2**10:,.0f}" for n in result["planned"]
            ]
            errors[key] = error
            worst[key] = [*key, *parts, f"{100 * error:+.2f} %", f"{result['states']['other'] / 2**10:,.0f}"]
    return [worst[key] for key in sorted(worst)]


def peak_rows(results: list[dict[str, Any]], name: str) -> list[list[object]]:
    """Planned and measured peaks of the process that is furthest off."""
    result = max(results, key=lambda r: abs(r["total"] / r["peak"] - 1))
    mib = 2**20
    return [
        [
            name,
            result["precision"],
            result["stage"],
            result["world"],
            f"{result['base'] / mib:,.0f}",
            f"{result['built'] / mib:,.0f}",
            f"{result['total'] / mib:,.0f}",
            f"{result['peak'] / mib:,.0f}",
            f"{100 * (result['total'] / result['peak'] - 1):+.1f} %",
            result["moment"],
        ]
    ]


PEAK_HEADER = (
    "run", "precision", "ZeRO", "processes", "base", "building", "plan [MiB]", "measured [MiB]", "error", "moment",
)  # fmt: skip
STATE_HEADER = (
    "precision", "ZeRO", "processes", "weights [KiB]", "masters", "moments", "gradients", "error", "other tensors",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak", action="store_true", help="peak memory of whole steps")
    parser.add_argument("--350m", dest="large", action="store_true", help="the 350m preset, ZeRO-3, 2 processes")
    parser.add_argument("--stages", default="0,1,2,3", help="ZeRO stages of --peak")
    parser.add_argument("--processes", default="1,2,4", help="numbers of processes")
    parser.add_argument("--json", action="store_true", help="print the measurements as JSON lines instead of a table")
    parser.add_argument("--save", action="store_true", help="keep the table in results/")
    parser.add_argument("--worker", nargs=2, metavar=("FOLDER", "CASES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        torch.set_num_threads(1)
        folder, cases = options.worker
        for entry in json.loads(cases):
            result = work(entry)
            with open(Path(folder) / f"rank{result['rank']}.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # no process leaves while another still waits for it
        # Not by way of the interpreter's end: once in some dozens of times a thread of torch's that still wants Python
        # then aborts the process, which has done its work.
        os._exit(0)
    counts = [int(count) for count in options.processes.split(",")]
    if options.large:
        large = {
            "preset": "350m",
            "overrides": [
                "engine.zero_stage=3", "train.global_batch_size=4", "train.micro_batch_size=1",
                "data.sequence_length=512", "checkpoint.asynchronous=false",
            ],
            "vocabulary": 50257,
            "states": False,
        }  # fmt: skip
        results = run_cases(2, [large])
        lines, header = peak_rows(results, "350m, 512 tokens"), PEAK_HEADER
        name = "plan_350m"
    elif options.peak:
        lines, header, name, results = [], PEAK_HEADER, "plan_peak", []
        for count in counts:
            for entry, label in peak_cases(options.stages.split(",")):
                found = run_cases(count, [entry])
                results += found
                lines += peak_rows(found, label)
                print(*lines[-1], sep="  ", file=sys.stderr, flush=True)
    else:
        results = [result for count in counts for result in run_cases(count, state_cases())]
        lines, header, name = state_rows(results), STATE_HEADER, "plan_states"
    if options.json:
        print("\n".join(json.dumps(result) for result in results))
        return
    text = common.table(lines, header)
    print(text)
    if options.save:
        print(common.save(name, text))


def peak_cases(stages: list[str]) -> Iterator[tuple[dict[str, Any], str]]:
    """Runs of some hundred MiB: every stage in both precisions, and with checkpointing."""
    for precision in ("fp32", "bf16"):
        for stage in map(int, stages):
            if (stage, precision) != (0, "bf16"):
                sizes = {"batch": 16, "micro": 4, "length": 256}
                yield case(MEDIUM, MEDIUM_VOCABULARY, stage, precision, **sizes), "34M"
    if "0" in stages:
        yield case(MEDIUM, MEDIUM_VOCABULARY, 0, "fp32", batch=16, micro=4, length=256, checkpointing=True), "34M, ckpt"


if __name__ == "__main__":
    main()
