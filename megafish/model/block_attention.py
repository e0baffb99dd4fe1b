"""Causal attention on the CPU as batched matrix products over blocks of queries.

Each block of queries meets only the keys of its own document (and window) up to its last query, so that packed
documents and sliding windows cost what they use, where a mask would cost the full square. The probabilities are
recomputed in the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

BLOCK = 128
"""Queries in a block: small wastes little above the diagonal, large makes efficient products."""

SCORES = 1 << 20
"""Scores that exist at one time, unless one head of one block needs more."""

Segment = tuple[int, int, int]
"""A document: row of the batch, first token in the row, end."""


def segments(batch: int, length: int, cu_seqlens: torch.Tensor | None) -> list[Segment]:
    """Documents of a packed batch from the offsets in the flattened batch (None: every row is one document)."""
    if cu_seqlens is None:
        return [(row, 0, length) for row in range(batch)]
    offsets = cu_seqlens.tolist()
    return [
        (start // length, start % length, start % length + end - start)
        for start, end in pairwise(offsets)
        if end > start
    ]


def block_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: list[Segment], window: int | None
) -> torch.Tensor:
    """query [b, S, H, head_dim], key and value [b, S, H_kv, head_dim] -> [b, S, H, head_dim], every token of which
    must belong to one of the documents. Scores and softmax are fp32; the other products are in the inputs' dtype."""
    out: torch.Tensor = _BlockAttention.apply(query, key, value, documents, window)
    return out


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        documents: list[Segment],
        window: int | None,
    ) -> torch.Tensor:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        work = _Workspace(query, key, documents)
        for part in work.parts(documents):
            q, o = part.grouped(query), part.grouped(out)
            k, v = part.heads_first(key).float(), part.heads_first(value)
            for block in _blocks(q.shape[2], window):
                p, _ = work.probabilities(q, k, block)
                o[:, :, block.rows] = torch.bmm(p, v[:, block.keys]).view_as(o[:, :, block.rows])
        ctx.save_for_backward(query, key, value)
        ctx.documents, ctx.window = documents, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        d_query, d_key, d_value = (
            torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)
        )
        work = _Workspace(query, key, ctx.documents)
        for part in work.parts(ctx.documents):
            q, g, dq = (part.grouped(x) for x in (query, grad, d_query))
            k, v = part.heads_first(key), part.heads_first(value)
            k_fp32 = k.float()
            # A key collects from every later block of queries: in fp32, so that bf16 sums do not lose the small terms.
            dk, dv = torch.zeros(k.shape, dtype=torch.float32), torch.zeros(k.shape, dtype=torch.float32)
            for block in _blocks(q.shape[2], ctx.window):
                keys = block.keys
                p, scaled_query = work.probabilities(q, k_fp32, block)
                d_out = g[:, :, block.rows].reshape(len(k), -1, k.shape[-1])
                d_p = torch.bmm(d_out, v[:, keys].transpose(1, 2), out=work.buffer("d_p", p.shape, p.dtype))
                d_scores = work.buffer("d_scores", p.shape, p.dtype)
                torch.ops.aten._softmax_backward_data.out(d_p, p, -1, p.dtype, grad_input=d_scores)
                dq[:, :, block.rows] = torch.bmm(d_scores, k[:, keys]).mul_(work.scale).view_as(dq[:, :, block.rows])
                if p.dtype == torch.float32:
                    dk[:, keys].baddbmm_(d_scores.transpose(1, 2), scaled_query)
                    dv[:, keys].baddbmm_(p.transpose(1, 2), d_out)
                else:
                    dk[:, keys] += torch.bmm(d_scores.transpose(1, 2), scaled_query)
                    dv[:, keys] += torch.bmm(p.transpose(1, 2), d_out)
            part.heads_first(d_key).copy_(dk)
            part.heads_first(d_value).copy_(dv)
        return d_query, d_key, d_value, None, None


class _Block(NamedTuple):
    """Queries `rows` of a document and the keys they may see, as slices of the document."""

    rows: slice
    keys: slice
    window: int | None


