"""RMSNorm, alone and with a residual, against the float64 oracle."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megafish_kernels import rms_norm
from megafish_kernels.backends import uses_triton
from megafish_kernels.reference import reference_rms_norm

EPS = 1e-3
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3}


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# How an input comes out of a contiguous one (its shape, the view of it).
LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "one row": ((1, 7), lambda x: x[0]),
    "width 1": ((5, 1), lambda x: x),
    "odd width": ((3, 5, 33), lambda x: x),
    "many short rows": ((40, 11, 64), lambda x: x),
    "wider than a tile": ((3, 2051), lambda x: x),
    "widest": ((5, 8200), lambda x: x),
    "heads of a projection": ((2, 6, 9, 16), lambda x: x[:, :, 2:7]),
    "heads first": ((2, 6, 5, 16), lambda x: x.transpose(1, 2)),
    "columns of a matrix": ((33, 6), lambda x: x.T),
    "one row for all": ((1, 1, 12), lambda x: x.expand(3, 4, 12)),
    "empty": ((0, 8), lambda x: x),
}


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> Any:
    if request.param == "triton":
        request.getfixturevalue("triton_device")
    return request.param


def device_of(backend: str) -> torch.device:
    return torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")


def close(actual: Tensor | None, expected: Tensor, tolerance: float) -> None:
    assert actual is not None
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("added", [False, True])
def test_values_and_gradients_equal_the_oracle(backend: Any, layout: str, dtype: torch.dtype, added: bool) -> None:
    shape, view = LAYOUTS[layout]
    device = device_of(backend)
    base, other = (random(*shape, dtype=dtype, seed=seed).to(device).requires_grad_() for seed in (0, 1))
    x, residual = view(base), view(other) if added else None
    weight = random(x.shape[-1], dtype=dtype, seed=2).to(device).requires_grad_()
    upstream = [random(*x.shape, dtype=dtype, seed=seed).to(device) for seed in (3, 4)]

    if residual is None:
        y, total = rms_norm(x, weight, EPS, backend=backend), x
        objective = (y * upstream[0]).sum()
    else:
        y, total = rms_norm(x, weight, EPS, residual=residual, backend=backend)
        objective = (y * upstream[0]).sum() + (total * upstream[1]).sum()
        assert total.dtype == dtype
    assert y.dtype == dtype and y.shape == x.shape
    inputs = (base, other, weight) if added else (base, weight)
    got = torch.autograd.grad(objective, inputs)

    wide = [tensor.detach().cpu().double().requires_grad_() for tensor in inputs]
    wanted_y, wanted_total = reference_rms_norm(view(wide[0]), wide[-1], EPS, residual=view(wide[1]) if added else None)
    objective = (wanted_y * upstream[0].cpu().double()).sum()
    if added:
        objective = objective + (wanted_total * upstream[1].cpu().double()).sum()
    close(y, wanted_y.detach(), TOLERANCE[dtype])
    close(total, wanted_total.detach(), TOLERANCE[dtype])
    for actual, expected in zip(got, torch.autograd.grad(objective, wide), strict=True):
        close(actual, expected, TOLERANCE[dtype])


def test_mixed_dtypes_add_up_in_the_wider(backend: Any) -> None:
    device = device_of(backend)
    x = random(4, 24, dtype=torch.float16).to(device).requires_grad_()
    residual = random(4, 24, dtype=torch.float32, seed=1).to(device).requires_grad_()
    weight = random(24, dtype=torch.float32, seed=2).to(device).requires_grad_()
    y, total = rms_norm(x, weight, EPS, residual=residual, backend=backend)
    assert y.dtype == total.dtype == torch.float32
    wanted, _ = reference_rms_norm(x.detach().cpu(), weight.detach().cpu(), EPS, residual=residual.detach().cpu())
    close(y.detach(), wanted, 1e-5)
    y.sum().backward()
    assert (x.grad is not None and x.grad.dtype == torch.float16) and weight.grad is not None
    alone = rms_norm(x, weight, EPS, backend=backend)
    assert alone.dtype == torch.float16


def test_gradient_of_each_result_alone_and_of_each_input_alone(backend: Any) -> None:
    device = device_of(backend)
    x, residual = (random(3, 8, dtype=torch.float32, seed=seed).to(device).requires_grad_() for seed in (0, 1))
    weight = random(8, dtype=torch.float32, seed=2).to(device).requires_grad_()
    y, total = rms_norm(x, weight, EPS, residual=residual, backend=backend)
    of_total = torch.autograd.grad(total.sum(), (x, residual), retain_graph=True)
    assert all(torch.equal(gradient, torch.ones_like(x)) for gradient in of_total)
    every = torch.autograd.grad(y.sum(), (x, residual, weight), retain_graph=True)
    for index, tensor in enumerate((x, residual, weight)):
        fixed = [t if i == index else t.detach() for i, t in enumerate((x, residual, weight))]
        y, _ = rms_norm(fixed[0], fixed[2], EPS, residual=fixed[1], backend=backend)
        # A kernel of its own for what is asked for: on a GPU it may fuse other products and sums.
        rounding = 0.0 if device.type == "cpu" else 1e-6
        torch.testing.assert_close(torch.autograd.grad(y.sum(), tensor)[0], every[index], rtol=rounding, atol=rounding)


@pytest.mark.parametrize("added", [False, True])
def test_two_runs_have_the_same_bits(backend: Any, added: bool) -> None:
    def run() -> list[Tensor]:
        x, residual = (random(500, 48, dtype=torch.float32, seed=s).to(device).requires_grad_() for s in (0, 1))
        weight = random(48, dtype=torch.float32, seed=2).to(device).requires_grad_()
        if added:
            y, total = rms_norm(x, weight, EPS, residual=residual, backend=backend)
            return [y, total, *torch.autograd.grad((y * y).sum() + total.sum(), (x, residual, weight))]
        y = rms_norm(x, weight, EPS, backend=backend)
        return [y, *torch.autograd.grad((y * y).sum(), (x, weight))]

    device = device_of(backend)
    assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


def test_gradcheck() -> None:
    x, residual = (random(2, 3, 5, seed=seed).requires_grad_() for seed in (0, 1))
    weight = random(5, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 0.1), (x, weight))
    assert torch.autograd.gradcheck(lambda x, w, r: rms_norm(x, w, 0.1, residual=r), (x, weight, residual))


def test_equals_torch() -> None:
    x, weight = random(4, 7, 33), random(33, seed=1)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), F.rms_norm(x, (33,), weight, 1e-5))
    low = rms_norm(x.bfloat16(), weight.bfloat16(), 1e-5)
    assert low.dtype == torch.bfloat16
    want = F.rms_norm(x.bfloat16().double(), (33,), weight.bfloat16().double(), 1e-5)
    torch.testing.assert_close(low.double(), want, rtol=2**-8, atol=0.0)  # one rounding


def test_autocast_changes_nothing(backend: Any) -> None:
    device = device_of(backend)

    def run() -> list[Tensor]:
        x, weight = (random(*s, dtype=torch.float32).to(device).requires_grad_() for s in ((9, 40), (40,)))
        y, total = rms_norm(x, weight, EPS, residual=x, backend=backend)
        return [y, *torch.autograd.grad((y * y).sum() + total.sum(), (x, weight))]

    wanted = run()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = run()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_checkpointed(backend: Any) -> None:
    device = device_of(backend)
    x, weight = (random(*s, dtype=torch.float32).to(device).requires_grad_() for s in ((9, 40), (40,)))

    def block(x: Tensor) -> Tensor:
        y, total = rms_norm(x.sin(), weight, EPS, residual=x, backend=backend)
        return y * total

    wanted = torch.autograd.grad(block(x).sum(), (x, weight))
    got = torch.autograd.grad(checkpoint(block, x, use_reentrant=False).sum(), (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.filterwarnings("error::UserWarning")
def test_compiles_as_one_graph(backend: Any) -> None:
    device = device_of(backend)
    x, residual = (random(3, 4, 16, dtype=torch.float32, seed=seed).to(device).requires_grad_() for seed in (0, 1))
    weight = random(16, dtype=torch.float32, seed=2).to(device).requires_grad_()

    def step(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        y, total = rms_norm(x, weight, EPS, residual=residual, backend=backend)
        return rms_norm(y, weight.detach(), EPS, backend=backend) * total

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    wanted, got = step(x, weight, residual), compiled(x, weight, residual)
    torch.testing.assert_close(got, wanted)
    for a, b in zip(*(torch.autograd.grad(o.sum(), (x, weight, residual)) for o in (got, wanted)), strict=True):
        torch.testing.assert_close(a, b)


def test_auto_stays_with_torch_on_a_cpu() -> None:
    y = rms_norm(torch.ones(2, 4, requires_grad=True), torch.ones(4), EPS)
    assert y.grad_fn is not None and "Torch" in y.grad_fn.name()


def test_triton_without_its_interpreter_is_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="cannot run on cpu"):
        rms_norm(torch.ones(2, 4), torch.ones(4), EPS, backend="triton")


def test_amd_gpus_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch calls them cuda as well; the tiles and the shared memory that they need are NVIDIA's."""
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    gpu = torch.device("cuda")
    assert uses_triton("auto", gpu)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not uses_triton("auto", gpu)
    with pytest.raises(ValueError, match="needs the triton package and an NVIDIA GPU"):
        uses_triton("triton", gpu)


