"""Rotary embeddings against the float64 oracle, in their own memory and in that of their inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megafish_kernels import rotary, rotary_qkv
from megafish_kernels.reference import reference_rotary

TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3}


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tables(length: int, head_dim: int, *batch: int) -> tuple[Tensor, Tensor]:
    """cos and sin [*batch, length, 1, head_dim] fp32, each row of a batch with positions of its own."""
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / max(head_dim, 1))
    place = torch.arange(length, dtype=torch.float64)
    if batch:
        place = place + 10 * torch.arange(batch[0], dtype=torch.float64)[:, None]
    angle = (place[..., None] * frequency)[..., None, :]
    return torch.cat((angle.cos(), angle.cos()), -1).float(), torch.cat((-angle.sin(), angle.sin()), -1).float()


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> Any:
    if request.param == "triton":
        request.getfixturevalue("triton_device")
    return request.param


def device_of(backend: str) -> torch.device:
    return torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")


def contiguous(both: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    query, key = both.split((heads, kv_heads), dim=2)
    return query.contiguous(), key.contiguous()


def fused(both: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    query, key = both.split((heads, kv_heads), dim=2)
    return query, key


def heads_first(both: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    query, key = both.transpose(1, 2).contiguous().transpose(1, 2).split((heads, kv_heads), dim=2)
    return query, key


def scattered(both: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    """The last dimension is not the one of stride 1."""
    query, key = both.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0).split((heads, kv_heads), dim=2)
    return query, key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("view", [contiguous, fused, heads_first, scattered])
@pytest.mark.parametrize(
    ("shape", "kv_heads", "per_row"),
    [((2, 5, 6, 16), 2, False), ((3, 4, 3, 6), 3, True), ((1, 3, 40, 64), 1, True), ((2, 1, 5, 2), 7, False)],
)
def test_values_and_gradients_equal_the_oracle(
    backend: Any, view: Callable[..., Any], shape: Any, kv_heads: int, per_row: bool, dtype: torch.dtype
) -> None:
    batch, length, heads, head_dim = shape
    device = device_of(backend)
    both = random(batch, length, heads + kv_heads, head_dim, dtype=dtype).to(device).requires_grad_()
    cos, sin = (table.to(device) for table in tables(length, head_dim, *((batch,) if per_row else ())))
    query, key = view(both, heads, kv_heads)
    got = rotary(query, key, cos, sin, backend=backend)
    assert [x.shape for x in got] == [query.shape, key.shape] and all(x.dtype == dtype for x in got)
    upstream = random(*both.shape, dtype=dtype, seed=1).to(device)
    (gradient,) = torch.autograd.grad(got, both, upstream.split((heads, kv_heads), dim=2))

    wide = both.detach().cpu().double().requires_grad_()
    wanted = reference_rotary(wide, cos.cpu(), sin.cpu())
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(torch.cat(got, 2).cpu().double(), wanted, rtol=tolerance, atol=4 * tolerance)
    (expected,) = torch.autograd.grad(wanted, wide, upstream.cpu().double())
    torch.testing.assert_close(gradient.cpu().double(), expected, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("shape", [(0, 3, 2, 4), (2, 0, 2, 4), (2, 3, 0, 4), (2, 3, 2, 0)])
def test_empty(backend: Any, shape: Any) -> None:
    device = device_of(backend)
    cos, sin = (table.to(device) for table in tables(shape[1], shape[3]))
    query = torch.ones(shape, device=device, requires_grad=True)
    key = torch.ones(*shape[:2], 1, shape[3], device=device, requires_grad=True)
    got = rotary(query, key, cos, sin, backend=backend)
    assert got[0].shape == query.shape and got[1].shape == key.shape
    (got[0].sum() + got[1].sum()).backward()
    assert query.grad is not None and query.grad.shape == query.shape


def test_turns_pairs_by_position() -> None:
    """(1, 0) at position p becomes (cos p f, sin p f) in each pair (i, i + half), f = 10000^(-2 i / head_dim)."""
    cos, sin = tables(6, 8)
    x = torch.zeros(1, 6, 1, 8, dtype=torch.float64)
    x[..., :4] = 1.0
    turned, _ = rotary(x, x, cos.double(), sin.double())
    angle = torch.arange(6.0, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(turned[0, :, 0], torch.cat((angle.cos(), angle.sin()), 1), rtol=0, atol=1e-6)


def test_gradcheck() -> None:
    query, key = random(2, 3, 2, 4).requires_grad_(), random(2, 3, 1, 4, seed=1).requires_grad_()
    cos, sin = tables(3, 4)
    assert torch.autograd.gradcheck(lambda q, k: rotary(q, k, cos.double(), sin.double()), (query, key))


def test_bf16_is_near_fp32() -> None:
    x = random(2, 300, 2, 16, dtype=torch.bfloat16)
    cos, sin = tables(300, 16)
    got, _ = rotary(x, x, cos, sin)
    assert got.dtype == torch.bfloat16
    want, _ = rotary(x.float(), x.float(), cos, sin)
    # Four roundings of 2^-9: of the table, of both products and of the result.
    bound = 4 * 2**-9 * (x.float().abs() + x.float().roll(8, -1).abs())
    assert ((got.float() - want).abs() <= bound).all()


class Projection(torch.nn.Module):
    """Queries, keys and values of one linear layer, the first two rotated: in one piece or (`parts`) as copies, as a
    norm would return them. `between` is applied to the layer's output, and to the copies."""

    def __init__(
        self, backend: Any, overwrite: bool, parts: bool, between: Callable[[Tensor], Tensor] = lambda x: x
    ) -> None:
        super().__init__()
        device = device_of(backend)
        self.weight = torch.nn.Parameter(random(7 * 8, 12, dtype=torch.float32, seed=3).to(device))
        self.x = random(2, 5, 12, dtype=torch.float32, seed=4).to(device).requires_grad_()
        self.cos, self.sin = (table.to(device) for table in tables(5, 8))
        self.parts, self.between = parts, between
        self.options: Any = {"overwrite": overwrite, "backend": backend}

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.between(x @ self.weight.T).unflatten(-1, (7, 8))
        if self.parts:
            query, key, value = qkv.split((3, 2, 2), dim=2)
            query, key = self.between(query * 1.0), self.between(key * 1.0)
            query, key = rotary(query, key, self.cos, self.sin, **self.options)
        else:
            query, key, value = rotary_qkv(qkv, self.cos, self.sin, 3, 2, **self.options)
        return (query.sum(2, keepdim=True) * key * value.cos()).sum(dim=(2, 3))

    def gradients(self, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(self.x).square().sum(), (self.x, self.weight))


