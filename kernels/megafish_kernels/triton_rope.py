"""The Triton kernel of the rotary embedding: a program turns all heads of a token, queries and keys."""

# Kernels' arguments are the compiler's own values, which have no useful Python types.
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megafish_kernels import triton_runtime

# Pairs that a program turns at a time, at most.
_TILE = 1024


@triton.jit
def _turn(x, out, c, s, x_head, out_head, HEADS: tl.constexpr, HALF: tl.constexpr, TILE: tl.constexpr):
    """Turn all heads of one token; c and s [1, pairs]."""
    pair = tl.arange(0, c.shape[1])[None, :]
    for start in range(0, HEADS, TILE):
        head = (start + tl.arange(0, TILE))[:, None]
        mask = (head < HEADS) & (pair < HALF)
        head = head.to(tl.int64)
        at = x + head * x_head + pair
        first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
        at = out + head * out_head + pair
        tl.store(at, (first * c - second * s).to(out.dtype.element_ty), mask=mask)
        tl.store(at + HALF, (second * c + first * s).to(out.dtype.element_ty), mask=mask)


@triton.jit
def rotary_turn(
    query,
    key,
    query_out,
    key_out,
    cos,
    sin,
    length,
    query_batch,
    query_place,
    query_head,
    key_batch,
    key_place,
    key_head,
    query_out_batch,
    query_out_place,
    query_out_head,
    key_out_batch,
    key_out_place,
    key_out_head,
    cos_batch,
    cos_place,
    sin_batch,
    sin_place,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    TRANSPOSE: tl.constexpr,
):
    token = tl.program_id(0)
    batch, place = (token // length).to(tl.int64), (token % length).to(tl.int64)
    pair = tl.arange(0, PAIRS)[None, :]
    # Both halves of the tables say the same: one of each is read, of sin the one that is not negated.
    c = tl.load(cos + batch * cos_batch + place * cos_place + pair, mask=pair < HALF, other=0.0).to(tl.float32)
    s = tl.load(sin + batch * sin_batch + place * sin_place + HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)
    if TRANSPOSE:
        s = -s
    if HEADS > 0:
        x = query + batch * query_batch + place * query_place
        out = query_out + batch * query_out_batch + place * query_out_place
        _turn(x, out, c, s, query_head, query_out_head, HEADS, HALF, TILE)
    if KEY_HEADS > 0:
        x = key + batch * key_batch + place * key_place
        out = key_out + batch * key_out_batch + place * key_out_place
        _turn(x, out, c, s, key_head, key_out_head, KEY_HEADS, HALF, KEY_TILE)


def rotate(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_out: Tensor,
    key_out: Tensor,
    *,
    transpose: bool,
) -> None:
    """Fills query_out and key_out, which may be query and key. The last dimension of the tables and of what is written
    has stride 1 (or is copied where it is read)."""
    batch, length, heads, head_dim = query.shape
    key_heads, half = key.shape[2], head_dim // 2
    query_in, key_in = _unit_stride(query), _unit_stride(key)
    cos, sin = _unit_stride(cos.expand(batch, -1, -1, -1)), _unit_stride(sin.expand(batch, -1, -1, -1))
    pairs = triton.next_power_of_2(max(half, 1))
    most = max(_TILE // pairs, 1)
    tile, key_tile = (min(triton.next_power_of_2(max(count, 1)), most) for count in (heads, key_heads))
    triton_runtime.launch(
        rotary_turn,
        (batch * length,) if half else (0,),
        query_in,
        key_in,
        query_out,
        key_out,
        cos,
        sin,
        length,
        *query_in.stride()[:3],
        *key_in.stride()[:3],
        *query_out.stride()[:3],
        *key_out.stride()[:3],
        *cos.stride()[:2],
        *sin.stride()[:2],
        HEADS=heads,
        KEY_HEADS=key_heads,
        HALF=half,
        PAIRS=pairs,
        TILE=tile,
        KEY_TILE=key_tile,
        TRANSPOSE=transpose,
        # Eight pairs a thread, one 128-bit load in half precision, even where there are few heads of keys.
        num_warps=min(max(min(tile, key_tile) * pairs // 256, 1), 4),
    )


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
