"""How this package's Triton kernels are started: on a GPU, in Triton's interpreter, or only written down.

The one module that decides where kernels run. `launch` starts a kernel; under `record` it notes what would be started
instead, with the specialization that Triton's own binder gives the arguments, so that a machine without a GPU can
compile exactly what a GPU would run (`megafish_kernels.report`). Importing this module does not import triton.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """One start of a kernel, as written down by `record`."""

    name: str
    kernel: Any
    """The triton.JITFunction."""
    grid: tuple[int, ...]
    signature: dict[str, str]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    """Divisibility by 16 of pointers and integers, by position."""
    options: dict[str, Any] = field(hash=False)
    """num_warps, num_stages and what else Triton's backend was given."""


@dataclass
class _Recording:
    arch: int
    launches: list[Launch] = field(default_factory=list)


_recording: _Recording | None = None


# Looked up once, and not by a cached function: torch.compile warns of those.
_installed = importlib.util.find_spec("triton") is not None


def installed() -> bool:
    """Whether triton can be imported (looked up, not imported)."""
    return _installed


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors in the CPU's memory: TRITON_INTERPRET=1 was set before
    the first kernel was defined. Its bfloat16 arithmetic is wrong without a word (Triton 3.5 to 3.9)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def runs_on(device: torch.device) -> bool:
    """Whether Triton kernels can be started on tensors of this device."""
    if not installed():
        return False
    if device.type == "cuda":
        # AMD GPUs call themselves so too: tiles and kernels are made for NVIDIA's, and compiled for no other.
        return torch.version.hip is None and not interpreted()
    return (device.type == "cpu" and interpreted()) or (device.type == "meta" and _recording is not None)


def architecture(device: torch.device) -> int:
    """Compute capability times ten: 80 for an A100, 90 for an H100, 100 for a B200. The interpreter counts as 80."""
    if _recording is not None:
        return _recording.arch
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@contextmanager
def record(arch: int) -> Iterator[list[Launch]]:
    """Within, kernels on meta tensors are written down as for this architecture and not started; yields the list."""
    global _recording
    if interpreted():
        raise RuntimeError("kernels cannot be compiled while TRITON_INTERPRET=1 is set: unset it")
    before, _recording = _recording, _Recording(arch)
    try:
        yield _recording.launches
    finally:
        _recording = before


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Start `kernel` with `grid` programs; `options` are its constexprs by name, num_warps and num_stages.

    A grid with a zero starts nothing.
    """
    if 0 in grid:
        return
    if _recording is not None:
        _recording.launches.append(_written_down(kernel, grid, args, options, _recording.arch))
        return
    # Triton starts kernels on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, torch.Tensor))):
        kernel[grid](*args, **options)


def _written_down(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: Any, arch: int) -> Launch:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", arch, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, extra = binder(*args, **options)
    parsed, signature, constexprs, attrs = kernel._pack_args(backend, extra, bound, specialization, extra)
    return Launch(kernel.__name__, kernel, grid, signature, constexprs, attrs, dict(parsed.__dict__))