@pytest.mark.parametrize("parts", [False, True])
def test_overwriting_changes_no_gradient(backend: Any, parts: bool) -> None:
    kept, overwritten = Projection(backend, False, parts), Projection(backend, True, parts)
    wanted = kept.gradients(kept)
    for got in (
        kept.gradients(kept),
        overwritten.gradients(overwritten),
        overwritten.gradients(lambda x: checkpoint(overwritten, x, use_reentrant=False)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_one_piece_is_the_same_as_parts(backend: Any) -> None:
    one, parts = Projection(backend, False, False), Projection(backend, False, True)
    for a, b in zip(one.gradients(one), parts.gradients(parts), strict=True):
        assert torch.equal(a, b)


def test_overwriting_takes_the_memory_of_the_inputs(triton_device: torch.device) -> None:
    cos, sin = (table.to(triton_device) for table in tables(3, 4))
    leaf = random(1, 3, 5, 4, dtype=torch.float32).to(triton_device).requires_grad_()
    qkv = leaf * 1.0
    query, key, value = rotary_qkv(qkv, cos, sin, 1, 2, overwrite=True, backend="triton")
    places = [part.data_ptr() for part in qkv.split((1, 2, 2), dim=2)]
    assert [x.data_ptr() for x in (query, key, value)] == places
    assert torch.equal(value, leaf[:, :, 3:]) and not torch.equal(query, leaf[:, :, :1])
    query, key = (leaf[:, :, part] * 1.0 for part in (slice(1), slice(1, 3)))
    got = rotary(query, key, cos, sin, overwrite=True, backend="triton")
    assert [x.data_ptr() for x in got] == [query.data_ptr(), key.data_ptr()]


@pytest.mark.parametrize("parts", [False, True])
def test_overwriting_what_another_backward_needs_raises(triton_device: torch.device, parts: bool) -> None:
    model = Projection("triton", True, parts, between=torch.tanh)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model.gradients(model)


def test_what_must_not_be_overwritten_is_not(triton_device: torch.device) -> None:
    cos, sin = (table.to(triton_device) for table in tables(3, 4))
    leaf = random(1, 3, 2, 4, dtype=torch.float32).to(triton_device).requires_grad_()
    copies = random(1, 3, 1, 4, dtype=torch.float32).to(triton_device).expand(1, 3, 2, 4)
    for query in (leaf, copies, (leaf * 1.0)[:, :, :1]):
        before, other = query.detach().clone(), torch.ones_like(leaf)
        got = rotary(query, other, cos, sin, overwrite=True, backend="triton")[0]
        assert torch.equal(query, before) and not torch.equal(got, before)
    leaf = random(1, 3, 3, 4, dtype=torch.float32).to(triton_device).requires_grad_()
    before = leaf.detach().clone()
    rotary_qkv(leaf, cos, sin, 1, 1, overwrite=True, backend="triton")
    assert torch.equal(leaf, before)


def test_overwriting_in_inference_mode(triton_device: torch.device) -> None:
    cos, sin = (table.to(triton_device) for table in tables(3, 4))
    with torch.inference_mode():
        query, key = (random(1, 3, 2, 4, dtype=torch.float32, seed=s).to(triton_device) for s in (0, 1))
        wanted = rotary(query, key, cos, sin, backend="triton")
        got = rotary(query, key, cos, sin, overwrite=True, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert got[0].data_ptr() == query.data_ptr() and got[1].data_ptr() == key.data_ptr()


def test_autocast_changes_nothing_and_runs_repeat(backend: Any) -> None:
    model = Projection(backend, True, True)
    query, key = (random(2, 5, 3, 8, dtype=torch.float32, seed=s).to(model.cos.device) for s in (0, 1))
    wanted = rotary(query, key, model.cos, model.sin, backend=backend)
    with torch.autocast(query.device.type, dtype=torch.bfloat16):
        got = rotary(query, key, model.cos, model.sin, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("parts", [False, True])
def test_compiles_as_one_graph(backend: Any, parts: bool) -> None:
    model = Projection(backend, True, parts)
    wanted = model.gradients(model)
    got = model.gradients(torch.compile(model, backend="aot_eager", fullgraph=True))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


Q, K, T = torch.ones(2, 3, 4, 6), torch.ones(2, 3, 2, 6), torch.ones(3, 1, 6)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((Q[0], K, T, T), {}, "query: expected .* head_dim"),
        ((torch.ones(2, 3, 4, 5), K, T, T), {}, "query: .*even"),
        ((Q.long(), K, T, T), {}, "query: .*int64"),
        ((Q, K[:, :2], T, T), {}, r"key: expected \[2, 3, H_kv, 6\]"),
        ((Q, K[..., :4], T, T), {}, "key: expected"),
        ((Q, K.half(), T, T), {}, "key: dtype torch.float16"),
        ((Q, K, T[:2], T), {}, "cos: expected"),
        ((Q, K, T.expand(4, 3, 1, 6), T), {}, "cos: expected"),
        ((Q, K, T, T[..., :3]), {}, "sin: expected"),
        ((Q, K, T, T[:, 0]), {}, "sin: expected"),
        ((Q, K, T, T.long()), {}, "sin: .*int64"),
        ((Q, K.to("meta"), T, T), {}, "key: lies on meta"),
        ((Q, K, T.to("meta"), T), {}, "cos: lies on meta"),
        ((Q, K, T, T), {"backend": "cuda"}, "backend: 'cuda'"),
        ((Q.double(), K.double(), T, T), {"backend": "triton"}, "float64"),
        ((Q.bfloat16(), K.bfloat16(), T, T), {"backend": "triton"}, "interpreter computes bfloat16"),
    ],
)
def test_wrong_input_is_refused(arguments: Any, options: Any, message: str) -> None:
    if "backend" in options and torch.cuda.is_available():
        pytest.skip("on a CPU it is for the interpreter to refuse")
    with pytest.raises(ValueError, match=message):
        rotary(*arguments, **options)


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 1), (2, 2), (6, -1), (-2, 3)])
def test_heads_that_do_not_fit_are_refused(heads: int, kv_heads: int) -> None:
    with pytest.raises(ValueError, match=rf"qkv: expected {heads} \+ 2 \* {kv_heads} heads"):
        rotary_qkv(Q, T, T, heads, kv_heads)
    with pytest.raises(ValueError, match=r"qkv: expected \[b, S"):
        rotary_qkv(Q[0], T, T, 2, 1)
