"""What a process sends in a step, by DeepSpeed 0.19's own collectives.

A ring all-gather or reduce-scatter of n numbers over N processes sends n (N - 1) / N from each, an all-reduce twice
that. In numbers sent a step, psi weights, m micro-batches:

    ZeRO 0      all-reduce of the gradients                                2 psi
    ZeRO 1      all-reduce of the gradients, all-gather of the weights     2 psi + psi
    ZeRO 2      the same, but an all-reduce in every micro-batch           2 psi m + psi
    ZeRO 3      all-gathers before forward and backward, reduce-scatter    3 psi m

(The paper's 2 psi for ZeRO 1 and 2 has a reduce-scatter where DeepSpeed 0.19 has an all-reduce, of which each process
takes its part.) Gradients travel in fp32, weights in their own precision.
"""

from __future__ import annotations

from dataclasses import dataclass

from megafish.config import Config
from megafish.plan.hardware import Cluster
from megafish.plan.layout import Layout
from megafish.plan.states import Parameters


@dataclass(frozen=True)
class Traffic:
    """One kind of collective in a step."""

    name: str
    sent: float
    """Bytes that each process sends."""
    members: int
    """Processes of the group."""
    stride: int
    """Ranks between neighbours of the group."""
    overlaps: bool
    """Whether it goes on while the GPU computes."""

    def seconds(self, cluster: Cluster, share: float) -> float:
        """Time on the links at this share of their bandwidth."""
        return self.sent / (share * cluster.bandwidth(self.members, self.stride))


def traffic_of(config: Config, parameters: Parameters, layout: Layout, *, fsdp: bool = False) -> list[Traffic]:
    """Everything that a process sends in one step. `fsdp`: as torch's FSDP does it, which gathers all weights again
    for the backward pass and hides its traffic; for published runs."""
    found = _zero(parameters, layout, fsdp) + _tensor(config, layout) + _sequence(config, layout)
    return [traffic for traffic in found if traffic.sent > 0]


def _zero(parameters: Parameters, layout: Layout, fsdp: bool) -> list[Traffic]:
    shards, psi, times = layout.shards, parameters.total, layout.micro_batches
    ring = (shards - 1) / shards
    weights, gradients = layout.itemsize * psi * ring, 4 * psi * ring

    def traffic(name: str, sent: float, members: int = shards, stride: int = layout.tensor) -> Traffic:
        return Traffic(name, sent, members, stride, layout.stage == 3 or layout.overlap)

    if layout.stage < 3:
        reductions = times if layout.stage == 2 else 1
        gathers = 0.0 if layout.stage == 0 else weights
        return [
            traffic("gradients, all-reduce", 2 * gradients * reductions),
            Traffic("weights, all-gather", gathers, shards, layout.tensor, False),
        ]
    near = 0 if fsdp else min(psi, layout.reuse_distance // 2)
    again = weights * (1 - near / psi) * times
    back = traffic("weights, all-gather before the backward", again)
    if layout.hpz > 1:
        back = traffic("weights, all-gather in a node", again, layout.hpz)
    return [
        traffic("weights, all-gather before the forward", weights * times),
        back,
        traffic("gradients, reduce-scatter", gradients * times),
    ]


def _tensor(config: Config, layout: Layout) -> list[Traffic]:
    """Tokens are gathered before and scattered after attention and feed-forward (arXiv 2205.05198): as much as an
    all-reduce for each of them, forward and backward. They are gathered once more in the backward pass; that, and the
    scattering of what follows from it, goes on beside its products. Embedding and loss take as much as an all-reduce
    each, the loss's second half in fp32."""
    degree = layout.tensor
    if degree == 1:
        return []
    tokens = layout.micro_batch * config.data.sequence_length // layout.sequence
    ring = tokens * config.model.hidden_size * (degree - 1) / degree * layout.micro_batches
    blocks = config.model.num_layers * ring * layout.itemsize
    waited = (10 if layout.checkpointing else 6) * blocks + 3 * ring * layout.itemsize + 4 * ring
    return [
        Traffic("tensor parallel, waited for", waited, degree, 1, False),
        Traffic("tensor parallel, beside products", 4 * blocks, degree, 1, True),
    ]


def _sequence(config: Config, layout: Layout) -> list[Traffic]:
    """Ulysses (arXiv 2309.14509): all-to-alls of queries, keys, values and of the output, forward and backward."""
    degree, model = layout.sequence, config.model
    if degree == 1:
        return []
    tokens = layout.micro_batch * config.data.sequence_length // degree
    kv_heads = max(model.resolved_kv_heads // layout.tensor, degree)
    heads = 2 * (model.num_heads // layout.tensor + kv_heads)
    rows = tokens * heads * model.resolved_head_dim * (degree - 1) / degree
    passes = 3 if layout.checkpointing else 2
    sent = layout.micro_batches * model.num_layers * passes * rows * layout.itemsize
    return [Traffic("sequence parallel, all-to-all", sent, degree, layout.tensor, False)]
