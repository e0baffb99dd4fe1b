"""megafish's kernels on a GPU beside torch, Liger and CCE: time and memory of forward and backward in bfloat16.

    python benchmarks/kernels_gpu.py                              the tables
    python benchmarks/kernels_gpu.py --shape Qwen3-0.6B --k 4     one head, one mask
    python benchmarks/kernels_gpu.py --leave-out "CCE" --save

Needs a CUDA device; `make gpu` runs it. Peers are optional: pip install -c constraints.txt -e '.[bench]'. Every method
is warmed up, then timed by CUDA events, its turns one after the other with a cleared L2 cache; medians count. Memory is
what a step adds at its peak to what is allocated before it, gradients of the hidden states and the weight included.
Dropped tokens are ignored targets for every method. "device count": the host does not know how many tokens are kept
and never waits; "host count": it knows, as a loader can tell it. A method that fails says so in its row.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import machine, save, table
from torch import Tensor

from megafish_kernels import KeptRows, goldfish_drop, linear_cross_entropy, rms_norm, rotary_qkv, swiglu
from megafish_kernels.cost import SHAPES, Shape

INSTALL = "pip install -c constraints.txt -e '.[bench]'"
PEERS = {"Liger": "liger_kernel", "CCE": "cut_cross_entropy"}
OURS = "megafish"
SLAB_COLUMNS = 8192
"""As wide as a slab of logits gets by itself: a budget of just one keeps no logits for the backward."""

Step = Callable[[], Any]


class NotOffered(Exception):
    """The installed version of a peer has no such method."""


# ------------------------------------------------------------------------------------------------------ measurement


class Figures(NamedTuple):
    """What one method took."""

    milliseconds: float
    mib: float
    value: float
    """The mean of its (first) result: methods that are to agree can be seen to."""


def mean_of(result: Any) -> float:
    """The mean of a result, of several the first one's."""
    first = result[0] if isinstance(result, tuple) else result
    return float(first.detach().float().mean())


def measure(step: Step, device: torch.device, repeats: int, warmup: int = 3) -> Figures:
    """Median time of a step, and the memory that it adds at its peak. On a CPU, for tests: the host's clock, no
    memory."""
    for _ in range(warmup - 1):
        step()
    value = mean_of(step())
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            step()
            times.append(1000 * (time.perf_counter() - begin))
        return Figures(statistics.median(times), 0.0, value)
    torch.cuda.synchronize(device)
    base = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    added = torch.cuda.max_memory_allocated(device) - base
    cache = torch.empty(2**28, dtype=torch.uint8, device=device)  # more than any L2 cache
    events = []
    for _ in range(repeats):
        cache.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize(device)
    return Figures(statistics.median(begin.elapsed_time(end) for begin, end in events), added / 2**20, value)


