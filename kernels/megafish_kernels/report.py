"""What can be said about the kernels without a GPU: `python -m megafish_kernels.report`.

Every kernel that the public operations start is compiled for each architecture and its registers, spills, shared
memory, occupancy and instructions are shown; beside them stands a model of the loss's FLOPs, bytes and time. Nothing is
run, and nothing printed here is a measured time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megafish_kernels import aot, cost
from megafish_kernels.triton_runtime import Launch, record


class Workload(NamedTuple):
    """Calls of public operations whose kernels are to be compiled."""

    shapes: str
    start: Callable[[int], None]
    """Makes the calls on meta tensors, within `record(arch)`; gets the architecture."""


def _operation(name: str) -> Callable[..., Any]:
    import megafish_kernels

    if not hasattr(megafish_kernels, name):
        raise NotImplementedError(f"megafish_kernels has no {name}")
    return getattr(megafish_kernels, name)


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = True) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=grad and dtype.is_floating_point)


_FEATURES: dict[str, Any] = {
    "z_loss": 1e-4,
    "label_smoothing": 0.1,
    "softcap": 30.0,
    "logits_bytes": 1,
    "return_stats": True,
}


def _loss(tokens: int, vocab: int, dim: int, **options: Any) -> None:
    targets = _meta(tokens, dtype=torch.int64)
    inputs = (_meta(tokens, dim), _meta(vocab, dim), targets)
    loss = _operation("linear_cross_entropy")(*inputs, backend="triton", **options)
    (loss if isinstance(loss, Tensor) else loss[0]).backward()


def _mask(k: int, h: int) -> None:
    tokens, starts = _meta(8, 8192, dtype=torch.int64), _meta(8, 8192, dtype=torch.bool)
    _operation("goldfish_drop")(tokens, k=k, h=h, document_starts=starts, backend="triton")


def _keep() -> None:
    tokens, starts = _meta(8, 8193, dtype=torch.int64), _meta(8, 8193, dtype=torch.bool)
    targets = _meta(8, 8192, dtype=torch.int64)
    _operation("goldfish_keep")(tokens, targets, k=4, document_starts=starts, backend="triton")


def _rms_norm() -> None:
    x, weight = _meta(8192, 4096), _meta(4096)
    y, total = _operation("rms_norm")(x, weight, 1e-5, residual=_meta(8192, 4096), backend="triton")
    (y.sum() + total.sum()).backward()


def _rotary() -> None:
    query, key = _meta(1, 8192, 32, 128), _meta(1, 8192, 8, 128)
    cos, sin = (_meta(8192, 1, 128, dtype=torch.float32, grad=False) for _ in range(2))
    query, key = _operation("rotary")(query, key, cos, sin, backend="triton")
    (query.sum() + key.sum()).backward()


def _swiglu() -> None:
    _operation("swiglu")(_meta(8192, 2 * 14336), backend="triton").sum().backward()


# One line for each: name, shapes in words, the calls. Shapes are those of Llama-3.1-8B and TinyLlama.
WORKLOADS: dict[str, Workload] = {
    "linear_cross_entropy": Workload("N 8192, V 128256, D 4096, bf16", lambda arch: _loss(8192, 128256, 4096)),
    "linear_cross_entropy_recompute": Workload(
        "the same, no logits kept, all features", lambda arch: _loss(8192, 128256, 4096, **_FEATURES)
    ),
    "linear_cross_entropy_few": Workload("N 512, V 50257, D 768, bf16", lambda arch: _loss(512, 50257, 768)),
    "linear_cross_entropy_32k": Workload("N 8192, V 32000, D 2048, bf16", lambda arch: _loss(8192, 32000, 2048)),
    "goldfish_drop": Workload("8 x 8192 tokens, k 4, h 13", lambda arch: _mask(4, 13)),
    "goldfish_drop_h50": Workload("8 x 8192 tokens, k 50, h 50", lambda arch: _mask(50, 50)),
    "goldfish_keep": Workload("8 x 8192 targets, k 4, h 13", lambda arch: _keep()),
    "rms_norm": Workload("8192 x 4096 with a residual, bf16", lambda arch: _rms_norm()),
    "rotary": Workload("8192 tokens, 32 and 8 heads of 128, bf16", lambda arch: _rotary()),
    "swiglu": Workload("8192 x 14336, bf16", lambda arch: _swiglu()),
}

PRODUCTS = frozenset({"_forward", "_gradient", "_product"})
"""Kernels (by the name of their function) whose work is a matrix product: they must use the tensor cores."""


class Recorded(NamedTuple):
    """What `record_all` found."""

    launches: list[tuple[str, Launch, int]]
    """(workload, launch, arch)."""
    skipped: dict[str, str]
    """Workloads that started no kernel, and why."""


def record_all(names: Sequence[str], archs: Sequence[int]) -> Recorded:
    """Write down the kernels that these workloads start on each architecture, each specialization once."""
    launches: list[tuple[str, Launch, int]] = []
    skipped: dict[str, str] = {}
    for arch in archs:
        for name in names:
            try:
                with record(arch) as started:
                    WORKLOADS[name].start(arch)
            except (NotImplementedError, TypeError, ValueError) as error:
                # An operation that is not there yet, or that has no Triton kernel to be asked for.
                skipped[name] = str(error).splitlines()[0]
                continue
            if not started:
                skipped[name] = "starts no Triton kernel"
            seen: list[tuple[Any, ...]] = []
            for launch in started:
                code = (launch.kernel, launch.signature, launch.constexprs, launch.attrs, launch.options)
                if code not in seen:
                    seen.append(code)
                    launches.append((name, launch, arch))
    return Recorded(launches, skipped)


class Table(NamedTuple):
    """Rows under a title, for a terminal or as Markdown."""

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]

    def text(self, markdown: bool = False) -> str:
        """First column to the left, all others to the right."""
        cells = [[str(cell) for cell in row] for row in [self.header, *self.rows]]
        widths = [max(len(row[column]) for row in cells) for column in range(len(self.header))]
        lines = [
            [
                cell.rjust(width) if column else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            for row in cells
        ]
        if markdown:
            rule = ["-" * (width - 1) + ":" if column else "-" * width for column, width in enumerate(widths)]
            body = "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])
            return f"### {self.title}\n\n{self.note}\n\n{body}\n"
        ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
        body = "\n".join("  ".join(line).rstrip() for line in ruled)
        return f"{self.title}\n{self.note}\n\n{body}\n"


FACTS_HEADER = (
    "kernel",
    "sm",
    "constants",
    "warps, stages",
    "registers",
    "stack B",
    "shared KiB",
    "blocks/SM",
    "warps/SM",
    "bound by",
    "tensor ops",
    "loads 128 b",
    "stores 128 b",
    "barriers",
    "atomics",
    "code KiB",
)


def facts_row(facts: aot.KernelFacts) -> list[str]:
    """One kernel under FACTS_HEADER."""
    # Sizes of tiles; True and False are integers too, and 1 is what triton makes of a stride.
    sizes = [str(value) for value in facts.constants.values() if type(value) is int and value > 1]
    return [
        facts.kernel,
        str(facts.arch),
        "x".join(sizes) or "-",
        f"{facts.warps}, {facts.stages}",
        str(facts.registers),
        f"{facts.stack_bytes} ({facts.spill_bytes} spilled)" if facts.stack_bytes else "0",
        f"{facts.shared / 1024:.1f}",
        str(facts.occupancy.blocks),
        str(facts.occupancy.warps),
        facts.occupancy.limited_by,
        ", ".join(f"{count} {name}" for name, count in facts.tensor_ops.items()) or "-",
        f"{facts.wide_loads} of {facts.loads}",
        f"{facts.wide_stores} of {facts.stores}",
        str(facts.barriers),
        str(facts.atomics),
        f"{facts.code_bytes / 1024:.1f}",
    ]


def facts_tables(compiled: Sequence[tuple[str, aot.KernelFacts]]) -> list[Table]:
    """One table for each workload."""
    tables = []
    for name in dict.fromkeys(name for name, _ in compiled):
        rows = [facts_row(facts) for workload, facts in compiled if workload == name]
        note = "Compiled, not run. Counts are instructions in the program's text, a loop's body once."
        tables.append(Table(f"{name}: {WORKLOADS[name].shapes}", note, FACTS_HEADER, rows))
    return tables


K_VALUES = (None, 4, 50)


def model_rows(shape: cost.Shape, peers: bool) -> list[tuple[str, int | None, cost.Cost]]:
    """(k in words, k, cost) of every method; peers that compute dropped tokens have one row, whatever k."""
    methods = {**cost.OURS, **(cost.COMPACTING_PEERS if peers else {})}
    rows = [(str(k or "off"), k, method(shape, k)) for method in methods.values() for k in K_VALUES]
    others = cost.PEERS if peers else {"full logits": cost.PEERS["full logits"]}
    return [*rows, *(("any", None, method(shape, None)) for method in others.values())]


def model_tables(peers: bool) -> list[Table]:
    """The loss's cost at each shape, and the peers' published times beside the model's."""
    tables = []
    for shape in cost.SHAPES:
        rows = [
            [
                entry.method,
                k,
                f"{entry.flops / 1e12:.1f}",
                f"{entry.traffic / 1e9:.1f}",
                f"{entry.logit_passes:g}",
                f"{entry.peak_memory / 2**20:.0f}",
                *(f"{1e3 * entry.seconds(gpu):.1f}" for gpu in cost.GPUS),
            ]
            for k, _, entry in model_rows(shape, peers)
        ]
        header = ["method", "k", "TFLOP", "HBM GB", "logit passes", "MiB added"]
        header += [f"{gpu.name} model ms" for gpu in cost.GPUS]
        title = f"Model of the loss: {shape.name}, N {shape.tokens}, V {shape.vocab}, D {shape.dim}, bf16"
        tables.append(Table(title, MODEL_NOTE, header, rows))
    return [*tables, published_table()] if peers else tables


