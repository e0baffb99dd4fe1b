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


def takes_triton(backend: str, *tensors: torch.Tensor, supported: bool = True) -> bool:
    """Whether these tensors, all on one device, are worked on by Triton rather than by torch.

    "auto" takes Triton on CUDA (and on meta tensors while launches are recorded), if the tensors' dtypes and sizes
    (`supported`) allow it. Raises ValueError for "triton" where it cannot run, and for an unknown backend.
    """
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend: {backend!r} is not one of auto, triton, torch")
    device = tensors[0].device
    if backend == "torch" or (backend == "auto" and device.type == "cpu"):
        return False
    unfit = [tensor.dtype for tensor in tensors if tensor.dtype not in TRITON_DTYPES]
    if backend == "auto":
        return supported and not unfit and triton_runtime.runs_on(device)
    if unfit:
        raise ValueError(f'backend: "triton" takes float32, bfloat16 and float16, got {unfit[0]}')
    if not triton_runtime.runs_on(device):
        raise ValueError(
            f'backend: "triton" cannot run on {device}: it needs the triton package and a CUDA device, or a CPU and '
            'TRITON_INTERPRET=1. Take "auto" or "torch"'
        )
    return True


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