def attempt(prepare: Callable[[], Step], device: torch.device, repeats: int) -> Figures | str:
    """The figures of the step that `prepare` gives, or in a few words why there are none."""
    try:
        return measure(prepare(), device, repeats)
    except torch.cuda.OutOfMemoryError:
        return "out of memory"
    except NotOffered as error:
        return str(error)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        if "CUDA error" in lines[0]:
            # Nothing that follows on this device would mean anything.
            raise
        return f"{type(error).__name__}: {lines[0][:80]}"
    finally:
        gc.collect()
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def clocks() -> str:
    """What nvidia-smi says of the first GPU at this moment, empty where it is not there."""
    fields = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    try:
        done = subprocess.run(
            ["nvidia-smi", "--id=0", f"--query-gpu={fields}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    values = done.stdout.strip().split(", ")
    return ", ".join(f"{name} {value}" for name, value in zip(fields.split(","), values, strict=False))


# ------------------------------------------------------------------------------------------------------------- heads


@dataclass
class Head:
    """One step's tensors."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    """-100 where a token is left out."""
    index: Tensor
    """int32: the rows that are kept."""

    @classmethod
    def draw(cls, shape: Shape, k: int | None, device: torch.device, dtype: torch.dtype) -> Head:
        g = torch.Generator(device).manual_seed(0)
        hidden = torch.randn(shape.tokens, shape.dim, generator=g, device=device, dtype=dtype)
        weight = torch.randn(shape.vocab, shape.dim, generator=g, device=device, dtype=dtype).mul_(shape.dim**-0.5)
        targets = torch.randint(0, shape.vocab, (shape.tokens,), generator=g, device=device)
        targets = targets.masked_fill(goldfish_drop(targets, k=k), -100)
        index = (targets != -100).nonzero()[:, 0].int()
        return cls(hidden.requires_grad_(), weight.requires_grad_(), targets, index)

    def step(self, loss_of: Callable[[Head], Any]) -> Step:
        """Forward and backward of a loss; the gradients are let go."""

        def step() -> Any:
            loss = loss_of(self)
            torch.autograd.grad(loss, (self.hidden, self.weight))
            return loss

        return step


def ours(host_count: bool, kept: str) -> Callable[[Head], Step]:
    """linear_cross_entropy; `kept`: which logits the forward keeps for the backward, "none", "default" or "all"."""

    def prepare(head: Head) -> Step:
        rows = KeptRows(head.index, head.index.shape[0]) if host_count else None
        # With rows given, targets of rows that are not kept are never looked at.
        tokens = len(head.index) if host_count else len(head.targets)
        columns = {"none": min(SLAB_COLUMNS, len(head.weight) - 1), "all": len(head.weight)}.get(kept)
        budget = None if columns is None else max(1, tokens * columns * head.hidden.element_size())
        backend: Any = "triton"
        return head.step(
            lambda head: linear_cross_entropy(
                head.hidden, head.weight, head.targets, rows=rows, logits_bytes=budget, backend=backend
            )
        )

    return prepare


def liger(**options: Any) -> Callable[[Head], Step]:
    def prepare(head: Head) -> Step:
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(**options)
        return head.step(lambda head: loss(head.weight, head.hidden, head.targets))

    return prepare


def cce(impl: str = "cce", **options: Any) -> Callable[[Head], Step]:
    def prepare(head: Head) -> Step:
        from cut_cross_entropy import linear_cross_entropy as cut

        unknown = options.keys() - inspect.signature(cut).parameters.keys()
        if unknown:
            raise NotOffered(f"not in this version: {', '.join(sorted(unknown))}")
        step = head.step(lambda head: cut(head.hidden, head.weight, head.targets, impl=impl, **options))
        try:
            step()
        except NotImplementedError:
            raise NotOffered(f"not in this version: {impl}") from None
        return step

    return prepare


def full_logits(head: Head) -> Tensor:
    return F.cross_entropy((head.hidden @ head.weight.T).float(), head.targets)


def compiled(head: Head) -> Step:
    function = torch.compile(lambda hidden, weight, targets: F.cross_entropy((hidden @ weight.T).float(), targets))
    return head.step(lambda head: function(head.hidden, head.weight, head.targets))


def torch_chunked(head: Head) -> Step:
    if not hasattr(F, "linear_cross_entropy"):
        raise NotOffered("not in this version of torch")
    options = torch.nn.LinearCrossEntropyOptions()
    return head.step(lambda head: F.linear_cross_entropy(head.hidden, head.weight, head.targets, options=options))


HEAD_METHODS: dict[str, Callable[[Head], Step]] = {
    OURS: ours(False, "default"),
    "megafish, device count, no logits kept": ours(False, "none"),
    "megafish, device count, all logits kept": ours(False, "all"),
    "megafish, host count": ours(True, "default"),
    "megafish, host count, no logits kept": ours(True, "none"),
    "megafish, host count, all logits kept": ours(True, "all"),
    "Liger": liger(),
    "Liger, fp32 sums": liger(accum_dtype=torch.float32),
    "CCE": cce(),
    "CCE, nothing filtered": cce(filter_eps=None),
    "CCE, kahan_full_c": cce("cce_kahan_full_c"),
    "CCE, exact": cce("cce_exact"),
    "torch.compile, full logits": compiled,
    "torch chunked": torch_chunked,
    "full logits": lambda head: head.step(full_logits),
}
"""The first one, megafish as it is called without options (device count, default budget), is what ratios are to."""


# --------------------------------------------------------------------------------------------- element-wise operators


class Sizes(NamedTuple):
    """Of Llama-3.1-8B, unless for a test."""

    batch: int = 2
    length: int = 4096
    width: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    inner: int = 14336
    tokens: int = 1_000_000
    """Of the mask."""


def both_ways(function: Callable[..., Any], inputs: list[Tensor], constants: tuple[Tensor, ...] = ()) -> Step:
    """Forward and backward, with a gradient of ones for every result."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    ones: list[Tensor] = []

    def step() -> Any:
        results = function(*leaves, *constants)
        results = results if isinstance(results, tuple) else (results,)
        if not ones:
            ones.extend(torch.ones_like(result) for result in results)
        torch.autograd.grad(results, leaves, ones)
        return results

    step()
    return step


def add_and_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, 1e-5), total


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def norm_methods(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Step]]:
    shape = (sizes.batch, sizes.length, sizes.width)
    inputs = [torch.randn(shape, device=device, dtype=dtype) for _ in range(2)]
    inputs.append(torch.ones(sizes.width, device=device, dtype=dtype))

    def peer() -> Step:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        return both_ways(lambda x, r, w: LigerFusedAddRMSNormFunction.apply(x, r, w, 1e-5), inputs)

    return {
        OURS: lambda: both_ways(lambda x, r, w: rms_norm(x, w, 1e-5, residual=r, backend="triton"), inputs),
        "torch": lambda: both_ways(add_and_norm, inputs),
        "torch.compile": lambda: both_ways(torch.compile(add_and_norm), inputs),
        "Liger": peer,
    }


