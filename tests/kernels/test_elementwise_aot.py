"""What a GPU would run of RMSNorm, rotary embeddings and SwiGLU, compiled without one: no spills, wide loads.

The launches of Llama shapes are recorded on meta tensors and compiled in a process of their own, since this one may
have set TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megafish_kernels import aot, rms_norm, rotary_qkv, swiglu, triton_runtime

ARCHS = (80, 90)
KERNELS = {"rms_norm_forward", "rms_norm_backward", "rotary_turn", "swiglu_forward", "swiglu_backward"}


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype == torch.bfloat16)


def run_llama_shapes() -> None:
    for width in (2048, 4096):
        rms_norm(meta(2, 4096, width), meta(width), 1e-5).sum().backward()
    for width in (4096, 8192):
        y, total = rms_norm(meta(2, 4096, width), meta(width), 1e-5, residual=meta(2, 4096, width))
        (y.sum() + total.sum()).backward()
    for head_dim in (64, 128):
        heads = meta(2, 4096, 48 * head_dim).unflatten(-1, (48, head_dim))
        rms_norm(heads[:, :, :32], meta(head_dim), 1e-5).sum().backward()
        cos, sin = (meta(4096, 1, head_dim, dtype=torch.float32) for _ in range(2))
        query, key, value = rotary_qkv(heads, cos, sin, 32, 8, overwrite=True)
        (query.sum() + key.sum() + value.sum()).backward()
    for width in (5632, 14336):
        swiglu(meta(2, 4096, 2 * width), overwrite=True).sum().backward()


def facts() -> list[dict[str, Any]]:
    """What the compiler makes of each launch on each architecture."""
    launches = []
    for arch in ARCHS:
        with triton_runtime.record(arch) as recorded:
            run_llama_shapes()
        launches += [(launch, arch) for launch in recorded]
    return [{**asdict(kernel), "violations": aot.violations(kernel)} for kernel in aot.compile_all(launches)]


def test_nothing_spills_and_memory_is_read_in_128_bits(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, __file__], env=environment, stdout=subprocess.PIPE, check=True)
    kernels = json.loads(done.stdout)
    assert {(kernel["kernel"], kernel["arch"]) for kernel in kernels} == {(k, arch) for k in KERNELS for arch in ARCHS}
    for kernel in kernels:
        assert kernel["violations"] == [], kernel
        # Narrow ones beside these: the scales of the rows, the weight of one head, the tables of cosines.
        assert kernel["wide_loads"] >= max(2, kernel["loads"] - 3), kernel
        assert kernel["wide_stores"] >= max(1, kernel["stores"] - 1), kernel
        assert kernel["atomics"] == 0, kernel


if __name__ == "__main__":
    print(json.dumps(facts()))
