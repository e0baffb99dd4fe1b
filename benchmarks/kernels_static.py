"""megafish's Triton kernels beside those of Liger and CCE, compiled the same way: static facts, no GPU, no times.

    python benchmarks/kernels_static.py                 the tables
    python benchmarks/kernels_static.py --arch 90 --save

Peers, at the configurations that they start with when nothing is tuned: Liger's cross-entropy row kernel (its products
are cuBLAS's), CCE's three kernels. Both packages are optional: pip install -e '.[bench]' -c constraints.txt. Each is
started as its own code starts it for one step of N tokens of a vocabulary V and a width D in bfloat16, with an ignored
target here and there. The second table is the cost model of `megafish_kernels.cost`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from common import machine, save, table

from megafish_kernels import aot, cost, report
from megafish_kernels.triton_runtime import Launch, launch, record

PEERS = {"liger-kernel": "Liger", "cut-cross-entropy": "CCE"}
LOSS = "linear_cross_entropy"
INSTALL = "pip install -c constraints.txt -e '.[bench]'"
HEADER = [
    "kernel",
    "sm",
    "variant",
    "warps, stages",
    "registers",
    "stack B",
    "shared KiB",
    "warps/SM",
    "tensor ops",
    "loads 128 b",
    "barriers",
    "atomics",
]


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def start_liger(shape: cost.Shape) -> None:
    """The row kernel as ops/fused_linear_cross_entropy.py starts it on one chunk of logits."""
    from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel
    from liger_kernel.ops.fused_linear_cross_entropy import MAX_FUSED_SIZE

    rows = 256
    logits, targets, loss = _meta(rows, shape.vocab), _meta(rows, dtype=torch.int64), _meta(rows, dtype=torch.float32)
    launch(
        liger_cross_entropy_kernel,
        (rows,),
        X_ptr=logits,
        X_stride=shape.vocab,
        Y_ptr=targets,
        Y_stride=1,
        weight_ptr=None,
        loss_ptr=loss,
        z_loss_ptr=None,
        loss_stride=1,
        token_accuracy_ptr=None,
        token_accuracy_stride=0,
        predicted_tokens_ptr=None,
        predicted_tokens_stride=0,
        n_cols=shape.vocab,
        n_non_ignore=shape.kept(4),
        sum_non_ignore_weight=shape.kept(4),
        weight_sum=0.0,
        ignore_index=-100,
        lse_square_scale=0.0,
        label_smoothing=0.0,
        reduction="mean",
        softcap=None,
        RETURN_Z_LOSS=False,
        RETURN_TOKEN_ACCURACY=False,
        RETURN_PREDICTED_TOKENS=False,
        HAS_WEIGHT=False,
        HAS_SOFTCAPPING=False,
        HAS_GRADIENTS=True,
        BLOCK_SIZE=min(MAX_FUSED_SIZE, 1 << (shape.vocab - 1).bit_length()),
        num_warps=32,
    )


def _started(heuristics: Any, grid: Callable[[dict[str, Any]], int], **arguments: Any) -> None:
    """Start what @triton.heuristics wraps, however often: outer ones first, as triton does."""
    while not hasattr(heuristics, "signature"):
        for name, choose in heuristics.values.items():
            arguments[name] = choose(arguments)
        heuristics = heuristics.fn
    launch(heuristics, (grid(arguments),), **arguments)


def start_cce(shape: cost.Shape) -> None:
    """The three kernels as cce.py starts them, with ignored targets and without a gradient filter."""
    from cut_cross_entropy.cce_backward import _cce_backward_kernel
    from cut_cross_entropy.cce_lse_forward import _cce_lse_forward_kernel
    from cut_cross_entropy.indexed_dot import _indexed_neg_dot_forward_kernel

    rows, dim, vocab = shape.kept(4), shape.dim, shape.vocab
    hidden, head = _meta(shape.tokens, dim), _meta(vocab, dim)
    valids, targets = _meta(rows, dtype=torch.int32), _meta(shape.tokens, dtype=torch.int64)
    per_row = _meta(rows, dtype=torch.float32)
    strides = {"stride_eb": dim, "stride_ed": 1, "stride_cv": dim, "stride_cd": 1, "stride_vb": 1}

    def locks(count: int) -> torch.Tensor:
        return _meta(count, dtype=torch.int32)

    _started(
        _cce_lse_forward_kernel,
        lambda chosen: cost.ceil_div(rows, chosen["BLOCK_B"]) * cost.ceil_div(vocab, chosen["BLOCK_V"]),
        E=hidden,
        C=head,
        LSE=per_row,
        LA=None,
        Locks=_meta(cost.ceil_div(rows, 128), dtype=torch.uint32),
        Valids=valids,
        softcap=None,
        B=rows,
        V=vocab,
        D=dim,
        stride_lse_b=1,
        num_locks=cost.ceil_div(rows, 128),
        B_BIN=1024,
        **strides,
    )
    _started(
        _indexed_neg_dot_forward_kernel,
        lambda chosen: cost.ceil_div(rows, chosen["BLOCK_B"]) * cost.ceil_div(dim, chosen["BLOCK_D"]),
        E=hidden,
        C=head,
        Inds=targets,
        Valids=valids,
        Out=per_row,
        B=rows,
        D=dim,
        stride_ib=1,
        B_BIN=1024,
        SHIFT=False,
        **strides,
    )
    across = cost.ceil_div(dim, 64)
    down_rows, down_vocab = cost.ceil_div(rows, across), cost.ceil_div(vocab, across)
    _started(
        _cce_backward_kernel,
        lambda chosen: cost.ceil_div(rows, chosen["BLOCK_B"]) * cost.ceil_div(vocab, chosen["BLOCK_V"]),
        E=hidden,
        C=head,
        LSE=per_row,
        dOut=_meta(1, dtype=torch.float32),
        grad_scale=1 / rows,
        Valids=valids,
        VocabOrdering=None,
        softcap=None,
        Targets=targets,
        dE=hidden,
        dELocks=locks(down_rows * across),
        dC=head,
        dCLocks=locks(down_vocab * across),
        B=rows,
        D=dim,
        V=vocab,
        n_de_locks_0=down_rows,
        n_de_locks_1=across,
        n_dc_locks_0=down_vocab,
        n_dc_locks_1=across,
        filter_eps=None,
        B_BIN=1024,
        SHIFT=False,
        REQUIRES_GRAD=True,
        **strides,
    )


STARTS = {"liger-kernel": start_liger, "cut-cross-entropy": start_cce}


def peers_launches(shape: cost.Shape, archs: list[int]) -> tuple[list[tuple[str, Launch, int]], list[str]]:
    """(name, launch, arch) of every installed peer's kernels, and a line for each peer that is not there."""
    found: list[tuple[str, Launch, int]] = []
    missing = []
    for package, start in STARTS.items():
        try:
            name = f"{PEERS[package]} {version(package)}"
            for arch in archs:
                with record(arch) as started:
                    start(shape)
                found += [(name, entry, arch) for entry in started]
        except PackageNotFoundError:
            missing.append(f"{PEERS[package]} is not installed: {INSTALL}")
        except ImportError as error:
            missing.append(f"{PEERS[package]} cannot be imported ({error}): {INSTALL}")
    return found, missing


