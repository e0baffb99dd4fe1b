"""A model of what the head and its loss cost: FLOPs, bytes and, by a GPU's data sheet, milliseconds. No measurement.

Everything is counted for one step, forward and backward, of N tokens with hidden states [N, D] and a head [V, D] in
bfloat16, on one GPU. A method is a list of phases; a phase takes the longer of its FLOPs at a fraction of the GPU's
peak and its bytes at a fraction of the memory's bandwidth, and the phases follow one another. The rules, the same for
all methods and mostly in favour of the slower ones:

- A library's product reads each operand once per call and writes its result once.
- A Triton kernel reads its left operand (the hidden states, for logits) once, and its right one (the head) once per
  group of rows that its order of programs keeps in the L2 cache.
- What stays in the L2 cache costs nothing, nor do launches, locks, waiting and host synchronization.

Bytes are bytes of HBM traffic. Memory is what the step adds at its peak to the hidden states and the head, with the
gradients of both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from megafish_kernels.tiles import GROUP, SLAB_COLUMNS, Tile, kept_columns, loss_tiles, vocabulary_splits

PRODUCT_FRACTION = 0.7
"""Of the peak FLOP/s, in all methods. quack's 745 TFLOP/s on an H200 are 0.75, full logits' 230 on an A100 0.74."""
BANDWIDTH_FRACTION = 0.8
"""Of the data sheet's bandwidth, in all methods."""
ROW_GROUP = 1024
"""Rows for which a peer's recomputing kernel reads the head once: 8 tiles of 128, as megafish's."""


class Shape(NamedTuple):
    """One step's head: tokens N, vocabulary V, width D."""

    name: str
    tokens: int
    vocab: int
    dim: int

    def kept(self, k: int | None) -> int:
        """Tokens left when one in k is dropped; None drops none."""
        return self.tokens if k is None else round(self.tokens * (1 - 1 / k))


SHAPES = (
    Shape("Llama-3.2-1B", 8192, 128256, 2048),
    Shape("Llama-3.1-8B", 8192, 128256, 4096),
    Shape("Gemma-2-2B", 8192, 256000, 2304),
    Shape("Qwen3-0.6B", 8192, 151936, 1024),
    Shape("TinyLlama-1.1B", 8192, 32000, 2048),
)
"""Heads of published models, N = 8192."""


class Gpu(NamedTuple):
    """A GPU in its data sheet's figures."""

    name: str
    flops: float
    """Peak dense bfloat16 FLOP/s; the data sheets of Hopper and Blackwell print twice that, with sparsity."""
    bandwidth: float
    """HBM bytes/s."""
    source: str


GPUS = (
    Gpu("A100", 312e12, 2.039e12, "NVIDIA A100 80GB SXM data sheet (2021)"),
    Gpu("H100", 989.4e12, 3.35e12, "NVIDIA H100 SXM data sheet (2023): 1,979 TFLOP/s with sparsity"),
    Gpu("H200", 989.4e12, 4.8e12, "NVIDIA H200 SXM data sheet (2024): 1,979 TFLOP/s with sparsity"),
    Gpu("B200", 2250e12, 8.0e12, "NVIDIA HGX and DGX B200 data sheets: 8 GPUs, 36 PFLOP/s with sparsity, 64 TB/s"),
)


class Phase(NamedTuple):
    """Work that nothing else overlaps with."""

    name: str
    flops: float
    traffic: float
    """Bytes of HBM traffic."""


@dataclass(frozen=True)
class Cost:
    """What one method takes for one step."""

    method: str
    phases: tuple[Phase, ...]
    memory: dict[str, float] = field(hash=False)
    """Bytes added at the peak, by what they hold."""
    logit_passes: float
    """How often an element of the logits or of their gradient is read from or written to HBM."""

    @property
    def flops(self) -> float:
        """FLOPs of the products; elementwise work is counted by its bytes alone."""
        return sum(phase.flops for phase in self.phases)

    @property
    def traffic(self) -> float:
        """Bytes of HBM traffic."""
        return sum(phase.traffic for phase in self.phases)

    @property
    def peak_memory(self) -> float:
        """Bytes added at the peak."""
        return sum(self.memory.values())

    def seconds(self, gpu: Gpu, products: float = PRODUCT_FRACTION, bandwidth: float = BANDWIDTH_FRACTION) -> float:
        """Modelled time of the step, at these fractions of the GPU's peaks."""
        return sum(
            max(phase.flops / (products * gpu.flops), phase.traffic / (bandwidth * gpu.bandwidth))
            for phase in self.phases
        )