MODEL_NOTE = (
    f"A model, not a measurement: forward and backward at {cost.PRODUCT_FRACTION:.0%} of the peak FLOP/s or "
    f"{cost.BANDWIDTH_FRACTION:.0%} of the bandwidth, phase by phase."
)


def published_table() -> Table:
    """Peers' measurements and what the model says of the same step."""
    rows = []
    for entry in cost.PUBLISHED:
        modelled = cost.modelled(entry)
        rows.append(
            [
                entry.method,
                entry.gpu,
                f"{entry.tokens} x {entry.vocab} x {entry.dim}",
                f"{entry.milliseconds:g}",
                "-" if modelled is None else f"{modelled[0]:.1f}",
                "-" if entry.mebibytes is None else f"{entry.mebibytes:g}",
                "-" if modelled is None else f"{modelled[1]:.0f}",
                entry.source,
            ]
        )
    header = (
        "method",
        "GPU",
        "N x V x D",
        "ms, published",
        "ms (model)",
        "MB, published",
        "MiB added (model)",
        "source",
    )
    note = (
        "Published by others on their hardware, not repeated here. Memory is counted in their ways: only CCE's table "
        "leaves out the hidden states and the head, as the model does."
    )
    return Table("Published measurements of the peers, forward and backward", note, header, rows)


