"""Worker of test_parallel: four processes as several meshes, each compared with a whole model in the same process."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megafish.config import LossConfig, ModelConfig
from megafish.model.mesh import Axis, Mesh, make_mesh
from megafish.model.parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    gradient_norm,
    heads_to_tokens,
    sum_replicated_gradients,
    tokens_to_heads,
)
from megafish.model.shard import mark, shard_of
from megafish.model.transformer import Transformer

BATCH, LENGTH, VOCAB = 2, 24, 90
DOCUMENTS = torch.tensor([0, 5, 6, 19, 24, 40, 48], dtype=torch.int32)  # the cuts at 12 and 36 lie within documents
LOSS = LossConfig(z_loss=0.02, label_smoothing=0.1)


def mesh_of(tensor: int, sequence: int) -> Mesh:
    return make_mesh(dist.get_rank(), dist.get_world_size(), tensor, sequence, timedelta(minutes=2))


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaf(x: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(x.clone())


def part(x: torch.Tensor, axis: Axis, dim: int = 0) -> torch.Tensor:
    """This process's of the equal parts of x."""
    return x.chunk(axis.size, dim)[axis.rank]


def close(actual: torch.Tensor | None, expected: torch.Tensor | None, what: str, tolerance: float = 1e-12) -> None:
    assert actual is not None and expected is not None, what
    assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
    error = float((actual.detach() - expected.detach()).abs().max() / expected.detach().abs().max())
    assert error < tolerance, (what, error)


def whole_parameter(parameter: nn.Parameter, axis: Axis) -> torch.Tensor:
    """The full parameter, from the shards of all processes of the axis; the parameter itself where it is whole.
    Collective."""
    shard = shard_of(parameter)
    if shard is None:
        return parameter.detach()
    parts = [torch.empty_like(parameter) for _ in range(axis.size)]
    dist.all_gather(parts, parameter.detach(), group=axis.group)
    full = parameter.new_empty(shard.full_shape)
    fused = [(end - begin) * axis.size for begin, end in shard.ranges]
    for rank, part in enumerate(parts):
        theirs = replace(axis, rank=rank).cut(shard.full_shape, shard.dim, fused)
        assert theirs is not None
        theirs.put(part, full)
    return full


def layers(axis: Axis) -> None:
    """Embedding, column- and row-parallel layers one after the other, float64, forward and backward."""
    width, inner = 6, 16
    tokens = torch.randint(0, 20, (3, 4), generator=torch.Generator().manual_seed(1))
    table, upstream = noise(20, width, seed=2), noise(12, width, seed=3)
    # Two fused parts, as gate and up are: cut each by itself.
    first, bias, second, out_bias = (
        noise(inner, width, seed=4),
        noise(inner, seed=5),
        noise(width, inner, seed=6),
        noise(width, seed=7),
    )
    parts = (4, 12)

    def run(axis: Axis, cut: bool) -> tuple[torch.Tensor, list[nn.Parameter]]:
        def own(full: torch.Tensor, dim: int, fused: tuple[int, ...] | None = None) -> nn.Parameter:
            shard = axis.cut(full.shape, dim, fused) if cut else None
            return leaf(full) if shard is None else mark(leaf(shard.take(full)), shard)

        weights = [own(table, 0), own(first, 0, parts), own(bias, 0, parts), own(second, 1, parts), leaf(out_bias)]
        sum_replicated_gradients(weights, axis)
        x = VocabParallelEmbedding(weights[0], axis)(tokens)
        y = RowParallelLinear(weights[3], weights[4], axis)(
            ColumnParallelLinear(weights[1], weights[2], axis)(x).tanh()
        )
        (y.flatten(0, -2) * part(upstream, axis)).sum().backward()
        return y, weights

    want, whole = run(Axis(), cut=False)
    got, own = run(axis, cut=True)
    close(got, part(want.flatten(0, 1), axis), "output")
    for index, (ours, theirs) in enumerate(zip(own, whole, strict=True)):
        shard = shard_of(ours)
        assert theirs.grad is not None
        close(ours.grad, theirs.grad if shard is None else shard.take(theirs.grad), f"gradient {index}")
        assert torch.equal(whole_parameter(ours, axis), theirs.detach())
    close(gradient_norm(own, axis), gradient_norm(whole, Axis()), "norm")


