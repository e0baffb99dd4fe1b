"""Rotary position embeddings of queries and keys, both in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megafish_kernels.backends import Backend, compilable, takes_triton


def rotary(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, overwrite: bool = False, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Rotate the pairs (i, i + head_dim / 2) of queries and keys (Su et al. 2021, arXiv 2104.09864; half-split, as
    Hugging Face): x[i] cos - x[i + half] sin, x[i + half] cos + x[i] sin.

    Views, such as parts of a fused projection, are read where they lie, without a copy (`rotary_qkv` spares its
    backward a copy too). Triton computes in fp32 and rounds once; torch computes in the dtype of query, with cos and
    sin rounded to it, as transformers does. Unchanged by autocast.

    Args:
        query: [b, S, H, head_dim] in any floating dtype, head_dim even.
        key: [b, S, H_kv, head_dim] in the same dtype; any H_kv.
        cos: [S, 1, head_dim], or [b or 1, S, 1, head_dim]: each half holds the head_dim / 2 cosines. A constant.
        sin: likewise, the first half negated: (-sin, sin).
        overwrite: the results may take the memory of query and key. Allowed if nothing reads these two from here on,
            and if they share no element: what a norm returned is such a case, for its backward does not need it. Where
            something has saved one of them for its backward all the same, that raises torch's error about tensors
            modified in place. It is a permission: torch makes no use of it, nor does Triton of views, of leaves that
            require gradients, of tensors that overlap themselves, or under torch.compile, which plans memory itself.
            The backward overwrites nothing.
        backend: "triton" (float32, bfloat16, float16), "torch" on any device, "auto" for Triton on CUDA where it can.

    Returns:
        query and key rotated, in their shapes and dtype; contiguous, unless overwritten.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the backend cannot take them.
    """
    _check("query", query, cos, sin)
    _check_key(key, query)
    triton = takes_triton(backend, query, key)
    if torch.compiler.is_compiling() and not triton:
        return _composed(query, cos, sin), _composed(key, cos, sin)
    # After a view was overwritten its siblings could not be read any more: autograd takes them for changed too.
    overwrite = overwrite and triton and all(_may_overwrite(x) and x._base is None for x in (query, key))
    result: tuple[Tensor, Tensor] = _Rotary.apply(query, key, cos, sin, triton, overwrite)
    return result