def facts_rows(launches: list[tuple[str, Launch, int]]) -> list[list[str]]:
    """Compile, and one row for each kernel; a kernel of several specializations says so by its several rows."""
    facts = aot.compile_all([(entry, arch) for _, entry, arch in launches], progress=True)
    rows = []
    for (name, _, _), entry in zip(launches, facts, strict=True):
        full = dict(zip(report.FACTS_HEADER, report.facts_row(entry), strict=True))
        full["kernel"] = f"{name}: {entry.kernel.strip('_')} {full['sizes']}"
        rows.append([full[column] for column in HEADER])
    return rows


def model_rows(shape: cost.Shape, k: int | None) -> list[list[str]]:
    """The cost model's view of one step: what each method computes, moves and needs."""
    rows = []
    for method in cost.METHODS.values():
        entry = method(shape, k)
        rows.append(
            [
                entry.method,
                f"{entry.flops / 1e12:.1f}",
                f"{entry.logit_passes:.2g}",
                f"{entry.traffic / 1e9:.1f}",
                f"{entry.peak_memory / 2**20:.0f}",
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(aot.LIMITS), default=[80, 90])
    parser.add_argument("--tokens", type=int, default=8192, help="N: tokens of a step")
    parser.add_argument("--vocab", type=int, default=128256, help="V: rows of the head")
    parser.add_argument("--dim", type=int, default=4096, help="D: width of the hidden states")
    parser.add_argument("--save", action="store_true", help="write results/DATE_kernels_static.md")
    args = parser.parse_args()
    # Read when a kernel is defined, which is when a peer is imported.
    os.environ.pop("TRITON_INTERPRET", None)
    try:
        aot.check()
    except RuntimeError as error:
        print(f"skipped: {error}", file=sys.stderr)
        return

    shape = cost.Shape("", args.tokens, args.vocab, args.dim)
    ours = report.record_all([name for name in report.WORKLOADS if name.startswith(LOSS)], args.arch)
    peers, missing = peers_launches(shape, args.arch)
    # What several of the loss's workloads start stands with the first of them.
    distinct: dict[str, tuple[str, Launch, int]] = {}
    for workload, entry, arch in ours:
        name = f"megafish{workload.removeprefix(LOSS).replace('_', ', ', 1).replace('_', ' ')}"
        distinct.setdefault(aot.identity(entry, arch), (name, entry, arch))
    words = f"N {shape.tokens}, V {shape.vocab}, D {shape.dim}, bf16"
    text = (
        f"Compiled by triton {version('triton')}, not run: nothing here is a time. Peers at {words}, one target in "
        "four ignored, CCE without its gradient filter; the kernels of megafish's loss at the shapes of its report, "
        "each specialization once. The stack is local memory a thread, where spills go; counts are instructions in the "
        "program's text, a loop's body once. CCE's atomics are its spin locks, Liger's products are cuBLAS's and not "
        "in the table.\n\n"
    )
    text += table(facts_rows([*distinct.values(), *peers]), HEADER) + "\n\n"
    for line in missing:
        text += f"- {line}\n"
    text += (
        f"\n## Model of a step, {words}, k = 4\n\nForward and backward; a model, not a measurement. A pass is one read "
        "or write of all logits, or of their gradient, in HBM; MiB are added at the peak, gradients included. CCE's "
        "adding under locks in the L2 cache is not in it.\n\n"
    )
    text += table(model_rows(shape, 4), ["method", "TFLOP", "logit passes", "HBM GB", "MiB added"])
    print(f"{machine()}\n\n{text}")
    if args.save:
        print(f"saved {save('kernels_static', text)}")


if __name__ == "__main__":
    main()