def rotary_methods(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Step]]:
    heads, kv_heads, half = sizes.heads, sizes.kv_heads, sizes.head_dim // 2
    qkv = torch.randn(sizes.batch, sizes.length, heads + 2 * kv_heads, sizes.head_dim, device=device, dtype=dtype)
    angle = torch.arange(sizes.length)[:, None] * 10000.0 ** (-torch.arange(half) / half)
    cos, sin = (torch.cat((table, table), -1).to(device) for table in (angle.cos(), angle.sin()))
    negated = torch.cat((-sin[:, :half], sin[:, half:]), -1)
    ours_tables = (cos[:, None], negated[:, None])
    low_tables = (cos[:, None].to(dtype), sin[:, None].to(dtype))

    def composed(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        query, key, value = qkv.split((heads, kv_heads, kv_heads), dim=2)
        return turn(query, cos, sin), turn(key, cos, sin), value

    def peer() -> Step:
        from liger_kernel.ops.rope import LigerRopeFunction

        tables = (cos[None].to(dtype), sin[None].to(dtype))

        def function(qkv: Tensor) -> tuple[Tensor, ...]:
            query, key, value = qkv.split((heads, kv_heads, kv_heads), dim=2)
            # It works in place, but parts of a projection it copies first.
            return *LigerRopeFunction.apply(query.transpose(1, 2), key.transpose(1, 2), *tables), value

        return both_ways(function, [qkv])

    return {
        OURS: lambda: both_ways(
            lambda x, c, s: rotary_qkv(x, c, s, heads, kv_heads, backend="triton"), [qkv], ours_tables
        ),
        "torch": lambda: both_ways(composed, [qkv], low_tables),
        "torch.compile": lambda: both_ways(torch.compile(composed), [qkv], low_tables),
        "Liger": peer,
    }


def swiglu_methods(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Step]]:
    inputs = [torch.randn(sizes.batch, sizes.length, 2 * sizes.inner, device=device, dtype=dtype)]

    def peer() -> Step:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        def function(gate_up: Tensor) -> Tensor:
            return LigerSiLUMulFunction.apply(*gate_up.chunk(2, dim=-1))

        return both_ways(function, inputs)

    def peer_fused() -> Step:
        try:
            from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction
        except ImportError:
            raise NotOffered("not in this version") from None
        # Its gradient is of rows, whatever shape it is given.
        return both_ways(lambda x: LigerFusedGateUpSiLUMulFunction.apply(x.flatten(0, 1)), inputs)

    return {
        OURS: lambda: both_ways(lambda x: swiglu(x, backend="triton"), inputs),
        "torch": lambda: both_ways(gated, inputs),
        "torch.compile": lambda: both_ways(torch.compile(gated), inputs),
        "Liger": peer,
        "Liger, fused projection": peer_fused,
    }


def mask_methods(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Step]]:
    g = torch.Generator(device).manual_seed(0)
    tokens = torch.randint(0, 128_256, (sizes.tokens,), generator=g, device=device)
    starts = torch.rand(sizes.tokens, generator=g, device=device) < 0.001

    def drop(backend: str, function: Callable[..., Tensor] = goldfish_drop) -> Step:
        return lambda: function(tokens, k=4, document_starts=starts, backend=backend)

    return {
        OURS: lambda: drop("triton"),
        "torch": lambda: drop("torch"),
        "torch.compile": lambda: drop("torch", torch.compile(goldfish_drop)),
    }


Methods = Callable[[Sizes, torch.device, torch.dtype], dict[str, Callable[[], Step]]]
OPERATORS: dict[str, Methods] = {
    "x + residual and rms_norm": norm_methods,
    "rotary of a fused projection": rotary_methods,
    "swiglu": swiglu_methods,
    "goldfish mask, h = 13": mask_methods,
}


