"""The checks of tests/gpu on what is there, small: on a CPU in Triton's interpreter, which knows no bfloat16."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megafish_kernels.cost import Shape
from megafish_kernels.tiles import LossTiles, Tile, override
from tests.gpu import checks
from tests.gpu.checks import FEATURES, ROWS, problem
from tests.gpu.model_checks import check_decoding, check_model


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
    check_model(torch.device("cpu"), torch.bfloat16, packed, window, tied)


def test_decoding() -> None:
    check_decoding(torch.device("cpu"), torch.float32)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/kernels_gpu.py, with what torch.compile is given in place of what it makes of that."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    module = importlib.import_module("kernels_gpu")
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(module, "find_spec", lambda name: None)  # peers have their own interpreters' gaps
    return module


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("k", [None, 4])
def test_methods_of_the_benchmark_agree(k: int | None, benchmark: Any, triton_device: torch.device) -> None:
    shape = Shape("tiny", 48, 300, 32)
    rows = benchmark.head_rows(shape, k, triton_device, torch.float32, 1, ["torch chunked"])
    assert len(rows) == 8 and rows[0][0] == f"tiny, {k or 'off'}, megafish"
    assert {row[5] for row in rows} == {rows[0][5]}, rows  # the same loss


def test_operators_of_the_benchmark_agree(benchmark: Any, triton_device: torch.device) -> None:
    sizes = benchmark.Sizes(2, 8, 32, 4, 2, 8, 24, 600)
    for name, make in benchmark.OPERATORS.items():
        rows = benchmark.rows_of(name, make(sizes, triton_device, torch.float32), triton_device, 1, [], 3)
        assert len(rows) == 3, name
        values = [float(row[5]) for row in rows]
        assert max(values) - min(values) < 2e-4, rows


def test_a_method_that_fails_has_a_row(benchmark: Any) -> None:
    def fails() -> Any:
        raise ValueError("no such thing\nand more")

    def absent() -> Any:
        raise benchmark.NotOffered("not in this version")

    def broken() -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def full() -> Any:
        raise torch.cuda.OutOfMemoryError("all of it")

    cpu = torch.device("cpu")
    rows = benchmark.rows_of("x", {"a": fails, "b": absent, "c": full, "Liger": fails}, cpu, 1, [], 2)
    said = [row[0] for row in rows]
    assert said == ["x, a: ValueError: no such thing", "x, b: not in this version", "x, c: out of memory"]
    assert len(benchmark.missing_peers()) == 2
    with pytest.raises(RuntimeError, match="CUDA error"):
        benchmark.rows_of("x", {"a": broken}, cpu, 1, [], 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_benchmark_without_a_gpu_says_so_in_a_line(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kernels_gpu.py", "--save"])
    with pytest.raises(SystemExit) as end:
        benchmark.main()
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines() == ["kernels_gpu: no CUDA device, and nothing else is timed here"]