def rotary_qkv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    *,
    overwrite: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`rotary` for a fused projection of queries, keys and values, whose gradient is written once and in one piece.

    Args:
        qkv: [b, S, heads + 2 kv_heads, head_dim]: queries, keys, values. May be a view of the projection.
        cos, sin, backend: see `rotary`.
        heads: of the queries.
        kv_heads: of the keys, and of the values.
        overwrite: queries and keys may be rotated in place. Allowed if nothing reads qkv, or what it is a view of, from
            here on: a linear layer's backward does not need its output. Otherwise as in `rotary`, but views are taken.

    Returns:
        queries and keys, rotated, and values, [b, S, ..., head_dim]. The values are a view of qkv.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the backend cannot take them.
    """
    _check("qkv", qkv, cos, sin)
    if qkv.shape[2] != heads + 2 * kv_heads or heads < 0 or kv_heads < 0:
        raise ValueError(f"qkv: expected {heads} + 2 * {kv_heads} heads, got {tuple(qkv.shape)}")
    triton = takes_triton(backend, qkv)
    if torch.compiler.is_compiling():
        query, key, value = qkv.split((heads, kv_heads, kv_heads), dim=2)
        return *rotary(query, key, cos, sin, backend=backend), value
    overwrite = overwrite and triton and _may_overwrite(qkv)
    result: tuple[Tensor, Tensor, Tensor] = _RotaryQKV.apply(qkv, cos, sin, (heads, kv_heads), triton, overwrite)
    return result


def _check(name: str, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if x.dim() != 4 or x.shape[3] % 2:
        raise ValueError(f"{name}: expected [b, S, heads, head_dim] with head_dim even, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point dtype, got {x.dtype}")
    batch, length, _, head_dim = x.shape
    for table_name, table in (("cos", cos), ("sin", sin)):
        fits = table.dim() == 3 or (table.dim() == 4 and table.shape[0] in (1, batch))
        if not fits or table.shape[-3:] != (length, 1, head_dim):
            raise ValueError(
                f"{table_name}: expected [{length}, 1, {head_dim}], or that for each of {batch} rows, "
                f"got {tuple(table.shape)}"
            )
        if not table.is_floating_point():
            raise ValueError(f"{table_name}: expected a floating-point dtype, got {table.dtype}")
        if table.device != x.device:
            raise ValueError(f"{table_name}: lies on {table.device}, but {name} on {x.device}")


def _check_key(key: Tensor, query: Tensor) -> None:
    batch, length, _, head_dim = query.shape
    if key.dim() != 4 or key.shape[:2] != query.shape[:2] or key.shape[3] != head_dim:
        raise ValueError(f"key: expected [{batch}, {length}, H_kv, {head_dim}] as query has it, got {tuple(key.shape)}")
    if key.dtype != query.dtype:
        raise ValueError(f"key: dtype {key.dtype} must be that of query, {query.dtype}")
    if key.device != query.device:
        raise ValueError(f"key: lies on {key.device}, but query on {query.device}")


def _may_overwrite(x: Tensor) -> bool:
    """Not a leaf whose value the user keeps, and each element lies in a place of its own."""
    if torch.compiler.is_compiling() or (x.is_leaf and x.requires_grad):
        return False
    extent = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1):
        if stride < extent:
            return False
        extent += stride * (size - 1)
    return True


def _shapes(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, transpose: bool) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(query.shape, dtype=query.dtype, device=query.device),
        torch.empty(key.shape, dtype=key.dtype, device=key.device),
    )


@compilable("rotary", _shapes)
def _triton_rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, transpose: bool) -> tuple[Tensor, Tensor]:
    """Rotated copies, turned the other way with `transpose`."""
    from megafish_kernels import triton_rope

    out = _shapes(query, key, cos, sin, transpose)
    triton_rope.rotate(query, key, cos, sin, *out, transpose=transpose)
    return out


def _overwrite(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotated in place. Autograd's count of versions tells whoever saved these tensors for a backward."""
    from megafish_kernels import triton_rope

    triton_rope.rotate(query, key, cos, sin, query, key, transpose=False)
    for tensor in (query, key):
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, triton: bool, overwrite: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.triton = triton
        if overwrite:
            _overwrite(query, key, cos, sin)
            # As new tensors in the same memory: to autograd they are results like others.
            return query.detach(), key.detach()
        return (_triton_rotate if triton else _torch_rotate)(query, key, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_query: Tensor, d_key: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        # The transpose of a rotation turns the other way.
        rotate = _triton_rotate if ctx.triton else _torch_rotate
        return *rotate(d_query, d_key, cos, sin, True), None, None, None, None


class _RotaryQKV(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int], triton: bool, overwrite: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.heads, ctx.triton = heads, triton
        if not triton:
            # Queries and keys as one tensor: to torch one loop over both is faster than two.
            both, value = qkv.detach().split((sum(heads), heads[1]), dim=2)
            both = _turn(both, *_rounded(cos, sin, qkv.dtype))
            return *both.split(heads, dim=2), value
        query, key, value = qkv.detach().split((*heads, heads[1]), dim=2)
        if overwrite:
            _overwrite(query, key, cos, sin)
        else:
            query, key = _triton_rotate(query, key, cos, sin, False)
        return query, key, value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_query: Tensor, d_key: Tensor, d_value: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        heads, kv_heads = ctx.heads
        batch, length, _, head_dim = d_query.shape
        d_qkv = d_query.new_empty((batch, length, heads + 2 * kv_heads, head_dim))
        to_both, to_value = d_qkv.split((heads + kv_heads, kv_heads), dim=2)
        to_value.copy_(d_value)
        if ctx.triton:
            from megafish_kernels import triton_rope

            to_query, to_key = to_both.split((heads, kv_heads), dim=2)
            triton_rope.rotate(d_query, d_key, cos, sin, to_query, to_key, transpose=True)
        else:
            cos, sin = _rounded(cos, sin, d_query.dtype)
            _turn(torch.cat((d_query, d_key), dim=2), cos, -sin, to_both)
        return d_qkv, None, None, None, None, None


def _torch_rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, transpose: bool) -> tuple[Tensor, Tensor]:
    cos, sin = _rounded(cos, sin, query.dtype)
    if transpose:
        sin = -sin
    return _turn(query, cos, sin), _turn(key, cos, sin)


def _rounded(cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return cos.to(dtype), sin.to(dtype)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half = x.shape[-1] // 2
    torch.mul(x[..., half:], sin[..., :half], out=out[..., :half])
    torch.mul(x[..., :half], sin[..., half:], out=out[..., half:])
    return out.addcmul_(x, cos)


def _composed(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same for torch.compile, which fuses it, and which knows no writing into a part of a tensor."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((second, first), dim=-1) * sin.to(x.dtype) + x * cos.to(x.dtype)
