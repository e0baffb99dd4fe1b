"""Attention by whichever kernel against softmax written out in float64."""

from __future__ import annotations

import inspect
from functools import wraps
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen

from megafish.model import attention
from megafish.model import block_attention as blocks
from megafish.model.attention import Layout, attend, attend_cached, cached, layout

SHAPES = {
    "one document": (None, None, 2),
    "documents": ([0, 1, 40, 150, 300, 301, 600], None, 2),
    "window": (None, 37, 4),
    "documents and a window longer than a block": ([0, 290, 300, 600], 140, 1),
    "empty documents": ([0, 40, 40, 300, 600, 600, 600], None, 4),
}


def oracle(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: list[int] | None, window: int | None
) -> torch.Tensor:
    """Attention over the full square in float64 with a mask; starts: offsets of the documents in the flattened
    batch."""
    batch, length = q.shape[:2]
    place = torch.arange(batch * length)
    edges = starts if starts is not None else list(range(0, batch * length + 1, length))
    document = torch.bucketize(place, torch.tensor(edges[1:]), right=True).view(batch, length)
    allowed = document[:, :, None] == document[:, None, :]
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    allowed = allowed & (distance >= 0)
    if window is not None:
        allowed = allowed & (distance < window)
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    p = scores.masked_fill(~allowed[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", p, v)


def inputs(dtype: torch.dtype, kv_heads: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 300, 4, 8), (2, 300, kv_heads, 8), (2, 300, kv_heads, 8), (2, 300, 4, 8))
    return tuple((2 * torch.randn(s, generator=generator, dtype=torch.float64)).to(dtype) for s in shapes)


@pytest.mark.parametrize("name", list(SHAPES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_attention_equals_the_oracle(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    starts, window, kv_heads = SHAPES[name]
    monkeypatch.setattr(blocks, "SCORES", 1 << 16)  # several heads need several passes
    q, k, v, grad = inputs(dtype, kv_heads)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    want = oracle(*wide, starts, window)
    want_grads = torch.autograd.grad(want, wide, grad.double())
    cu_seqlens = None if starts is None else torch.tensor(starts, dtype=torch.int32)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    got = blocks.block_attention(*leaves, blocks.segments(2, 300, cu_seqlens), window)
    got_grads = torch.autograd.grad(got, leaves, grad)
    limit = 1e-6 if dtype == torch.float32 else 8e-3
    for a, b in zip((got, *got_grads), (want, *want_grads), strict=True):
        assert a.dtype == dtype
        assert ((a.double() - b).norm() / b.norm()).item() < limit


def layout_of(q: torch.Tensor, starts: list[int] | None, window: int | None) -> Layout:
    cu_seqlens = None if starts is None else torch.tensor(starts, dtype=torch.int32)
    return layout(
        2,
        300,
        cu_seqlens=cu_seqlens,
        max_seqlen=None,
        window=window,
        head_dim=q.shape[-1],
        device=q.device,
        dtype=q.dtype,
    )


@pytest.mark.parametrize("name", list(SHAPES))
def test_layout_gives_the_oracle_whichever_kernel_it_picks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    starts, window, kv_heads = SHAPES[name]
    q, k, v, _ = inputs(torch.float32, kv_heads)
    want = oracle(q.double(), k.double(), v.double(), starts, window).float()
    where = layout_of(q, starts, window)
    torch.testing.assert_close(attend(q, k, v, where), want, rtol=1e-5, atol=1e-5)
    # The mask is what a CUDA device without a variable-length kernel gets: made here, used on the CPU.
    monkeypatch.setattr("megafish.model.attention.BLOCK_DEVICES", ())
    masked = layout_of(q, starts, window)
    assert masked.documents is None
    torch.testing.assert_close(attend(q, k, v, masked), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", list(SHAPES))
def test_layout_and_attend_hand_the_varlen_kernel_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's kernel runs on CUDA alone: here plain torch stands for it, behind its own signature."""
    starts, window, kv_heads = SHAPES[name]
    real = inspect.signature(varlen.varlen_attn)
    calls = 0

    @wraps(varlen.varlen_attn)
    def stand_in(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        given = real.bind(*args, **kwargs)  # raises TypeError where the installed torch takes no such call
        given.apply_defaults()
        a = given.arguments
        q, k, v = a["query"], a["key"], a["value"]
        assert a["enable_gqa"] or q.shape[1] == k.shape[1]
        assert torch.equal(a["cu_seq_q"], a["cu_seq_k"])
        assert a["cu_seq_q"].dtype == torch.int32
        assert a["max_q"] == a["max_k"] >= int(a["cu_seq_q"].diff().max())
        left, right = a["window_size"]
        assert right == 0
        return oracle(q[None], k[None], v[None], a["cu_seq_q"].tolist(), None if left < 0 else left + 1)[0]

    if not {"window_size", "enable_gqa"} <= real.parameters.keys():
        pytest.skip("this torch's varlen_attn knows no windows: megafish does not call it")
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    attention._torch_kernel.cache_clear()
    kernel = attention._torch_kernel()
    attention._torch_kernel.cache_clear()
    assert kernel is not None
    q, k, v, _ = inputs(torch.float32, kv_heads)
    with monkeypatch.context() as patch:
        patch.setattr(attention, "_varlen_kernel", lambda device, dtype, head_dim: kernel)
        where = layout_of(q, starts, window)
    # The choice stays with the layout: attend runs where the kernel would not be chosen.
    want = oracle(q.double(), k.double(), v.double(), starts, window).float()
    torch.testing.assert_close(attend(q, k, v, where), want, rtol=1e-5, atol=1e-5)
    assert calls == 1


def test_a_varlen_attn_without_windows_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def old(query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int) -> None: ...

    monkeypatch.setattr(varlen, "varlen_attn", old)
    attention._torch_kernel.cache_clear()
    assert attention._torch_kernel() is None
    attention._torch_kernel.cache_clear()


def test_varlen_kernels_are_chosen_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"flash": lambda: "flash", "torch": lambda: "torch"}
    monkeypatch.setattr(attention, "_torch_kernel", chosen["torch"])

    def choose(flash: bool, capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> object:
        monkeypatch.setattr(attention, "_flash_attn_kernel", chosen["flash"] if flash else lambda: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return attention._varlen_kernel(torch.device("cuda"), dtype, head_dim)

    assert choose(True, (8, 0), torch.bfloat16, 64) == "flash"
    assert choose(True, (9, 0), torch.float16, 60) == "flash"
    assert choose(False, (8, 0), torch.bfloat16, 64) == "torch"
    assert choose(False, (8, 0), torch.bfloat16, 60) is None
    for flash in (True, False):
        assert choose(flash, (7, 5), torch.float16, 64) is None
        assert choose(flash, (9, 0), torch.bfloat16, 264) is None
        assert choose(flash, (9, 0), torch.float32, 64) is None
    assert attention._varlen_kernel(torch.device("cpu"), torch.bfloat16, 64) is None


def test_undivided_rows_take_the_causal_kernel() -> None:
    where = layout(
        2,
        64,
        cu_seqlens=None,
        max_seqlen=None,
        window=64,
        head_dim=8,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    assert where.documents is None
    assert where.mask is None


def test_empty_documents_are_skipped() -> None:
    cu_seqlens = torch.tensor([0, 4, 4, 8], dtype=torch.int32)
    assert blocks.segments(2, 4, cu_seqlens) == [(0, 0, 4), (1, 0, 4)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("at", [[[5, 6], [200, 201]], [[5], [201]], [[0], [49]]])
def test_cached_queries_see_up_to_themselves(
    at: list[list[int]], kv_heads: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Several tokens a row, and one alone, which has a way of its own on a CPU."""
    q, k, v, _ = inputs(dtype, kv_heads)
    want = oracle(q.double(), k.double(), v.double(), None, 50).float()
    positions, rows = torch.tensor(at), torch.arange(2)[:, None]
    where = cached(positions, k.shape[1], 50, dtype)
    assert torch.equal(where.rows, rows)
    got = attend_cached(q[rows, positions], k.transpose(1, 2), v.transpose(1, 2), where.mask)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want[rows, positions], rtol=tolerance, atol=tolerance)
