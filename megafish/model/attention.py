"""Causal attention that never crosses a document, by whichever kernel is there.

On CUDA in half precision, from compute capability 8.0 and up to head_dim 256: flash-attn's varlen kernel where it is
installed, otherwise torch's own (torch.nn.attention.varlen) where its version knows windows and grouped heads and
head_dim is a multiple of 8. block_attention on the CPU for packed documents and windows; scaled_dot_product_attention
everywhere else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from megafish.model.block_attention import Segment, block_attention, segments

BLOCK_DEVICES = ("cpu",)
"""Device types on which block_attention takes the place of a mask."""

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int | None], torch.Tensor]
"""kernel(q, k, v, cu_seqlens, max_seqlen, window) over [tokens, heads, head_dim]."""


@dataclass(frozen=True)
class Layout:
    """Which tokens of a batch see which and what computes it: made once per batch by `layout`, shared by all blocks.

    kernel, cu_seqlens and max_seqlen are set for the variable-length kernels, documents for block_attention, mask
    (additive, [b or 1, 1, S, S]) for SDPA; none of them: SDPA with plain causality.
    """

    window: int | None
    kernel: Kernel | None = None
    cu_seqlens: torch.Tensor | None = None
    max_seqlen: int = 0
    documents: list[Segment] | None = None
    mask: torch.Tensor | None = None


def layout(
    batch: int,
    length: int,
    *,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
    window: int | None,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Layout:
    """Attention layout of a packed batch of `batch` rows of `length` tokens.

    cu_seqlens: int32 [documents + 1], offsets of the documents in the flattened batch; every row starts a document.
    None: each row is one document. max_seqlen: the longest document (defaults to `length`, an upper bound that is
    always safe).
    """
    if window is not None and window >= length:
        window = None
    kernel = _varlen_kernel(device, dtype, head_dim)
    if kernel is not None:
        if cu_seqlens is None:
            cu_seqlens = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)
        return Layout(window, kernel=kernel, cu_seqlens=cu_seqlens.to(device), max_seqlen=max_seqlen or length)
    one_document_per_row = cu_seqlens is None or cu_seqlens.numel() == batch + 1
    undivided = one_document_per_row and window is None
    if device.type in BLOCK_DEVICES and not undivided:
        return Layout(window, documents=segments(batch, length, cu_seqlens))
    if undivided:
        return Layout(None)
    place = torch.arange(length, device=device)
    distance = place[:, None] - place[None, :]
    allowed = (distance >= 0)[None]
    if window is not None:
        allowed = allowed & (distance < window)
    if not one_document_per_row:
        assert cu_seqlens is not None
        # One place more than there are tokens: empty documents at the end start there.
        starts = torch.zeros(batch * length + 1, dtype=torch.int32, device=device)
        starts[cu_seqlens[:-1].to(device).long()] = 1
        document = starts[:-1].cumsum(0).view(batch, length)
        allowed = allowed & (document[:, :, None] == document[:, None, :])
    return Layout(window, mask=_additive(allowed[:, None], dtype))


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, where: Layout) -> torch.Tensor:
    """softmax(query key^T / sqrt(head_dim)) value within each document.

    query [b, S, H, head_dim]; key, value [b, S, H_kv, head_dim] with H a multiple of H_kv; returns [b, S, H, head_dim].
    """
    if where.kernel is not None:
        assert where.cu_seqlens is not None
        q, k, v = (x.flatten(0, 1) for x in (query, key, value))
        return where.kernel(q, k, v, where.cu_seqlens, where.max_seqlen, where.window).view_as(query)
    if where.documents is not None:
        return block_attention(query, key, value, where.documents, where.window)
    return _sdpa(query, key, value, where.mask, causal=where.mask is None)


@dataclass(frozen=True)
class Cached:
    """Where the new tokens of a pass over a cache stand, and what they see: made once by `cached` for all blocks."""

    rows: torch.Tensor
    """int64 [b, 1], numbers of the rows."""
    positions: torch.Tensor
    """int64 [b, n]."""
    mask: torch.Tensor
    """Additive, [b, 1, n, L]."""


def cached(positions: torch.Tensor, length: int, window: int | None, dtype: torch.dtype) -> Cached:
    """New tokens at positions int64 [b, n] over the first `length` entries of a cache.

    A query sees the entries up to and including its own position; later ones may hold anything finite.
    """
    distance = positions[:, :, None] - torch.arange(length, device=positions.device)
    allowed = distance >= 0
    if window is not None:
        allowed = allowed & (distance < window)
    rows = torch.arange(len(positions), device=positions.device)[:, None]
    return Cached(rows, positions, _additive(allowed[:, None], dtype))


def attend_cached(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attention of new tokens over a cache: query [b, n, H, head_dim]; key, value [b, H_kv, L, head_dim]; mask [b, 1,
    n, L], additive."""
    if query.shape[1] == 1 and query.device.type == "cpu":
        return one_token(query, key, value, mask)
    return _sdpa(query, key.transpose(1, 2), value.transpose(1, 2), mask, causal=False)


def one_token(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """attend_cached for one token a row on a CPU, as two batched products: mask [b, 1, 1, L].

    torch's kernel for the CPU is made for many queries. For a single one over keys and values that are contiguous it
    takes about 1.5 times as long in fp32 (as long with 512 tokens and grouped heads), two to three times in bf16, and
    ten times with grouped heads (benchmarks/audit.py).
    """
    batch, kv_heads, length, head_dim = key.shape
    q = (query * head_dim**-0.5).reshape(batch * kv_heads, -1, head_dim)
    scores = torch.bmm(q, key.flatten(0, 1).transpose(1, 2)).view(batch, kv_heads, -1, length) + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype).flatten(0, 1)
    return torch.bmm(weights, value.flatten(0, 1)).view(query.shape)


def _additive(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where allowed, -inf elsewhere. Made once, because SDPA would convert a boolean mask anew in every block."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))


def _sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, causal: bool
) -> torch.Tensor:
    grouped = query.shape[2] != key.shape[2]
    out = scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        enable_gqa=grouped,
    )
    return out.transpose(1, 2)


def _varlen_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernel | None:
    """The variable-length kernel for such inputs, None where there is none."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    # Both kernels are FlashAttention 2, which refuses older devices and wider heads.
    if head_dim > 256 or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    kernel = _flash_attn_kernel()
    if kernel is None and head_dim % 8 == 0:  # flash-attn pads other widths, torch refuses them
        kernel = _torch_kernel()
    return kernel


@cache
def _flash_attn_kernel() -> Kernel | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None

    def kernel(q: Any, k: Any, v: Any, cu_seqlens: torch.Tensor, longest: int, window: int | None) -> torch.Tensor:
        # flash-attn counts the tokens to the left of the query, the configuration counts the query too.
        left = -1 if window is None else window - 1
        return flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True, window_size=(left, 0)
        )

    return kernel


@cache
def _torch_kernel() -> Kernel | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    # The first versions (torch 2.10) had neither; a model that needs one of them cannot be told from here.
    if not {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys():
        return None

    def kernel(q: Any, k: Any, v: Any, cu_seqlens: torch.Tensor, longest: int, window: int | None) -> torch.Tensor:
        left = -1 if window is None else window - 1
        out = varlen_attn(
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens,
            longest,
            longest,
            window_size=(left, 0),
            enable_gqa=q.shape[1] != k.shape[1],
        )
        assert isinstance(out, torch.Tensor)
        return out

    return kernel