def _versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def as_json(
    compiled: Sequence[tuple[str, aot.KernelFacts]], skipped: dict[str, str], peers: bool = True
) -> dict[str, Any]:
    """All figures of a report, machine-readable: bytes, FLOPs and seconds."""
    model = [
        {
            "shape": shape._asdict(),
            "method": entry.method,
            "k": k,
            "flops": entry.flops,
            "traffic_bytes": entry.traffic,
            "logit_passes": entry.logit_passes,
            "memory_bytes": entry.memory,
            "model_seconds": {gpu.name: entry.seconds(gpu) for gpu in cost.GPUS},
        }
        for shape in cost.SHAPES
        for _, k, entry in model_rows(shape, peers)
    ]
    return {
        "versions": _versions(),
        "kernels": [
            {"workload": name, **dataclasses.asdict(facts), "occupancy": facts.occupancy._asdict()}
            for name, facts in compiled
        ],
        "skipped": skipped,
        "violations": [line for _, facts in compiled for line in aot.violations(facts, PRODUCTS)],
        "model": {
            "product_fraction": cost.PRODUCT_FRACTION,
            "bandwidth_fraction": cost.BANDWIDTH_FRACTION,
            "gpus": [gpu._asdict() for gpu in cost.GPUS],
            "rows": model,
        },
        "published": [entry._asdict() for entry in cost.PUBLISHED] if peers else [],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megafish_kernels.report",
        description="Compile every kernel, without a GPU, and show what came of it; then a model of the loss.",
        epilog="example: python -m megafish_kernels.report --arch 90 --kernels linear_cross_entropy --json facts.json",
    )
    parser.add_argument(
        "--arch",
        type=int,
        nargs="+",
        choices=sorted(aot.LIMITS),
        default=sorted(aot.LIMITS),
        help="compute capabilities times ten: 80 is an A100, 90 an H100, 100 a B200",
    )
    parser.add_argument(
        "--kernels", nargs="+", metavar="NAME", help=f"workloads whose names begin so, of {', '.join(WORKLOADS)}"
    )
    parser.add_argument("--peers", action="store_true", help="model the peers' losses too, beside their publications")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables as Markdown")
    parser.add_argument("--jobs", type=int, metavar="N", help="compile N kernels at a time (default: one a core)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = _parser()
    args = parser.parse_args(arguments)
    prefixes = tuple(args.kernels or [""])
    names = [name for name in WORKLOADS if name.startswith(prefixes)]
    unknown = [prefix for prefix in prefixes if not any(name.startswith(prefix) for name in WORKLOADS)]
    if unknown:
        parser.error(f"--kernels: nothing begins with {unknown[0]!r}; there are {', '.join(WORKLOADS)}")
    try:
        aot.check()
        recorded = record_all(names, args.arch)
        pairs = [(launch, arch) for _, launch, arch in recorded.launches]
        facts = aot.compile_all(pairs, args.jobs, progress=True)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    compiled = [(name, entry) for (name, _, _), entry in zip(recorded.launches, facts, strict=True)]

    tables = [*facts_tables(compiled), *model_tables(args.peers)]
    print("\n".join([", ".join(f"{name} {number}" for name, number in _versions().items()), ""]))
    for table in tables:
        print(table.text())
    for name, reason in recorded.skipped.items():
        print(f"not compiled: {name}: {reason}")
    for line in (line for entry in facts for line in aot.violations(entry, PRODUCTS)):
        print(f"attention: {line}")
    if args.json:
        args.json.write_text(json.dumps(as_json(compiled, recorded.skipped, args.peers), indent=1), encoding="utf-8")
        print(f"wrote {args.json}")
    if args.markdown:
        args.markdown.write_text("\n".join(table.text(markdown=True) for table in tables), encoding="utf-8")
        print(f"wrote {args.markdown}")
    if not args.peers:
        print("next: python -m megafish_kernels.report --peers, for the loss beside its peers")
    else:
        print(
            "next: python benchmarks/kernels_static.py in the repository, for the peers' kernels compiled the same way"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
