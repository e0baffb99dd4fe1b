"""Expected time of a step: a roofline with measured efficiencies.

    products     FLOPs at a share of the GPU's peak: `products` of its generation for large ones, half of that where
                 the smallest dimension is `half`
    attention    FLOPs of flash attention, backward 2.5 times the forward, at a share of the peak
    elementwise  bytes of HBM traffic of norms, rotary embedding, SwiGLU and residuals
    optimizer    bytes of HBM traffic of gradient sums, norm, clipping and AdamW
    exchange     what is sent, by communication.py, less what computation hides

and all of it longer by `scale` for every doubling of the nodes: the slowest of them is waited for.
Four numbers are fitted to published runs (calibration.py); the others are the literature's or assumptions, as said.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megafish.config import Config
from megafish.model.flops import flops_per_token
from megafish.plan.communication import Traffic, traffic_of
from megafish.plan.hardware import Cluster, Gpu
from megafish.plan.layout import Layout
from megafish.plan.memory import kept_share
from megafish.plan.states import Parameters, block_shapes, parameters_of


@dataclass(frozen=True)
class Efficiency:
    """Shares of what data sheets promise."""

    ampere: float = 0.825
    """Products on A100s, of the bf16 peak."""
    hopper: float = 0.617
    """Products on H100s and H200s."""
    half: float = 735.0
    """Dimension at which a product reaches half of that."""
    scale: float = 0.0139
    """Longer by this for every doubling of the nodes."""
    memory: float = 0.8
    """HBM bandwidth of element-wise kernels (megafish_kernels.cost has the same)."""
    links: float = 0.75
    """Bus bandwidth of NCCL's large collectives (nccl-tests on A100 and H100 nodes reach 0.75 to 0.85)."""
    hidden: float = 0.8
    """Share of the computation behind which traffic that overlaps can hide."""

    def products(self, gpu: Gpu) -> float:
        """FLOP/s of large products. Blackwell has no published run here and takes Hopper's share."""
        return (self.ampere if gpu.generation == "ampere" else self.hopper) * gpu.peak

    def attention(self, gpu: Gpu) -> float:
        """FLOP/s of FlashAttention 2, causal (arXiv 2307.08691, figures 5 to 7: 120 to 190 TFLOP/s forward and
        backward on an A100, 250 to 330 on an H100)."""
        return (0.5 if gpu.generation == "ampere" else 0.3) * gpu.peak


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    products: float
    attention: float
    elementwise: float
    optimizer: float
    exchange: float
    """What is not hidden behind computation."""
    waiting: float
    """For the slowest node."""
    tokens: int
    """Input tokens of the step, over all processes."""
    model_flops: float
    """FLOPs of the step without recomputation, over all processes."""
    traffic: list[Traffic] = field(hash=False)

    @property
    def seconds(self) -> float:
        """All parts."""
        parts = (self.products, self.attention, self.elementwise, self.optimizer, self.exchange, self.waiting)
        return sum(parts)

    def mfu(self, cluster: Cluster) -> float:
        """Model FLOPs utilization, as `megafish train` reports it."""
        return self.model_flops / (self.seconds * cluster.gpu.peak * cluster.gpus)


def step_time(
    config: Config,
    vocab_size: int,
    layout: Layout,
    cluster: Cluster,
    efficiency: Efficiency,
    *,
    kept_fraction: float | None = None,
    fsdp: bool = False,
) -> StepTime:
    """Expected time of a step in bf16 on this cluster; `fsdp` for published runs of torch's FSDP."""
    kept = kept_share(config) if kept_fraction is None else kept_fraction
    parameters = parameters_of(config, vocab_size, layout.tensor)
    tokens = layout.micro_batch * config.data.sequence_length // layout.sequence
    times, gpu = layout.micro_batches, cluster.gpu
    products = times * _products(config, vocab_size, layout, tokens, kept, gpu, efficiency)
    attention = times * _attention_flops(config, layout, tokens) / efficiency.attention(gpu)
    moved = efficiency.memory * gpu.bandwidth
    elementwise = times * _elementwise_bytes(config, layout, tokens) / moved
    optimizer = _optimizer_bytes(parameters, layout) / moved
    if layout.offload_optimizer:
        optimizer = max(optimizer, _offload_seconds(parameters, layout, cluster))
    traffic = traffic_of(config, parameters, layout, fsdp=fsdp)
    exchange = sum(t.seconds(cluster, efficiency.links) for t in traffic if not t.overlaps)
    behind = sum(t.seconds(cluster, efficiency.links) for t in traffic if t.overlaps)
    exchange += max(0.0, behind - efficiency.hidden * (products + attention + elementwise))
    alone = products + attention + elementwise + optimizer + exchange
    all_tokens = layout.replicas * times * layout.micro_batch * config.data.sequence_length
    per_token = flops_per_token(config.model, vocab_size, config.data.sequence_length, kept)
    return StepTime(
        products,
        attention,
        elementwise,
        optimizer,
        exchange,
        alone * efficiency.scale * max(0, cluster.nodes - 1).bit_length(),
        all_tokens,
        per_token * all_tokens,
        traffic,
    )