def test_importing_the_package_does_not_import_triton() -> None:
    check = "import sys, torch; n = 'triton' in sys.modules; import megafish_kernels; print(n, 'triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    before, after = done.stdout.split()
    assert before == after


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.tensor(1.0), torch.ones(1), 1.0), {}, r"x: .*got torch.float32 \(\)"),
        ((torch.ones(2, 4).long(), torch.ones(4), 1.0), {}, "x: .*int64"),
        ((torch.ones(2, 4), torch.ones(3), 1.0), {}, r"weight: expected \[4\]"),
        ((torch.ones(2, 4), torch.ones(4).long(), 1.0), {}, "weight: .*int64"),
        ((torch.ones(2, 4), torch.ones(4, device="meta"), 1.0), {}, "weight: lies on meta"),
        ((torch.ones(2, 4), torch.ones(4), -1.0), {}, "eps: -1.0"),
        ((torch.ones(2, 4), torch.ones(4), float("nan")), {}, "eps: nan"),
        ((torch.ones(2, 4), torch.ones(4), 1.0), {"residual": torch.ones(1, 4)}, r"residual: .*\(1, 4\)"),
        ((torch.ones(2, 4), torch.ones(4), 1.0), {"residual": torch.ones(2, 4).long()}, "residual: .*int64"),
        ((torch.ones(2, 4), torch.ones(4), 1.0), {"residual": torch.ones(2, 4, device="meta")}, "residual: lies on"),
        ((torch.ones(2, 4), torch.ones(4), 1.0), {"backend": "cuda"}, "backend: 'cuda'"),
        ((torch.ones(2, 4).double(), torch.ones(4), 1.0), {"backend": "triton"}, "float64"),
        (
            (torch.ones(2, 4).half(), torch.ones(4).bfloat16(), 1.0),
            {"backend": "triton"},
            "interpreter computes bfloat16",
        ),
        ((torch.ones(1, 32769), torch.ones(32769), 1.0), {"backend": "triton"}, "at most 32768"),
    ],
)
def test_wrong_input_is_refused(arguments: Any, options: Any, message: str) -> None:
    if "backend" in options and torch.cuda.is_available():
        pytest.skip("on a CPU it is for the interpreter to refuse")
    with pytest.raises(ValueError, match=message):
        rms_norm(*arguments, **options)
