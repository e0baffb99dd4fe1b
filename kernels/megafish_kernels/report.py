"""What can be said about the kernels without a GPU: `python -m megafish_kernels.report`.

Every kernel that the public operations start is compiled for each architecture and its registers, spills, shared
memory, occupancy and instructions are shown; beside them stands a model of the loss's FLOPs, bytes and time. Nothing is
run, and nothing printed here is a measured time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megafish_kernels import (
    aot,
    compact_rows,
    cost,
    goldfish_drop,
    goldfish_keep,
    linear_cross_entropy,
    rms_norm,
    rotary,
    rotary_qkv,
    swiglu,
)
from megafish_kernels.triton_runtime import Launch, record


class Workload(NamedTuple):
    """Calls of public operations whose kernels are to be compiled."""

    shapes: str
    start: Callable[[int], None]
    """Makes the calls on meta tensors, within `record(arch)`; gets the architecture."""


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = True) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=grad and dtype.is_floating_point)


def _loss(tokens: int, vocab: int, dim: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> None:
    hidden, weight = _meta(tokens, dim, dtype=dtype), _meta(vocab, dim, dtype=dtype)
    targets = _meta(tokens, dtype=torch.int64)
    result = linear_cross_entropy(hidden, weight, targets, backend="triton", **options)
    (result[0] if isinstance(result, tuple) else result).backward()


def _loss_with_all(tokens: int, vocab: int, dim: int) -> None:
    main_grad = _meta(vocab, dim, dtype=torch.float32, grad=False)
    features: dict[str, Any] = {"softcap": 30.0, "label_smoothing": 0.1, "z_loss": 1e-4, "return_stats": True}
    _loss(tokens, vocab, dim, bias=_meta(vocab), main_grad=main_grad, **features)


def _loss_in_tf32(tokens: int, vocab: int, dim: int) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        _loss(tokens, vocab, dim, torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)


def _drop(k: int, h: int) -> None:
    tokens, starts = _meta(8, 8192, dtype=torch.int64), _meta(8, 8192, dtype=torch.bool)
    goldfish_drop(tokens, k=k, h=h, document_starts=starts, backend="triton")


def _keep() -> None:
    tokens, starts = _meta(8, 8193, dtype=torch.int64), _meta(8, 8193, dtype=torch.bool)
    goldfish_keep(tokens, _meta(8, 8192, dtype=torch.int64), k=4, document_starts=starts, backend="triton")


def _keep_with_all(h: int) -> None:
    tokens, targets = _meta(8, 8192 + h, dtype=torch.int64), _meta(8, 8192, dtype=torch.int64)
    tables: dict[str, Any] = {
        "document_starts": _meta(8, 8192 + h, dtype=torch.bool),
        "exempt": _meta(128256, dtype=torch.bool),
        "canonical": _meta(128256, dtype=torch.int64),
    }
    goldfish_keep(tokens, targets, k=torch.empty_like(tokens), h=h, halo=h, backend="triton", **tables)


def _compact() -> None:
    compact_rows(_meta(8, 8192, dtype=torch.bool), backend="triton")


def _rms_norm() -> None:
    for width in (2048, 4096):
        rms_norm(_meta(8192, width), _meta(width), 1e-5, backend="triton").sum().backward()
    for width in (4096, 8192):
        x, residual = _meta(8192, width), _meta(8192, width)
        y, total = rms_norm(x, _meta(width), 1e-5, residual=residual, backend="triton")
        (y.sum() + total.sum()).backward()


def _rms_norm_of_heads() -> None:
    for head_dim in (64, 128):
        heads = _meta(2, 4096, 48, head_dim)
        rms_norm(heads[:, :, :32], _meta(head_dim), 1e-5, backend="triton").sum().backward()


def _angles(head_dim: int) -> tuple[Tensor, Tensor]:
    cos, sin = (_meta(8192, 1, head_dim, dtype=torch.float32, grad=False) for _ in range(2))
    return cos, sin


def _rotary(head_dim: int) -> None:
    query, key = _meta(1, 8192, 32, head_dim), _meta(1, 8192, 8, head_dim)
    query, key = rotary(query, key, *_angles(head_dim), backend="triton")
    (query.sum() + key.sum()).backward()


def _rotary_qkv() -> None:
    for head_dim in (64, 128):
        qkv = _meta(1, 8192, 48 * head_dim).unflatten(-1, (48, head_dim))
        query, key, value = rotary_qkv(qkv, *_angles(head_dim), 32, 8, overwrite=True, backend="triton")
        (query.sum() + key.sum() + value.sum()).backward()


def _swiglu() -> None:
    for width in (5632, 14336):
        swiglu(_meta(8192, 2 * width), backend="triton").sum().backward()


# One line for each: name, shapes in words, the calls. Shapes are those of Llama-3.1-8B, TinyLlama and GPT-2.
WORKLOADS: dict[str, Workload] = {
    "linear_cross_entropy": Workload("N 8192, V 128256, D 4096, bf16", lambda arch: _loss(8192, 128256, 4096)),
    "linear_cross_entropy_32k": Workload("N 8192, V 32000, D 2048, bf16", lambda arch: _loss(8192, 32000, 2048)),
    "linear_cross_entropy_50257": Workload("N 8192, V 50257, D 768, bf16", lambda arch: _loss(8192, 50257, 768)),
    "linear_cross_entropy_recompute": Workload(
        "N 8192, V 32000, D 2048, bf16, logits_bytes 1", lambda arch: _loss(8192, 32000, 2048, logits_bytes=1)
    ),
    "linear_cross_entropy_few_rows": Workload("N 512, V 128256, D 4096, bf16", lambda arch: _loss(512, 128256, 4096)),
    "linear_cross_entropy_all": Workload(
        "N 8192, V 128256, D 4096, bf16; bias, softcap, smoothing, z-loss, statistics, main_grad",
        lambda arch: _loss_with_all(8192, 128256, 4096),
    ),
    "linear_cross_entropy_fp32": Workload(
        "N 8192, V 128256, D 4096, fp32", lambda arch: _loss(8192, 128256, 4096, torch.float32)
    ),
    "linear_cross_entropy_tf32": Workload(
        'N 8192, V 128256, D 4096, fp32 after set_float32_matmul_precision("high")',
        lambda arch: _loss_in_tf32(8192, 128256, 4096),
    ),
    "goldfish_drop": Workload("8 x 8192 tokens, k 4, h 13", lambda arch: _drop(4, 13)),
    "goldfish_drop_h50": Workload("8 x 8192 tokens, k 50, h 50", lambda arch: _drop(50, 50)),
    "goldfish_keep": Workload("8 x 8192 targets, k 4, h 13", lambda arch: _keep()),
    "goldfish_keep_all": Workload(
        "8 x 8192 targets, h 13; k of each token, halo, exempt and canonical ids", lambda arch: _keep_with_all(13)
    ),
    "goldfish_keep_all_h50": Workload(
        "8 x 8192 targets, h 50; k of each token, halo, exempt and canonical ids", lambda arch: _keep_with_all(50)
    ),
    "compact_rows": Workload("8 x 8192 rows", lambda arch: _compact()),
    "rms_norm": Workload("8192 x 2048 and 4096; 4096 and 8192 with a residual; bf16", lambda arch: _rms_norm()),
    "rms_norm_heads": Workload(
        "2 x 4096 tokens, 32 of 48 heads of 64 and 128, bf16", lambda arch: _rms_norm_of_heads()
    ),
    "rotary": Workload("8192 tokens, 32 and 8 heads of 128, bf16", lambda arch: _rotary(128)),
    "rotary_qkv": Workload("8192 tokens, 32 + 8 + 8 heads of 64 and 128, in place, bf16", lambda arch: _rotary_qkv()),
    "swiglu": Workload("8192 x 5632 and 14336, bf16", lambda arch: _swiglu()),
}

PRODUCTS = frozenset({"_forward", "_gradient", "_product"})
"""Kernels (by the name of their function) whose work is a matrix product: see `multiplies`."""


def multiplies(facts: aot.KernelFacts) -> bool:
    """Whether the kernel has to use the tensor cores.

    A gradient of logits that were kept (KEPT) multiplies nothing, and exact fp32 products ("ieee") are not for them.
    """
    exact = facts.constants.get("PRECISION") == "ieee" and element_type(facts) == "fp32"
    return facts.kernel in PRODUCTS and not facts.constants.get("KEPT") and not exact


def element_type(facts: aot.KernelFacts) -> str:
    """Of the first array of floating-point numbers; "int" without one."""
    return next((kind for kind in facts.types.values() if kind.startswith(("bf", "fp"))), "int")


def violations(facts: aot.KernelFacts) -> list[str]:
    """`aot.violations` of a kernel of this package."""
    return aot.violations(facts, multiplies(facts))


def record_all(names: Sequence[str], archs: Sequence[int]) -> list[tuple[str, Launch, int]]:
    """(workload, launch, arch) of the kernels that these workloads start, each specialization of a workload once."""
    launches: list[tuple[str, Launch, int]] = []
    for arch in archs:
        for name in names:
            with record(arch) as started:
                WORKLOADS[name].start(arch)
            if not started:
                raise AssertionError(f"{name} starts no kernel")
            distinct: dict[str, Launch] = {}
            for launch in started:
                distinct.setdefault(aot.identity(launch, arch), launch)
            launches += [(name, launch, arch) for launch in distinct.values()]
    return launches


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
    "sizes",
    "variant",
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
    # Sizes of tiles and how it was asked to be; True is an integer too, and 1 is what triton makes of a stride.
    sizes = [str(value) for value in facts.constants.values() if type(value) is int and value > 1]
    variant = [name.lower() for name, value in facts.constants.items() if value is True]
    return [
        facts.kernel,
        str(facts.arch),
        "x".join(sizes) or "-",
        ", ".join(variant) or "-",
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


def summary_table(compiled: Sequence[tuple[str, aot.KernelFacts]]) -> Table:
    """Every kernel on one line: the worst of its variants on each architecture."""
    archs = sorted({facts.arch for _, facts in compiled})
    header = ["kernel", "type", "variants", "tensor cores"]
    header += [f"sm_{arch} {fact}" for arch in archs for fact in ("registers", "shared KiB", "warps/SM")]
    groups: dict[tuple[str, str], dict[str, aot.KernelFacts]] = {}
    for _, facts in compiled:
        name = facts.kernel.strip("_") + (", logits kept" if facts.constants.get("KEPT") else "")
        code = repr(dataclasses.replace(facts, grid=(), seconds=0.0))
        groups.setdefault((name, element_type(facts)), {})[code] = facts
    rows = [[*key, *_worst(list(variants.values()), archs)] for key, variants in groups.items()]
    note = (
        "The worst of each kernel's variants: most registers (and stack, if any), most shared memory, fewest "
        "warps on an SM. A dash among the tensor cores: some variants multiply in exact fp32, or nothing."
    )
    return Table("All kernels", note, header, rows)


def _worst(variants: Sequence[aot.KernelFacts], archs: Sequence[int]) -> list[str]:
    by_arch = [[facts for facts in variants if facts.arch == arch] for arch in archs]
    kinds = dict.fromkeys(", ".join(facts.tensor_ops) or "-" for facts in variants)
    cells = [str(max(map(len, by_arch))), " / ".join(sorted(kinds, key=lambda kind: kind == "-"))]
    for own in by_arch:
        stack = max(facts.stack_bytes for facts in own)
        cells += [
            f"{max(facts.registers for facts in own)}" + (f" + {stack} B" if stack else ""),
            f"{max(facts.shared for facts in own) / 1024:.0f}",
            str(min(facts.occupancy.warps for facts in own)),
        ]
    return cells


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
                f"{entry.logit_passes:.2g}",
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


def as_json(compiled: Sequence[tuple[str, aot.KernelFacts]], peers: bool = True) -> dict[str, Any]:
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
            {
                "workload": name,
                **dataclasses.asdict(facts),
                "occupancy": facts.occupancy._asdict(),
                "violations": violations(facts),
            }
            for name, facts in compiled
        ],
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
        description="Compile every kernel, without a GPU, and show what came of it; then a model of the loss. Takes "
        "about a minute on two cores, seconds where triton's cache has the kernels.",
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


def _failed(error: RuntimeError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = _parser()
    args = parser.parse_args(arguments)
    prefixes = tuple(args.kernels or [""])
    if args.jobs is not None and args.jobs < 1:
        parser.error(f"--jobs: {args.jobs} must be at least 1")
    names = [name for name in WORKLOADS if name.startswith(prefixes)]
    unknown = [prefix for prefix in prefixes if not any(name.startswith(prefix) for name in WORKLOADS)]
    if unknown:
        parser.error(f"--kernels: nothing begins with {unknown[0]!r}; there are {', '.join(WORKLOADS)}")
    for path in (args.json, args.markdown):
        if path and not path.parent.is_dir():
            parser.error(f"{path}: there is no folder {path.parent}")
    try:
        aot.check()
    except RuntimeError as error:
        return _failed(error)
    recorded = record_all(names, args.arch)
    try:
        facts = aot.compile_all([(launch, arch) for _, launch, arch in recorded], args.jobs, progress=True)
    except RuntimeError as error:
        return _failed(error)
    compiled = [(name, entry) for (name, _, _), entry in zip(recorded, facts, strict=True)]

    tables = [*facts_tables(compiled), summary_table(compiled), *model_tables(args.peers)]
    print(", ".join(f"{name} {number}" for name, number in _versions().items()) + "\n")
    for table in tables:
        print(table.text())
    for line in dict.fromkeys(line for entry in facts for line in violations(entry)):
        print(f"attention: {line}")
    if args.json:
        args.json.write_text(json.dumps(as_json(compiled, args.peers), indent=1), encoding="utf-8")
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
    try:
        sys.exit(main())
    except BrokenPipeError:
        # Whoever read the tables, such as head, has read enough; nothing is left to be flushed at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