def exchange(axis: Axis) -> None:
    """Attention's exchange there and back, float64, forward and backward, with key/value heads enough and too few."""
    for kv_heads in (4, 1):
        inputs = [noise(2, 8, heads, 3, seed=heads) for heads in (8, kv_heads, kv_heads)]
        upstream = noise(2, 8, 8, 3, seed=9)

        def mix(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            """Something that needs all tokens, but of a query head only its own key/value head."""
            groups = query.shape[2] // key.shape[2]
            key, value = (x.repeat_interleave(groups, 2) for x in (key, value))
            return query * key.cumsum(1).tanh() + value.flip(1)

        whole = [leaf(x) for x in inputs]
        want = mix(*whole)
        (want * upstream).sum().backward()
        own = [leaf(part(x, axis, 1)) for x in inputs]
        got = heads_to_tokens(mix(*tokens_to_heads(*own, axis)), axis)
        (got * part(upstream, axis, 1)).sum().backward()
        close(got, part(want, axis, 1), "mixed")
        for name, ours, theirs in zip(("query", "key", "value"), own, whole, strict=True):
            assert theirs.grad is not None
            close(ours.grad, part(theirs.grad, axis, 1), f"gradient of {name}")


def model(mesh: Mesh, checkpointing: bool, **changes: Any) -> None:
    """Initial weights, loss, per-token loss and gradients of a model on the mesh against those of a whole one, fp32."""
    config = ModelConfig(
        num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, intermediate_size=48, init_std=0.2, **changes
    )
    whole = Transformer(config, VOCAB, loss=LOSS, seed=3)
    own = Transformer(config, VOCAB, loss=LOSS, seed=3, mesh=mesh, activation_checkpointing=checkpointing)
    for (name, full), ours in zip(whole.named_parameters(), own.parameters(), strict=True):
        assert torch.equal(whole_parameter(ours, mesh.tensor), full), f"{name}: other initial weights"
    # Norms of 1 and biases of 0 would hide mistakes.
    with torch.no_grad():
        for index, (full, ours) in enumerate(zip(whole.parameters(), own.parameters(), strict=True)):
            full += 0.1 * noise(*full.shape, seed=index).float()
            shard = shard_of(ours)
            ours.copy_(full if shard is None else shard.take(full))

    g = torch.Generator().manual_seed(mesh.data.rank)
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=g)
    targets = tokens.roll(-1, 1).masked_fill(torch.rand(tokens.shape, generator=g) < 0.2, -100)
    drop = torch.rand(tokens.shape, generator=g) < 0.3
    targets[:, : LENGTH // 2][0] = -100  # of the first row one part keeps nothing
    common: dict[str, Any] = {"cu_seqlens": DOCUMENTS, "max_seqlen": 16}
    cut = [part(x, mesh.sequence, 1) for x in (tokens, targets, drop)]

    want = whole(tokens, targets=targets, drop=drop, denominator=40, **common)
    want.loss.backward()
    got = own(cut[0], targets=cut[1], drop=cut[2], denominator=40, **common)
    got.loss.backward()
    sums = torch.stack((got.loss.detach(), got.ce_sum))
    if mesh.sequence.size > 1:
        dist.all_reduce(sums, group=mesh.sequence.group)
    close(sums, torch.stack((want.loss.detach(), want.ce_sum)), "loss", 1e-5)
    for (name, full), ours in zip(whole.named_parameters(), own.parameters(), strict=True):
        shard, gradient = shard_of(ours), ours.grad
        assert gradient is not None and full.grad is not None
        if mesh.sequence.size > 1:  # what ZeRO does
            dist.all_reduce(gradient, group=mesh.sequence.group)
        close(gradient, full.grad if shard is None else shard.take(full.grad), name, 2e-5)
    with torch.no_grad():
        want_each = whole(tokens, targets=targets, per_token=True, **common)
        close(
            own(cut[0], targets=cut[1], per_token=True, **common), part(want_each, mesh.sequence, 1), "per token", 1e-5
        )


def places(tensor: int, sequence: int) -> None:
    """rank = (data * sequence + sequence rank) * tensor + tensor rank, and the groups' members in that order."""
    mesh, rank, size = mesh_of(tensor, sequence), dist.get_rank(), dist.get_world_size()
    assert (mesh.data.rank * sequence + mesh.sequence.rank) * tensor + mesh.tensor.rank == rank
    strides = ((mesh.tensor, 1), (mesh.sequence, tensor), (mesh.replicas, tensor))
    for axis, stride in strides:
        start = rank - axis.rank * stride
        assert dist.get_process_group_ranks(axis.group) == [start + i * stride for i in range(axis.size)]
    assert mesh.data.size * mesh.sequence.size == mesh.replicas.size == size // tensor
    assert mesh is mesh_of(tensor, sequence), "groups are made once"


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for tensor, sequence in ((2, 1), (1, 2), (2, 2), (4, 1)):
        places(tensor, sequence)
    layers(mesh_of(4, 1).tensor)
    layers(mesh_of(2, 2).tensor)
    exchange(mesh_of(1, 4).sequence)
    exchange(mesh_of(2, 2).sequence)
    everything = {"qkv_bias": True, "mlp_bias": True, "qk_norm": True, "sliding_window": 7}
    for tensor, sequence in ((2, 1), (1, 2), (2, 2)):
        model(mesh_of(tensor, sequence), checkpointing=False, tie_embeddings=True)
        model(mesh_of(tensor, sequence), checkpointing=True, **everything)
    dist.destroy_process_group()
    print("all equal", flush=True)
    os._exit(0)  # the interpreter's end may abort: see tests/kernels/vocab_parallel.py
