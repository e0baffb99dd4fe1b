"""What torch says of the machine, and what the model would run on. Asked for in a process of its own: torch may be
missing or broken, and a GPU's driver may crash."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from megafish.doctor.child import ask

_SECONDS = 60


@dataclass(frozen=True)
class Torch:
    """What torch says."""

    version: str = ""
    cuda: str | None = None
    """CUDA version that torch was built for."""
    nccl: str | None = None
    gloo: bool = False
    gpus: tuple[tuple[str, int, int, int], ...] = ()
    """(name, bytes, compute capability's two numbers)."""
    attention: str = ""
    """What computes the model's attention here."""
    kernels: str = ""
    """What computes the loss and the element-wise operators here: triton or torch."""
    error: str | None = None
    """Why nothing else, or not all of it, is known."""


def look() -> Torch:
    """Ask torch; never raises."""
    answer = ask("from megafish.doctor.probe import main; main()", _SECONDS)
    if answer.failure is not None:
        return Torch(error=answer.failure)
    try:
        found: dict[str, Any] = json.loads(answer.output.splitlines()[-1])
    except (IndexError, ValueError):
        return Torch(error="torch says nothing")
    return Torch(**{**found, "gpus": tuple(map(tuple, found["gpus"]))})


def main() -> None:
    """Print what torch says as JSON, in the last line."""
    import torch
    from torch import distributed

    version, built = str(torch.__version__), torch.version.cuda
    together = distributed.is_available()
    gloo = together and distributed.is_gloo_available()
    nccl, gpus, attention, kernels, error = None, [], "", "", None
    try:
        if together and distributed.is_nccl_available():
            nccl = ".".join(map(str, torch.cuda.nccl.version()))
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            gpus.append((gpu.name, gpu.total_memory, gpu.major, gpu.minor))
        attention, kernels = _model_parts(torch.device("cuda" if gpus else "cpu"))
    except Exception as problem:  # a driver that does not fit, a GPU in exclusive use: torch itself is well
        error = f"{type(problem).__name__}: {' '.join(str(problem).split())}"
    print(json.dumps(asdict(Torch(version, built, nccl, gloo, tuple(gpus), attention, kernels, error))))


def _model_parts(device: Any) -> tuple[str, str]:
    """(attention, kernels) that the model takes on this device, asked of the model's own code."""
    import torch

    from megafish.model.attention import layout
    from megafish_kernels.backends import uses_triton

    half = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    documents = torch.tensor([0, 8, 16], dtype=torch.int32, device=device)
    where = layout(
        1,
        16,
        cu_seqlens=documents,
        max_seqlen=8,
        window=None,
        head_dim=64,
        device=device,
        dtype=torch.bfloat16 if half else torch.float32,
    )
    if where.kernel is not None:
        named = getattr(where.kernel, "__qualname__", "")
        attention = "flash-attn" if "flash_attn" in named else "torch's varlen_attn"
    elif where.documents is not None:
        attention = "block attention for packed documents, SDPA for single ones"
    else:
        attention = "SDPA with a mask"
    return attention, "triton" if uses_triton("auto", device) else "torch"