def _blocks(length: int, window: int | None) -> Iterator[_Block]:
    for start in range(0, length, BLOCK):
        first = 0 if window is None else max(0, start - window + 1)
        end = min(start + BLOCK, length)
        yield _Block(slice(start, end), slice(first, end), window)


class _Part(NamedTuple):
    """Some key heads of one document, with the query heads that share them."""

    row: int
    tokens: slice
    heads: slice
    kv_heads: int

    def heads_first(self, x: torch.Tensor) -> torch.Tensor:
        """Keys or values [b, S, H_kv, head_dim] -> view [heads, n, head_dim]."""
        return x[self.row, self.tokens, self.heads].transpose(0, 1)

    def grouped(self, x: torch.Tensor) -> torch.Tensor:
        """Queries [b, S, H, head_dim] -> view [heads, H / H_kv, n, head_dim]."""
        by_key_head = x[self.row, self.tokens].unflatten(1, (self.kv_heads, -1))
        return by_key_head[:, self.heads].permute(1, 2, 0, 3)


class _Workspace:
    """Buffers for the scores of one block, used again for every block: fresh ones would cost more than the products."""

    def __init__(self, query: torch.Tensor, key: torch.Tensor, documents: list[Segment]) -> None:
        self.kv_heads = key.shape[2]
        self.scale = query.shape[-1] ** -0.5
        longest = max((end - start for _, start, end in documents), default=0)
        per_head = max(1, query.shape[2] // self.kv_heads * min(BLOCK, longest) * longest)
        self.heads = min(self.kv_heads, max(1, SCORES // per_head))
        self.size = self.heads * per_head
        self.store: dict[str, torch.Tensor] = {}
        self.above_diagonal = torch.full((BLOCK, BLOCK), float("-inf")).triu_(1)

    def parts(self, documents: list[Segment]) -> Iterator[_Part]:
        for row, start, end in documents:
            for head in range(0, self.kv_heads, self.heads):
                yield _Part(row, slice(start, end), slice(head, min(head + self.heads, self.kv_heads)), self.kv_heads)

    def buffer(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialized tensor of this shape, the same memory for the same name."""
        if name not in self.store:
            self.store[name] = torch.empty(self.size, dtype=dtype)
        return self.store[name][: math.prod(shape)].view(*shape)

    def probabilities(self, q: torch.Tensor, k: torch.Tensor, block: _Block) -> tuple[torch.Tensor, torch.Tensor]:
        """softmax of the block's scores [heads, G * n, keys] and its scaled queries [heads, G * n, head_dim], in q's
        dtype.

        q [heads, G, length, head_dim]; k fp32 [heads, length, head_dim]. The scores are computed in fp32 even for
        bf16 inputs: rounded to bf16, a score of 10 would be off by up to 0.03.
        """
        heads, groups, _, head_dim = q.shape
        rows, keys = block.rows, block.keys
        scaled = (q[:, :, rows].float() * self.scale).reshape(heads, -1, head_dim)
        shape = (heads, scaled.shape[1], keys.stop - keys.start)
        scores = self.buffer("scores", shape, torch.float32)
        torch.bmm(scaled, k[:, keys].transpose(1, 2), out=scores)
        size = rows.stop - rows.start
        by_row = scores.view(heads, groups, size, shape[2])
        by_row[..., -size:].add_(self.above_diagonal[:size, :size])
        if block.window is not None and rows.stop - keys.start > block.window:
            # Query i of the block stands at keys.stop - size + i: hide what is `window` or more before it.
            hidden = torch.full((size, shape[2]), float("-inf")).tril_(shape[2] - size - block.window)
            by_row.add_(hidden)
        p = torch.softmax(scores, -1, out=self.buffer("p", shape, torch.float32))
        if q.dtype == torch.float32:
            return p, scaled
        return self.buffer("p_rounded", shape, q.dtype).copy_(p), scaled.to(q.dtype)