def _products(
    config: Config, vocab_size: int, layout: Layout, tokens: int, kept: float, gpu: Gpu, efficiency: Efficiency
) -> float:
    """Seconds of a micro-batch's matrix products."""
    large = efficiency.products(gpu)

    def seconds(rows: float, inner: int, columns: int, passes: int) -> float:
        smallest = min(rows, inner, columns)
        return passes * 2.0 * rows * inner * columns / (large * smallest / (smallest + efficiency.half))

    passes = 4 if layout.checkpointing else 3
    shapes = block_shapes(config.model, layout.tensor).values()
    block = sum(seconds(tokens, shape[1], shape[0], passes) for shape in shapes if len(shape) == 2)
    head = seconds(max(1.0, kept * tokens), config.model.hidden_size, vocab_size // layout.tensor, 3)
    return config.model.num_layers * block + head


def _attention_flops(config: Config, layout: Layout, tokens: int) -> float:
    """Of a micro-batch, for whole sequences: rows of several documents take less."""
    model, length = config.model, config.data.sequence_length
    span = length if model.sliding_window is None else min(model.sliding_window, length)
    keys = span - span * (span - 1) / (2 * length)
    forward = 4.0 * tokens * model.num_heads // layout.tensor * model.resolved_head_dim * keys
    return model.num_layers * forward * (4.5 if layout.checkpointing else 3.5)


def _elementwise_bytes(config: Config, layout: Layout, tokens: int) -> float:
    """HBM traffic of the fused kernels: each reads its inputs and writes its results once."""
    model = config.model
    width, inner = model.hidden_size, model.intermediate_size // layout.tensor
    rotated = (model.num_heads + model.resolved_kv_heads) // layout.tensor * model.resolved_head_dim
    values = model.resolved_kv_heads // layout.tensor * model.resolved_head_dim
    # Norm 2, norm with its residual 4, the other residual 3; rotary reads and writes; SwiGLU reads two, writes one.
    forward = 9 * width + 2 * rotated + 3 * inner
    backward = 12 * width + 2 * (rotated + values) + 5 * inner
    numbers = (2 if layout.checkpointing else 1) * forward + backward
    return float(model.num_layers * tokens * numbers * layout.itemsize)


def _optimizer_bytes(parameters: Parameters, layout: Layout) -> float:
    """HBM traffic of a step's sums of gradients (read bf16 and fp32, write fp32), their norm and clipping (12 bytes a
    number) and AdamW (reads four, writes three fp32 numbers, and the bf16 weight)."""
    part = parameters.total / (layout.shards if layout.stage else 1)
    whole = layout.stage == 1 and layout.bf16
    return 10.0 * layout.micro_batches * parameters.total + 12.0 * (parameters.total if whole else part) + 30.0 * part


PCIE = 25e9
"""Bytes per second and direction between a GPU and main memory (PCIe 4 x16, four fifths of 32 GB/s)."""
CPU_ADAM = 1e9
"""Parameters per second that one node's CPUs update (DeepSpeed's blog on ZeRO-Offload: about 1 s a billion)."""


def _offload_seconds(parameters: Parameters, layout: Layout, cluster: Cluster) -> float:
    """The optimizer on the CPU: gradients there in fp32, weights back, and AdamW by the node's cores."""
    part = parameters.total / layout.shards
    moved = part * (4 * layout.micro_batches + layout.itemsize) / PCIE
    return moved + part * cluster.gpus_per_node / CPU_ADAM