def ceil_div(value: int, by: int) -> int:
    return -(-value // by)


def _next_power_of_2(value: int) -> int:
    return 1 << (value - 1).bit_length()


def megafish(
    shape: Shape, k: int | None = None, logits_bytes: int | None = None, host_count: bool = False, arch: int = 90
) -> Cost:
    """megafish's Triton loss: kept rows alone; logits of as many columns as the budget holds are kept by the forward,
    the backward computes the others anew in slabs, and the head's gradient is written once.

    Args:
        shape: the step.
        k: one in k tokens is dropped; None for none.
        logits_bytes: as in linear_cross_entropy.
        host_count: the host knows how many tokens are kept. Then tensors have as many rows, and the two products of the
            backward are a library's. Else they have a row for every token, of which the kernels read the kept ones.
        arch: whose tiles are taken; all of the table have the same rows and columns.
    """
    _, tokens, vocab, dim = shape
    rows = shape.kept(k)
    capacity = rows if host_count else tokens
    tile = loss_tiles(arch, 2, capacity).forward
    kept, slab = kept_columns(capacity, vocab, 2, logits_bytes)
    again = vocab - kept
    slabs = [min(slab, vocab - begin) for begin in range(kept, vocab, slab)] if again else []
    chunks = [kept, *slabs] if kept else slabs

    unit = 2.0 * rows * vocab * dim
    head, hidden = 2 * vocab * dim, 2 * rows * dim
    tops = 4.0 * rows * ceil_div(kept, tile.columns)
    groups = ceil_div(rows, GROUP * tile.rows)
    # The kernels' own product reads its right operand once for each group of rows of its left one.
    heads_read = 1 if host_count else groups
    hiddens_read = len(chunks) if host_count else sum(ceil_div(width, GROUP * tile.rows) for width in chunks)
    phases = [
        Phase("logits and their figures", unit, hidden + groups * head + 2 * rows * kept + tops),
        Phase("gradient of the kept logits", 0, 2 * (2 * rows * kept) + tops),
        Phase(
            "other logits again, and their gradient",
            unit * again / vocab,
            len(slabs) * hidden + groups * 2 * again * dim + 2 * rows * again,
        ),
        Phase(
            "gradient of the hidden states",
            unit,
            2 * rows * vocab + heads_read * head + (2 * len(chunks) - 1) * 4 * rows * dim,
        ),
        Phase("gradient of the head", unit, 2 * rows * vocab + hiddens_read * hidden + head),
    ]
    copied = not host_count or rows < tokens
    if copied:
        phases.insert(0, Phase("rows taken out", 0, hidden + 2 * capacity * dim))
        phases.append(Phase("rows back to their places", 0, (6 + 4) * capacity * dim + 2 * tokens * dim))
    else:
        phases.append(Phase("gradient in bfloat16", 0, 6 * tokens * dim))
    words = "" if logits_bytes is None else f", {ceil_div(logits_bytes, 2**20)} MiB for logits"
    name = "megafish" + words + (", count on the host" if host_count else "")
    memory = _megafish_memory(shape, capacity, copied, kept, min(slab, again), tile)
    return Cost(name, tuple(phases), memory, 3 + 2 * kept / vocab)


def _megafish_memory(shape: Shape, capacity: int, copied: bool, kept: int, slab: int, tile: Tile) -> dict[str, float]:
    """Bytes at the larger of two moments: the products, and after them the gradients' way to their places."""
    _, tokens, vocab, dim = shape
    splits, _ = vocabulary_splits(tile, capacity, vocab)
    always = {
        "rows taken out": 2.0 * capacity * dim if copied else 0.0,
        "figures of the splits": 12.0 * splits * capacity,
        # Index, targets, log-sum-exp, losses, factors: 8 to 16 numbers.
        "per token": 64.0 * tokens,
        "fp32 gradient of the hidden states": 4.0 * capacity * dim,
        "gradient of the head": 2.0 * vocab * dim,
    }
    products = {
        "kept logits": 2.0 * capacity * kept,
        "their tiles' tops": 4.0 * capacity * ceil_div(kept, tile.columns),
        "slab of the logits' gradient": 2.0 * capacity * slab,
    }
    after = {
        "gradient of the rows": 2.0 * capacity * dim if copied else 0.0,
        "gradient of the hidden states": 2.0 * tokens * dim,
    }
    return always | max(products, after, key=lambda memory: sum(memory.values()))


def cce(shape: Shape, k: int | None = None, fp32: bool = False) -> Cost:
    """Cut Cross-Entropy (arXiv 2411.09009): kept rows alone, logits computed twice, gradients added in global memory.

    No tile is skipped: CCE's authors advise against gradient filtering in pretraining (section 5.3), and a model at the
    start of its training gives it nothing to skip. The default adds up in bfloat16; fp32 adds up in float32 and casts
    at the end. Adding happens under locks, mostly in the L2 cache: that time is not in the model.
    """
    _, tokens, vocab, dim = shape
    rows = shape.kept(k)
    unit = 2.0 * rows * vocab * dim
    size = 4 if fp32 else 2
    head = 2 * vocab * dim
    groups = ceil_div(rows, ROW_GROUP)
    phases = [
        # Its forward tile has 256 rows, twice those of its backward tile: the head is read half as often.
        Phase("logits and their log-sum-exp", unit, 2 * rows * dim + ceil_div(rows, 2 * ROW_GROUP) * head),
        Phase("targets' logits", 0, 4 * rows * dim),
        Phase("zeros", 0, size * (tokens + vocab) * dim),
        Phase(
            "logits again, both gradients",
            3 * unit,
            2 * rows * dim + groups * head + 2 * size * (rows * dim + groups * vocab * dim),
        ),
    ]
    memory = {
        "per token": 12.0 * tokens,
        "gradient of the hidden states": float(size * tokens * dim),
        "gradient of the head": float(size * vocab * dim),
    }
    if fp32:
        phases.append(Phase("cast", 0, 6 * (tokens + vocab) * dim))
        memory["both gradients in bfloat16"] = 2.0 * (tokens + vocab) * dim
    return Cost("CCE, exact, fp32 sums" if fp32 else "CCE, nothing filtered", tuple(phases), memory, 0)


def _store_and_overwrite(
    method: str,
    shape: Shape,
    rows: int,
    *,
    overwrite: float,
    head_gradient: float,
    extra: dict[str, float],
    last: Phase,
) -> Cost:
    """A method that writes the bfloat16 logits of `rows` tokens, overwrites them with their gradient and goes on.

    `overwrite` is how often the elementwise kernel touches a logit; `head_gradient` the bytes of traffic that all
    chunks together cause at the head's gradient; `extra` and `last` what else is there.
    """
    _, tokens, vocab, dim = shape
    unit = 2.0 * tokens * vocab * dim
    chunks = ceil_div(tokens, rows)
    head, logits, hidden = chunks * 2 * vocab * dim, 2 * tokens * vocab, 2 * tokens * dim
    phases = (
        Phase("logits", unit, hidden + head + logits),
        Phase("softmax and gradient in place", 0, overwrite * logits),
        Phase("gradient of the hidden states", unit, logits + head + hidden),
        Phase("gradient of the head", unit, logits + hidden + head_gradient),
        last,
    )
    memory = {
        "logits of a chunk": 2.0 * rows * vocab,
        "gradient of the hidden states": 2.0 * tokens * dim,
        "gradient of the head": 2.0 * vocab * dim,
        **extra,
    }
    return Cost(method, phases, memory, 3 + overwrite)


def liger(shape: Shape, budget: int = 1, copies: bool = False) -> Cost:
    """Liger's fused linear cross-entropy: chunks of next_power_of_2(N / ceil(V / (budget * D))) rows, all rows.

    Its budget constant is 1 (the number of chunks is then about V / D, whatever N), and was 16 for some weeks of
    2026 (pull requests 1414 and 1472). `copies` is the head's gradient as a bfloat16 product and its fp32 copy in every
    chunk, before issue 1323 was mended; else the library adds it up in place in bfloat16.
    """
    _, tokens, vocab, dim = shape
    rows = min(_next_power_of_2(ceil_div(tokens, ceil_div(vocab, budget * dim))), tokens)
    chunks = ceil_div(tokens, rows)
    zeros = Phase("zeros", 0, 2 * (tokens + vocab) * dim)
    name = f"Liger, budget {budget}"
    if not copies:
        added = chunks * 4.0 * vocab * dim
        return _store_and_overwrite(name, shape, rows, overwrite=3, head_gradient=added, extra={}, last=zeros)
    cost = _store_and_overwrite(
        f"{name}, V x D copies",
        shape,
        rows,
        overwrite=3,
        head_gradient=chunks * 2.0 * vocab * dim,
        extra={"V x D copies": 6.0 * vocab * dim},
        last=zeros,
    )
    # The product is read and written as fp32, then both it and the sum are read and the sum is written.
    copying = Phase("copies of the head's gradient", 0, chunks * 14.0 * vocab * dim)
    return Cost(cost.method, (*cost.phases, copying), cost.memory, cost.logit_passes)


def quack(shape: Shape, rows: int = 4096) -> Cost:
    """quack's chunked linear cross-entropy: 4096 rows a chunk, all rows, the head's gradient added up in fp32."""
    _, tokens, vocab, dim = shape
    rows = min(rows, tokens)
    size = vocab * dim
    return _store_and_overwrite(
        "quack, chunks of 4096",
        shape,
        rows,
        overwrite=2,
        head_gradient=4.0 * size + (ceil_div(tokens, rows) - 1) * 8.0 * size,
        extra={"fp32 gradient of the head": 4.0 * size},
        last=Phase("cast of the head's gradient", 0, 6 * size),
    )


def torch_chunked(shape: Shape) -> Cost:
    """torch 2.13's F.linear_cross_entropy with its default options on CUDA: half of Liger's rows, fp32 logits in a
    chunk, eager elementwise work on them (maximum, difference, exponential, sum, product, cast), all rows."""
    _, tokens, vocab, dim = shape
    rows = max(1, min(_next_power_of_2(ceil_div(tokens, ceil_div(vocab, dim))) // 2, tokens))
    chunks = ceil_div(tokens, rows)
    unit = 2.0 * tokens * vocab * dim
    head, hidden, count = chunks * 2 * vocab * dim, 2 * tokens * dim, tokens * vocab
    phases = (
        Phase("logits", unit, hidden + head + 4 * count),
        Phase("softmax and gradient, op by op", 0, (4 + 8 + 8 + 4 + 8 + 6) * count),
        Phase("gradient of the hidden states", unit, 2 * count + head + hidden),
        Phase("gradient of the head", unit, 2 * count + hidden + chunks * 4 * vocab * dim),
    )
    memory = {
        "logits of a chunk": 4.0 * rows * vocab,
        "fp32 hidden states of a chunk": 4.0 * rows * dim,
        "gradient of the hidden states": 2.0 * tokens * dim,
        "gradient of the head": 2.0 * vocab * dim,
    }
    return Cost("torch, chunked", phases, memory, 13)


def full_logits(shape: Shape, fp32: bool = True) -> Cost:
    """bfloat16 logits of all tokens and F.cross_entropy on them, after a cast to fp32 (what a trainer without a fused
    loss does) or without it."""
    _, tokens, vocab, dim = shape
    unit = 2.0 * tokens * vocab * dim
    head, hidden, count = 2 * vocab * dim, 2 * tokens * dim, tokens * vocab
    size = 4 if fp32 else 2
    cast = 6 * count if fp32 else 0
    phases = (
        Phase("logits", unit, hidden + head + 2 * count),
        Phase("cast, log-softmax", 0, cast + 2 * size * count),
        Phase("zeros, gradient of the log-softmax, cast", 0, (1 + 3) * size * count + cast),
        Phase("gradient of the hidden states", unit, 2 * count + head + hidden),
        Phase("gradient of the head", unit, 2 * count + hidden + head),
    )
    memory = {
        "log-probabilities and two gradients": 3.0 * size * count,
        "gradient of the hidden states": 2.0 * tokens * dim,
        "gradient of the head": 2.0 * vocab * dim,
    }
    return Cost("full logits, fp32" if fp32 else "full logits, bf16", phases, memory, 13 if fp32 else 9)


Method = Callable[[Shape, int | None], Cost]

OURS: dict[str, Method] = {
    "megafish": lambda shape, k: megafish(shape, k),
    "megafish, host": lambda shape, k: megafish(shape, k, host_count=True),
    "megafish, slab": lambda shape, k: megafish(shape, k, logits_bytes=2 * shape.tokens * SLAB_COLUMNS),
    "megafish, stored": lambda shape, k: megafish(shape, k, logits_bytes=2 * shape.tokens * shape.vocab),
}
COMPACTING_PEERS: dict[str, Method] = {
    "cce": lambda shape, k: cce(shape, k),
    "cce fp32": lambda shape, k: cce(shape, k, fp32=True),
}
"""These leave dropped tokens out of their products too."""
PEERS: dict[str, Method] = {
    "liger": lambda shape, k: liger(shape),
    "liger copies": lambda shape, k: liger(shape, copies=True),
    "liger 16": lambda shape, k: liger(shape, budget=16),
    "quack": lambda shape, k: quack(shape),
    "torch chunked": lambda shape, k: torch_chunked(shape),
    "full logits": lambda shape, k: full_logits(shape),
    "full logits bf16": lambda shape, k: full_logits(shape, fp32=False),
}
"""These compute dropped tokens and multiply them by zero: k changes nothing."""
METHODS = {**OURS, **COMPACTING_PEERS, **PEERS}


class Published(NamedTuple):
    """Somebody else's measurement, forward and backward, bfloat16."""

    method: str
    """Their name for it."""
    model: str | None
    """The entry of METHODS that stands for it, if one does."""
    gpu: str
    tokens: int
    vocab: int
    dim: int
    milliseconds: float
    mebibytes: float | None
    """As they counted: CCE's table counts as this module does, the others with the hidden states and the head."""
    source: str


_CCE = "arXiv 2411.09009v2, table 1"
_LIGER_DATA = "Liger-Kernel benchmark/data/all_benchmark_data.csv, v0.4.2"
_LIGER_H200 = "Liger-Kernel ops/cutedsl, docstring of the SM90 loss"
_LIGER_B200 = "Liger-Kernel pull request 1291"
PUBLISHED = (
    Published("CCE", None, "A100", 8192, 256000, 2304, 145, 1164, _CCE),
    Published("CCE, no gradient filter", "cce", "A100", 8192, 256000, 2304, 357, 1162, _CCE),
    Published("CCE-Kahan-FullC", "cce fp32", "A100", 8192, 256000, 2304, 313, 2326, _CCE),
    Published("Liger", "liger", "A100", 8192, 256000, 2304, 304, 1474, _CCE),
    Published("torchtune, 8 chunks", None, "A100", 8192, 256000, 2304, 169, 9631, _CCE),
    Published("torch.compile", None, "A100", 8192, 256000, 2304, 143, 16000, _CCE),
    Published("baseline", "full logits", "A100", 8192, 256000, 2304, 208, 28000, _CCE),
    Published("Liger", "liger", "A100", 4096, 128256, 4096, 121, 4246, _LIGER_DATA),
    Published("Liger", "liger", "A100", 8192, 128256, 4096, 167, 4467, _LIGER_DATA),
    Published("Liger", "liger", "A100", 32768, 128256, 4096, 511, 5795, _LIGER_DATA),
    Published("Hugging Face", "full logits bf16", "A100", 8192, 128256, 4096, 111, 9162, _LIGER_DATA),
    Published("Hugging Face", "full logits bf16", "A100", 32768, 128256, 4096, 452, 27583, _LIGER_DATA),
    Published("Liger, Triton", "liger copies", "H200", 4096, 128256, 4096, 141, None, _LIGER_H200),
    Published("quack 0.6.1", "quack", "H200", 4096, 128256, 4096, 17.33, None, _LIGER_H200),
    Published("Liger, CuTe DSL", None, "H200", 4096, 128256, 4096, 18.06, None, _LIGER_H200),
    Published("CCE", "cce", "B200", 8192, 128256, 4096, 123.5, 3422, _LIGER_B200),
    Published("quack", "quack", "B200", 8192, 128256, 4096, 18.8, 6573, _LIGER_B200),
    Published("Liger, CuTe DSL", None, "B200", 8192, 128256, 4096, 25.8, 3714, _LIGER_B200),
)


def gpu(name: str) -> Gpu:
    """The entry of GPUS with this name; KeyError if there is none."""
    return {entry.name: entry for entry in GPUS}[name]


def modelled(entry: Published) -> tuple[float, float] | None:
    """(milliseconds, MiB) of the model at a published measurement's shape; None if no method stands for it."""
    if entry.model is None:
        return None
    cost = METHODS[entry.model](Shape("", entry.tokens, entry.vocab, entry.dim), None)
    return 1e3 * cost.seconds(gpu(entry.gpu)), cost.peak_memory / 2**20
