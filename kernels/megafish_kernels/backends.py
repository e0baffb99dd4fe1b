"""Which backend the element-wise operators take, and how their Triton kernels look to torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, TypeVar, cast

import torch

from megafish_kernels import triton_runtime

Backend = Literal["auto", "triton", "torch"]

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels read and write; they compute in float32."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


def uses_triton(backend: str, device: torch.device, *, traced: bool = False) -> bool:
    """Whether a function's `backend` means its Triton kernels for tensors of this device.

    "auto" takes them on CUDA (and on meta tensors while launches are recorded), and leaves the CPU to torch, where they
    could only be interpreted. So it does what torch.compile traces, unless the kernels are operators (`traced`): it
    fuses torch's own operations, and cannot look into a launch. Raises ValueError for "triton" where it cannot run, and
    for an unknown backend.
    """
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend: {backend!r} is not one of auto, triton, torch")
    if backend == "auto":
        traceable = traced or not torch.compiler.is_compiling()
        return device.type != "cpu" and traceable and triton_runtime.runs_on(device)
    if backend == "triton" and not triton_runtime.runs_on(device):
        raise ValueError(
            f'backend: "triton" cannot run on {device}: it needs the triton package and an NVIDIA GPU, or a CPU and '
            'TRITON_INTERPRET=1. Take "auto" or "torch"'
        )
    return backend == "triton"


def takes_triton(backend: str, *tensors: torch.Tensor, supported: bool = True) -> bool:
    """`uses_triton` for operators, whose tensors' dtypes and sizes (`supported`) the kernels must know as well."""
    if not uses_triton(backend, tensors[0].device, traced=True):
        return False
    dtypes = [tensor.dtype for tensor in tensors]
    if backend == "triton" and tensors[0].device.type == "cpu" and torch.bfloat16 in dtypes:
        raise ValueError('backend: Triton\'s interpreter computes bfloat16 wrongly; take float32, float16 or "torch"')
    unfit = [dtype for dtype in dtypes if dtype not in TRITON_DTYPES]
    if unfit and backend == "triton":
        raise ValueError(f'backend: "triton" takes float32, bfloat16 and float16, got {unfit[0]}')
    return backend == "triton" or (supported and not unfit)


def compilable(name: str, shapes: Callable[..., Any]) -> Callable[[_Function], _Function]:
    """Decorator: torch.compile takes the function into its graph whole, as the operator megafish::`name`.

    The function allocates its results and changes none of its arguments; `shapes` takes the same arguments and returns
    empty tensors like the results. Without torch.compile it is called as it is, since an operator costs some 30 us more
    on the host at each call.
    """

    def decorate(function: _Function) -> _Function:
        operator = torch.library.custom_op(f"megafish::{name}", function, mutates_args=())
        operator.register_fake(shapes)

        @wraps(function)
        def call(*args: Any) -> Any:
            return operator(*args) if torch.compiler.is_compiling() else function(*args)

        return cast(_Function, call)

    return decorate
