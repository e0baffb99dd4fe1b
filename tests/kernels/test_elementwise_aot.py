"""What a GPU would run of RMSNorm, rotary embeddings and SwiGLU, compiled without one: no spills, wide loads.

The launches of Llama shapes are recorded on meta tensors and compiled in a process of their own, since this one may
have set TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megafish_kernels import rms_norm, rotary_qkv, swiglu, triton_runtime

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


def compiled(arch: int) -> list[dict[str, Any]]:
    """Each distinct launch: its kernel, registers and stack a thread, and its instructions on global memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    with triton_runtime.record(arch) as launches:
        run_llama_shapes()
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    found: dict[str, dict[str, Any]] = {}
    for launch in launches:
        kind = f"{launch.name} {launch.signature} {launch.constexprs} {launch.attrs} {launch.options}"
        if kind in found:
            continue
        source = ASTSource(launch.kernel, launch.signature, launch.constexprs, launch.attrs)
        binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            dump = [str(tool), "--dump-resource-usage", file.name]
            usage = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
        access = re.findall(r"\b(ld|st)\.global\S*?(\.v[24])?\.b(\d+)", binary.asm["ptx"])
        found[kind] = {
            "kernel": launch.name,
            "registers": int(registers),
            "stack": int(stack),
            "loads": [int(vector[2:] or 1) * int(bits) for what, vector, bits in access if what == "ld"],
            "stores": [int(vector[2:] or 1) * int(bits) for what, vector, bits in access if what == "st"],
        }
    return list(found.values())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    started = {
        arch: subprocess.Popen([sys.executable, __file__, str(arch)], env=environment, stdout=subprocess.PIPE)
        for arch in (80, 90)
    }
    answers = {arch: process.communicate()[0] for arch, process in started.items()}
    assert all(process.returncode == 0 for process in started.values())
    return {arch: json.loads(answer) for arch, answer in answers.items()}


@pytest.mark.parametrize("arch", [80, 90])
def test_nothing_spills_and_memory_is_read_in_128_bits(results: dict[int, list[dict[str, Any]]], arch: int) -> None:
    kernels = results[arch]
    assert {kernel["kernel"] for kernel in kernels} == KERNELS
    for kernel in kernels:
        assert kernel["stack"] == 0, kernel
        # Beside these: the scales of the rows, the weight of one head, the tables of cosines.
        narrow = [bits for bits in kernel["loads"] if bits < 128]
        assert len(narrow) <= 3 and kernel["loads"].count(128) >= 2, kernel
        assert kernel["stores"].count(128) >= len(kernel["stores"]) - 1, kernel


if __name__ == "__main__":
    print(json.dumps(compiled(int(sys.argv[1]))))