# ------------------------------------------------------------------------------------------------------------ tables


def row(label: str, figures: Figures | str, base: Figures | None, digits: int) -> list[str]:
    """A row of the table; ratios are to `base`."""
    if isinstance(figures, str):
        return [f"{label}: {figures}", "", "", "", "", ""]

    def ratio(value: float, of: float | None) -> str:
        return f"{value / of:.2f}" if of else ""

    return [
        label,
        f"{figures.milliseconds:.{digits}f}",
        ratio(figures.milliseconds, base and base.milliseconds),
        f"{figures.mib:.0f}",
        ratio(figures.mib, base and base.mib),
        f"{figures.value:.4f}",
    ]


def rows_of(
    title: str,
    methods: dict[str, Callable[[], Step]],
    device: torch.device,
    repeats: int,
    left_out: list[str],
    digits: int,
) -> list[list[str]]:
    """Measure the methods one after the other; peers that are not installed have no row."""
    rows: list[list[str]] = []
    base: Figures | None = None
    for name, prepare in methods.items():
        peer = PEERS.get(name.split(",")[0])
        if (peer is not None and find_spec(peer) is None) or any(name.startswith(given) for given in left_out):
            continue
        print(f"{title}, {name}", file=sys.stderr, flush=True)
        figures = attempt(prepare, device, repeats)
        if name == OURS and isinstance(figures, Figures):
            base = figures
        rows.append(row(f"{title}, {name}", figures, base, digits))
    return rows


def head_rows(
    shape: Shape, k: int | None, device: torch.device, dtype: torch.dtype, repeats: int, left_out: list[str]
) -> list[list[str]]:
    head = Head.draw(shape, k, device, dtype)
    methods = {name: lambda make=make: make(head) for name, make in HEAD_METHODS.items()}  # type: ignore[misc]
    return rows_of(f"{shape.name}, {k or 'off'}", methods, device, repeats, left_out, digits=2)


def missing_peers() -> list[str]:
    return [f"{name} is not installed: {INSTALL}" for name, module in PEERS.items() if find_spec(module) is None]


def main() -> None:
    named = {shape.name: shape for shape in SHAPES}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=named, default=list(named)[:4], help="heads of these models")
    parser.add_argument("--k", type=int, nargs="+", default=[0, 4], help="drop one in k tokens; 0 drops none")
    parser.add_argument("--tokens", type=int, default=8192, help="N: tokens of a step")
    parser.add_argument(
        "--repeats", type=int, default=20, help="timed steps of each method, of which the median counts"
    )
    parser.add_argument("--leave-out", nargs="+", default=[], help="methods whose names begin with one of these")
    parser.add_argument("--save", action="store_true", help="write results/DATE_kernels_gpu.md")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("kernels_gpu: no CUDA device, and nothing else is timed here", file=sys.stderr)
        raise SystemExit(2)

    device, dtype = torch.device("cuda", torch.cuda.current_device()), torch.bfloat16
    before = clocks()
    heads: list[list[str]] = []
    for name in args.shape:
        for k in args.k:
            shape = named[name]._replace(tokens=args.tokens)
            heads += head_rows(shape, k or None, device, dtype, args.repeats, args.leave_out)
    elementwise: list[list[str]] = []
    for name, make in OPERATORS.items():
        methods = make(Sizes(), device, dtype)
        elementwise += rows_of(name, methods, device, args.repeats, args.leave_out, digits=3)

    columns = ["ms", "time ratio", "MiB added", "memory ratio", "result"]
    text = (
        f"Forward and backward of {args.tokens} tokens in bfloat16 (the mask: {Sizes().tokens} tokens, forward). "
        f"Medians of {args.repeats} steps, CUDA events, L2 cleared before each. Ratios are to megafish without "
        "options: above 1, megafish is better. The result is the loss, or the mean of the first result.\n\n"
    )
    text += "".join(f"- {line}\n" for line in missing_peers())
    text += "".join(f"- {when}: {line}\n" for when, line in (("before", before), ("after", clocks())) if line)
    text += "\n" + table(heads, ["head, k, method", *columns])
    text += "\n\n" + table(elementwise, ["operator, method", *columns])
    print(f"{machine()}\n\n{text}")
    if args.save:
        print(f"saved {save('kernels_gpu', text)}")


if __name__ == "__main__":
    main()
