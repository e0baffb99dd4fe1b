"""What autograd keeps of a forward pass until the backward pass comes by, and what the loss works in.

Follows model/transformer.py and the operators of megafish_kernels tensor by tensor: T tokens of a micro-batch, D width,
A = heads * head_dim, KV = key heads * head_dim, F inner width, w bytes a number. Views share their storage, so what
counts are storages: queries, keys and values are one. On CUDA the Triton kernels keep

    x D, its norm D, qkv A + 2 KV, attention's output A, the sum D, its norm D, gate and up 2 F, their product F

of each token in each block, and fp32 figures of rows (norms, log-sum-exp of the attention). On a CPU the rotated
queries and keys are a copy (A + KV), SwiGLU keeps silu(gate) too (F), and what follows the last attention exists for
the kept tokens alone. Tensor parallelism divides A, KV and F, and the tokens of what is D wide; sequence parallelism
divides the tokens, and keeps attention's output before and after its exchange.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megafish.config import Config, ModelConfig
from megafish.model.flops import padded_vocab_size
from megafish.plan.layout import Layout
from megafish_kernels.tiles import kept_columns
from megafish_kernels.torch_backend import chunk_rows, padded_rows

FP32, INT64 = 4, 8


@dataclass(frozen=True)
class Activations:
    """Bytes of one process's micro-batch."""

    blocks: float
    """Kept between forward and backward for all blocks, the final norm and the embedding."""
    block: float
    """What one block (not the last) keeps while it is not checkpointed."""
    head: float
    """The loss's own: its gradients, logits and copies of rows, at their highest."""
    backward: float
    """What the backward pass of one block takes beside what is kept, at its highest."""


def activations_of(config: Config, vocab_size: int, layout: Layout, kept_fraction: float) -> Activations:
    """Activations of a forward pass of which `kept_fraction` of the targets are supervised."""
    tokens = layout.micro_batch * config.data.sequence_length // layout.sequence
    kept = max(1, round(tokens * kept_fraction))
    model, weight = config.model, layout.itemsize
    # Only a CPU leaves the dropped tokens out of what follows the last attention, and not with tensor parallelism.
    compacts = layout.device == "cpu" and layout.tensor == 1
    rows = padded_rows(kept, _dtype(layout)) if compacts else tokens
    rows = min(rows, tokens)
    block = block_bytes(model, tokens, tokens, layout)
    last = block_bytes(model, tokens, rows, layout)
    width = model.hidden_size
    # The tokens' ids; the final norm's input and figures, and its output, which is the loss's input.
    ends = tokens * INT64 + rows / layout.tensor * (2 * width * weight + FP32)
    if layout.checkpointing:
        blocks = model.num_layers * tokens / layout.tensor * width * weight + max(block, last)
    else:
        blocks = (model.num_layers - 1) * block + last
    head = (
        _cpu_head(config, vocab_size, layout, rows)
        if layout.device == "cpu"
        else _cuda_head(config, vocab_size, layout, tokens)
    )
    return Activations(blocks + ends, block, head, _backward_bytes(model, tokens, layout))


def block_bytes(model: ModelConfig, tokens: int, rows: int, layout: Layout) -> float:
    """Bytes that a block keeps; `rows` of its tokens go on after the attention."""
    weight, width = layout.itemsize, float(model.hidden_size)
    heads = model.num_heads // layout.tensor
    kv_heads = max(model.resolved_kv_heads // layout.tensor, layout.sequence)
    queries, keys = heads * model.resolved_head_dim, kv_heads * model.resolved_head_dim
    inner = model.intermediate_size // layout.tensor
    cpu = layout.device == "cpu"
    width /= layout.tensor  # of a share of the tokens, all of it
    before = 2 * width + queries + 2 * keys
    if layout.sequence > 1:
        # What attention keeps came by an exchange; the norms of queries and keys keep what they were given.
        before += queries + 2 * keys if model.qk_norm else 0
    elif cpu or model.qk_norm:
        before += queries + keys
    figures = 1.0 + (heads + kv_heads if model.qk_norm else 0)
    if not cpu:
        figures += heads
    if layout.sequence > 1 and not cpu:
        before += queries
    after = queries + 2 * width + (4 if cpu else 3) * inner
    index = rows * INT64 if rows < tokens else 0
    return tokens * (before * weight + figures * FP32) + rows * (after * weight + FP32) + index


def _backward_bytes(model: ModelConfig, tokens: int, layout: Layout) -> float:
    """The feed-forward's backward, the widest: gradients of the residual stream, of the product and of gate and up
    (which CUDA writes over gate and up), and on a CPU a product on the way."""
    weight, width, inner = layout.itemsize, model.hidden_size, model.intermediate_size // layout.tensor
    # With tensor parallelism the tokens are gathered, and their gradient is whole until it is scattered.
    numbers = (
        2 * width / layout.tensor
        + (2 * width if layout.tensor > 1 else 0)
        + inner
        + (3 * inner if layout.device == "cpu" else 0)
    )
    return float(tokens * numbers * weight)


def _cuda_head(config: Config, vocab_size: int, layout: Layout, tokens: int) -> float:
    """linear_cross_entropy with Triton: see megafish_kernels.cost. The number of kept tokens stays on the device, so
    that there is room for every token."""
    width = config.model.hidden_size
    columns = padded_vocab_size(config.model, vocab_size) // layout.tensor
    budget = None if config.loss.logits_mib is None else config.loss.logits_mib * 2**20
    kept_logits, slab = kept_columns(tokens, columns, layout.itemsize, budget)
    rows = layout.itemsize * tokens * width
    logits = layout.itemsize * tokens * (kept_logits + min(slab, columns - kept_logits))
    if layout.tensor > 1:
        rows *= 2  # gathered first
    # The compacted rows, their fp32 gradient, the weight's gradient; 64 bytes a token of figures.
    return rows + logits + FP32 * tokens * width + layout.itemsize * columns * width + 64.0 * tokens


def _cpu_head(config: Config, vocab_size: int, layout: Layout, rows: int) -> float:
    """The sweep of megafish_kernels.torch_backend: gradients of hidden states and weight are made in the forward pass,
    the weight's in fp32, and rounded to its dtype in the backward."""
    width, weight = config.model.hidden_size, layout.itemsize
    columns = padded_vocab_size(config.model, vocab_size) // layout.tensor
    budget = None if config.loss.logits_mib is None else config.loss.logits_mib * 2**20
    chunk = padded_rows(chunk_rows(rows, columns, _dtype(layout), budget), _dtype(layout))
    logits = chunk * columns * weight
    gradient = columns * width * FP32
    rounded = columns * width * weight if layout.bf16 else 0
    # In half precision a chunk's product with the weight's gradient is rounded before it is added.
    return logits + gradient + rounded + rows * width * weight + chunk * width * weight


def _dtype(layout: Layout) -> torch.dtype:
    return torch.bfloat16 if layout.bf16 else torch.float32
