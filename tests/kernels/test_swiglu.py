"""SwiGLU against the float64 oracle, in its own memory and in that of its input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megafish_kernels import swiglu
from megafish_kernels.reference import reference_swiglu

TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3}


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> Any:
    if request.param == "triton":
        request.getfixturevalue("triton_device")
    return request.param


def device_of(backend: str) -> torch.device:
    return torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")


LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "one row": ((6,), lambda x: x),
    "width 1": ((5, 2), lambda x: x),
    "odd width": ((2, 3, 66), lambda x: x),
    "several blocks": ((3, 2 * 1027), lambda x: x),
    "every other row": ((6, 5, 32), lambda x: x[::2, 1:3]),
    "columns of a matrix": ((10, 7), lambda x: x.T[:, :8]),
    "one row for all": ((1, 12), lambda x: x.expand(3, 4, 12)),
    "no rows": ((0, 8), lambda x: x),
    "no columns": ((3, 0), lambda x: x),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_value_and_gradient_equal_the_oracle(backend: Any, layout: str, dtype: torch.dtype) -> None:
    shape, view = LAYOUTS[layout]
    base = random(*shape, dtype=dtype).mul(3).to(device_of(backend)).requires_grad_()
    got = swiglu(view(base), backend=backend)
    upstream = random(*got.shape, dtype=dtype, seed=1).to(base.device)
    (gradient,) = torch.autograd.grad(got, base, upstream)
    assert got.dtype == gradient.dtype == dtype

    wide = base.detach().cpu().double().requires_grad_()
    wanted = reference_swiglu(view(wide))
    (expected,) = torch.autograd.grad(wanted, wide, upstream.cpu().double())
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got.detach().cpu().double(), wanted.detach(), rtol=tolerance, atol=4 * tolerance)
    torch.testing.assert_close(gradient.cpu().double(), expected, rtol=tolerance, atol=20 * tolerance)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # to infinity, as on a GPU
def test_far_from_zero(backend: Any) -> None:
    gate = torch.tensor([[-1000.0, -90.0, 90.0, 1000.0]])
    x = torch.cat((gate, torch.ones_like(gate)), -1).to(device_of(backend)).requires_grad_()
    y = swiglu(x, backend=backend)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(y.detach().cpu(), gate.clamp(min=0), rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(x.grad[:, :4].cpu(), (gate > 0).float(), rtol=1e-6, atol=1e-30)


def test_gradcheck_and_value() -> None:
    x = random(2, 3, 8).requires_grad_()
    assert torch.autograd.gradcheck(swiglu, (x,))
    torch.testing.assert_close(swiglu(x), F.silu(x[..., :4]) * x[..., 4:])


class FeedForward(torch.nn.Module):
    def __init__(self, backend: Any, overwrite: bool) -> None:
        super().__init__()
        device = device_of(backend)
        self.up = torch.nn.Parameter(random(2 * 24, 12, dtype=torch.float32, seed=3).to(device))
        self.down = torch.nn.Parameter(random(12, 24, dtype=torch.float32, seed=4).to(device))
        self.x = random(2, 5, 12, dtype=torch.float32, seed=5).to(device).requires_grad_()
        self.backend, self.overwrite = backend, overwrite

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x @ self.up.T, overwrite=self.overwrite, backend=self.backend) @ self.down.T

    def gradients(self, function: Callable[[Tensor], Tensor], **options: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(self.x).square().sum(), (self.x, self.up, self.down), **options)


def test_overwriting_changes_nothing_else(backend: Any) -> None:
    kept, overwritten = FeedForward(backend, False), FeedForward(backend, True)
    wanted = kept.gradients(kept)
    for got in (
        kept.gradients(kept),
        overwritten.gradients(overwritten),
        overwritten.gradients(lambda x: checkpoint(overwritten, x, use_reentrant=False)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_overwriting_takes_the_memory_of_the_input(triton_device: torch.device) -> None:
    leaf = random(4, 6, dtype=torch.float32).to(triton_device).requires_grad_()
    seen: list[Tensor] = []
    gate_up = leaf * 1.0
    gate_up.register_hook(seen.append)
    before = leaf.detach().clone()
    swiglu(gate_up, overwrite=True, backend="triton").sum().backward()
    assert seen[0].data_ptr() == gate_up.data_ptr() and torch.equal(gate_up, seen[0])
    assert leaf.grad is not None
    swiglu(leaf, overwrite=True, backend="triton").sum().backward()
    assert torch.equal(leaf, before)


def test_a_second_backward_after_overwriting_raises(triton_device: torch.device) -> None:
    x = random(4, 6, dtype=torch.float32).to(triton_device).requires_grad_()
    y = swiglu(x * 1.0, overwrite=True, backend="triton").sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_autocast_changes_nothing(backend: Any) -> None:
    x = random(4, 6, dtype=torch.float32).to(device_of(backend))
    wanted = swiglu(x, backend=backend)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        assert torch.equal(swiglu(x, backend=backend), wanted)


@pytest.mark.filterwarnings("error::UserWarning")
def test_compiles_as_one_graph(backend: Any) -> None:
    model = FeedForward(backend, True)
    wanted = model.gradients(model)
    got = model.gradients(torch.compile(model, backend="aot_eager", fullgraph=True))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.tensor(1.0), {}, r"gate_up: .*\(\)"),
        (torch.ones(2, 5), {}, r"gate_up: .*\(2, 5\)"),
        (torch.ones(2, 4).long(), {}, "gate_up: .*int64"),
        (torch.ones(2, 4), {"backend": "cuda"}, "backend: 'cuda'"),
        (torch.ones(2, 4).double(), {"backend": "triton"}, "float64"),
        (torch.ones(2, 4).bfloat16(), {"backend": "triton"}, "interpreter computes bfloat16"),
        (torch.ones(2, 4, device="meta"), {"backend": "triton"}, "cannot run on meta"),
    ],
)
def test_wrong_input_is_refused(x: Tensor, options: Any, message: str) -> None:
    if "backend" in options and torch.cuda.is_available():
        pytest.skip("on a CPU it is for the interpreter to refuse")
    with pytest.raises(ValueError, match=message):
        swiglu(x, **options)
