"""The checks of tests/gpu on what is there, small: on a CPU in Triton's interpreter, which knows no bfloat16."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from megafish_kernels.tiles import LossTiles, Tile, override
from tests.gpu import checks
from tests.gpu.checks import FEATURES, ROWS, problem


@pytest.fixture
def triton_loss(triton_device: torch.device) -> Any:
    """The module, which imports triton."""
    from megafish_kernels import triton_loss

    return triton_loss


@pytest.fixture
def small_tiles() -> Iterator[None]:
    tile = Tile(32, 32, 16, 4, 1)
    with override(LossTiles(tile, tile, tile)):
        yield


# Of lanes that are not stored.
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_loss(rows: str, dtype: torch.dtype, triton_device: torch.device) -> None:
    given = problem(triton_device, dtype, tokens=30, width=24, vocab=50, padding=9)
    checks.check_loss(given, rows=rows)
    checks.check_loss(given, features=FEATURES["all"], rows=rows, logits_bytes=1)
    for reduction in ("sum", "none"):
        checks.check_loss(given, features=FEATURES["all"], rows=rows, reduction=reduction)
    checks.check_main_grad(given, rows, 1)
    checks.check_nothing_kept(given, rows)
    checks.check_same_bits(given, rows, None)
    checks.check_no_waiting(given, rows, None)
    checks.check_graph(given, rows)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_products_of_the_library(
    dtype: torch.dtype, triton_device: torch.device, triton_loss: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the host knows the count, a GPU takes torch's products, with sums wider than the operands. On a CPU torch
    has these for fp32 alone."""

    def product(left: torch.Tensor, right: torch.Tensor, *, out_dtype: torch.dtype, out: torch.Tensor) -> None:
        out.copy_(left.to(out_dtype) @ right.to(out_dtype))

    def added(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, **options: Any) -> None:
        assert total is options["out"] and total.dtype == options["out_dtype"]
        total.add_(left.to(total.dtype) @ right.to(total.dtype))

    if triton_device.type == "cpu":
        monkeypatch.setattr(triton_loss, "interpreted", lambda: False)
        if dtype != torch.float32:
            monkeypatch.setattr(torch, "mm", _wide_or(product, torch.mm))
            monkeypatch.setattr(torch, "addmm", _wide_or(added, torch.addmm))
    given = problem(triton_device, dtype, tokens=30, width=24, vocab=300, padding=9)
    for logits_bytes in (None, 1, 30 * 400 * dtype.itemsize):
        checks.check_loss(given, features=FEATURES["all"], rows="host", logits_bytes=logits_bytes)
        checks.check_main_grad(given, "host", logits_bytes)
    checks.check_graph(given, "host")


def _wide_or(wide: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **options: (wide if "out_dtype" in options else plain)(*args, **options)


@pytest.mark.usefixtures("small_tiles")
def test_the_loss_in_blocks_is_that_of_the_oracle(triton_device: torch.device) -> None:
    given = problem(triton_device, torch.float32, tokens=40, width=24, vocab=70)
    checks.check_large(given, "device", None, last=12)
    whole = checks.exact_in_blocks(given, 12)
    for one, other in zip(whole, checks.exact_in_blocks(given, 12, rows=7, columns=13), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("wrong", ["hidden", "weight", "ids"])
def test_a_wrong_kernel_is_caught(wrong: str, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What looks at a result must fail for a wrong one: here the kernel meets other numbers than the oracle."""
    given = problem(triton_device, torch.float32, tokens=40, width=24, vocab=70)
    true = checks.linear_cross_entropy

    def off(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, **options: object) -> object:
        if wrong == "hidden":
            hidden = hidden * 1.001
        elif wrong == "weight":
            weight = weight.roll(1, 0)
        else:
            targets = torch.where(targets == given.vocab - 1, 0, targets)
        return true(hidden, weight, targets, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(checks, "linear_cross_entropy", off)
    for check in (checks.check_loss, lambda given: checks.check_large(given, "device", None, last=12)):
        with pytest.raises(AssertionError):
            check(dataclasses.replace(given))


@pytest.mark.parametrize("options", checks.MASKS)
def test_mask(options: str, triton_device: torch.device) -> None:
    checks.check_mask(triton_device, 900, 3, checks.MASKS[options])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_elementwise(dtype: torch.dtype, triton_device: torch.device) -> None:
    for flag in (False, True):
        checks.check_norm(triton_device, dtype, 5, 40, flag)
        checks.check_rotary(triton_device, dtype, 5, 3, 1, 8, flag)
    checks.check_swiglu(triton_device, dtype, 5, 24)


@pytest.mark.parametrize(("reduction", "rows"), [("mean", "drop"), ("none", "host")])
def test_compiled(reduction: str, rows: str, triton_device: torch.device) -> None:
    checks.check_compiled(triton_device, torch.float32, "aot_eager", reduction, rows)


@pytest.mark.parametrize(("packed", "window", "tied"), [(False, None, False), (True, 16, True)])
def test_model(packed: bool, window: int | None, tied: bool) -> None:
    checks.check_model(torch.device("cpu"), torch.bfloat16, packed, window, tied)
