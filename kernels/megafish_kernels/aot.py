"""Static facts of Triton kernels: what the compiler makes of them for a GPU that need not be there.

`triton_runtime.record` writes down how kernels would be started; here each start is compiled to a cubin, and what the
cubin and its PTX say is read: registers, spills, shared memory, how many programs an SM holds, which tensor-core and
memory instructions were chosen. None of this is a time. Needs triton, which brings NVIDIA's assembler and cuobjdump.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from megafish_kernels.triton_runtime import Launch, installed, interpreted

WARP = 32
RESERVED_SHARED = 1024
"""Bytes of shared memory that the system keeps of every block, compute capability 8.0 and later (CUDA C++ Programming
Guide, "Compute Capabilities")."""


class Limits(NamedTuple):
    """What one SM has (CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability")."""

    shared_block: int
    """Largest shared memory of one block, in bytes."""
    shared_sm: int
    registers: int = 65536
    warps: int = 64
    blocks: int = 32
    tensor_columns: int = 0
    """Columns of tensor memory."""


LIMITS = {
    80: Limits(163 * 1024, 164 * 1024),
    90: Limits(227 * 1024, 228 * 1024),
    100: Limits(227 * 1024, 228 * 1024, tensor_columns=512),
}
"""By compute capability times ten: A100, H100 and H200, B200."""

REGISTER_UNIT = 256
"""Registers are given to a warp in this many (cuda_occupancy.h)."""
SHARED_UNIT = 128
"""Shared memory is given to a block in this many bytes."""
PARTITIONS = 4
"""Quarters of an SM, each with its own registers."""


class Occupancy(NamedTuple):
    """How many programs one SM holds at a time: NVIDIA's occupancy calculation (cuda_occupancy.h)."""

    blocks: int
    warps: int
    limited_by: str
    """registers, shared memory, warps, blocks or tensor memory."""


@dataclass(frozen=True)
class KernelFacts:
    """What the compiler made of one kernel with one specialization."""

    kernel: str
    arch: int
    grid: tuple[int, ...]
    constants: dict[str, Any] = field(hash=False)
    """Compile-time arguments by name."""
    types: dict[str, str] = field(hash=False)
    """What each pointer points to, by its argument's name: bf16, fp32, i64 and so on."""
    warps: int
    """Of one program, with those that the compiler added for itself."""
    stages: int
    registers: int
    """Per thread; 255 is the most there is."""
    stack_bytes: int
    """Local memory per thread: spilled registers and arrays that are indexed at run time."""
    spill_bytes: int
    """Bytes of spill stores per thread, as the assembler counts them."""
    shared_dynamic: int
    shared_static: int
    """Bytes per program, without what the system reserves."""
    tensor_columns: int
    """Columns of tensor memory (sm_100)."""
    occupancy: Occupancy
    tensor_ops: dict[str, int] = field(hash=False)
    """Tensor-core instructions in the PTX: mma.sync, wgmma, tcgen05."""
    loads: int
    """Load instructions on global memory, asynchronous copies included."""
    wide_loads: int
    """Those of 128 bits or more per thread, or by the tensor memory accelerator."""
    stores: int
    wide_stores: int
    barriers: int
    atomics: int
    code_bytes: int
    seconds: float = 0.0
    """Compile time; near 0 from triton's cache."""

    @property
    def shared(self) -> int:
        """Shared memory of one program, in bytes."""
        return self.shared_dynamic + self.shared_static


def check() -> None:
    """Whether anything can be compiled here.

    Raises:
        RuntimeError: triton is not installed, or TRITON_INTERPRET=1 turns every kernel into Python.
    """
    if not installed():
        raise RuntimeError("triton is not installed: pip install 'triton>=3.7' (no GPU is needed to compile)")
    if interpreted():
        raise RuntimeError("kernels cannot be compiled while TRITON_INTERPRET=1 is set: unset it")


def compile(launch: Launch, arch: int) -> KernelFacts:
    """Compile one recorded start of a kernel and read its facts.

    Args:
        launch: from `triton_runtime.record(arch)`; one recorded for another architecture has other options.
        arch: a key of LIMITS.

    Raises:
        RuntimeError: triton is missing or interprets, or it cannot compile the kernel.
        ValueError: LIMITS does not know the architecture.
    """
    check()
    if arch not in LIMITS:
        raise ValueError(f"arch: {arch} is not one of {', '.join(map(str, LIMITS))}")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    begin = time.perf_counter()
    source = ASTSource(launch.kernel, launch.signature, launch.constexprs, launch.attrs)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, WARP), options=launch.options)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RuntimeError(f"{launch.name} does not compile for sm_{arch}: {lines[-1]}") from error
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    metadata = compiled.metadata
    usage = _resource_usage(cubin)
    # From compute capability 9.0 on, the assembler counts the system's part among the static shared memory.
    static = max(0, usage["SHARED"] - (RESERVED_SHARED if arch >= 90 else 0))
    threads = re.search(r"^\.(?:req|max)ntid (\d+)", ptx, re.MULTILINE)
    warps = int(threads[1]) // WARP if threads else metadata.num_warps
    names = list(launch.signature)
    columns = getattr(metadata, "tmem_size", 0) or 0
    return KernelFacts(
        kernel=launch.name,
        arch=arch,
        grid=launch.grid,
        constants={names[path[0]]: value for path, value in launch.constexprs.items() if len(path) == 1},
        types={name: kind.lstrip("*") for name, kind in launch.signature.items() if kind.startswith("*")},
        warps=warps,
        stages=metadata.num_stages,
        registers=usage["REG"],
        stack_bytes=usage["STACK"],
        # Without a stack there is nothing that could have been spilled to it.
        spill_bytes=_spills(ptx, arch) if usage["STACK"] else 0,
        shared_dynamic=metadata.shared,
        shared_static=static,
        tensor_columns=columns,
        occupancy=occupancy(arch, usage["REG"], metadata.shared + static, warps, columns),
        **instructions(ptx),
        code_bytes=_code_bytes(cubin, metadata.name),
        seconds=time.perf_counter() - begin,
    )


def occupancy(arch: int, registers: int, shared: int, warps: int, tensor_columns: int = 0) -> Occupancy:
    """Programs that fit on one SM at a time; 0 blocks when not even one does.

    Args:
        arch: a key of LIMITS.
        registers: per thread.
        shared: bytes per program, without the system's part.
        warps: per program.
        tensor_columns: of tensor memory, per program.
    """
    limits = LIMITS[arch]
    per_warp = _round_up(max(registers, 1) * WARP, REGISTER_UNIT)
    fitting_warps = PARTITIONS * (limits.registers // PARTITIONS // per_warp)
    per_block = _round_up(shared + RESERVED_SHARED, SHARED_UNIT)
    bounds = {
        "registers": fitting_warps // warps,
        "shared memory": limits.shared_sm // per_block if shared <= limits.shared_block else 0,
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
    }
    if per_warp * _round_up(warps, PARTITIONS) > limits.registers:
        bounds["registers"] = 0  # The hardware checks a block as if its warps were dealt evenly.
    if tensor_columns:
        bounds["tensor memory"] = limits.tensor_columns // tensor_columns
    limited_by = min(bounds, key=lambda name: bounds[name])
    return Occupancy(bounds[limited_by], bounds[limited_by] * warps, limited_by)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


_OPCODE = re.compile(r"^\s*(?:@!?%?\w+\s+)?([a-z][\w.:]*\.[\w.:]+)(.*)$", re.MULTILINE)
_WIDTH = re.compile(r"(?:\.v(\d))?\.[bfsu](\d+)$")


def instructions(ptx: str) -> dict[str, Any]:
    """Counts of instructions in a kernel's PTX, each once wherever it stands: a loop's body is not multiplied."""
    counts: Counter[str] = Counter()
    tensor: Counter[str] = Counter()
    for opcode, operands in _OPCODE.findall(ptx):
        kind = opcode.split(".")[0]
        if opcode.startswith("mma.sync"):
            tensor["mma.sync"] += 1
        elif opcode.startswith("wgmma.mma_async"):
            tensor["wgmma"] += 1
        elif opcode.startswith("tcgen05.mma"):
            tensor["tcgen05"] += 1
        elif opcode.startswith("cp.async.bulk"):
            # Towards global memory the order of the spaces is the other way round: .global.shared.
            if ".global" in opcode:
                side = "stores" if re.search(r"\.global\.shared", opcode) else "loads"
                counts[side] += 1
                counts[f"wide_{side}"] += 1
        elif opcode.startswith(("cp.async.cg.shared", "cp.async.ca.shared")):
            size = re.search(r"\]\s*,\s*(0x[0-9a-fA-F]+|\d+)", operands)
            counts["loads"] += 1
            counts["wide_loads"] += size is not None and int(size[1], 0) >= 16
        elif kind in ("ld", "st") and ".global" in opcode:
            side = "loads" if kind == "ld" else "stores"
            width = _WIDTH.search(opcode)
            counts[side] += 1
            counts[f"wide_{side}"] += width is not None and int(width[1] or 1) * int(width[2]) >= 128
        elif kind in ("bar", "barrier") and ".warp" not in opcode:
            counts["barriers"] += 1
        elif kind in ("atom", "red") and ".shared" not in opcode:
            counts["atomics"] += 1
    names = ("loads", "wide_loads", "stores", "wide_stores", "barriers", "atomics")
    return {"tensor_ops": dict(tensor), **{name: int(counts[name]) for name in names}}


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK and SHARED of the one kernel in a cubin, by the cuobjdump that triton brings."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [line for line in text.splitlines() if "REG:" in line]
    if len(lines) != 1:
        raise RuntimeError(f"cuobjdump shows {len(lines)} kernels in a cubin instead of one: {text.strip()!r}")
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED):(\d+)", lines[0])}


def _spills(ptx: str, arch: int) -> int:
    """Bytes of spill stores, by the assembler that triton uses for this architecture."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx, encoding="utf-8")
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={target[1]}", str(path), "-o", os.devnull]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(int(size) for size in re.findall(r"(\d+) bytes spill stores", text))


def _code_bytes(cubin: bytes, kernel: str) -> int:
    """Size of the kernel's section in the cubin, an ELF file of 64 bits."""

    def number(offset: int, size: int) -> int:
        return int.from_bytes(cubin[offset : offset + size], "little")

    table, entry, count, names_index = number(40, 8), number(58, 2), number(60, 2), number(62, 2)
    names = number(table + names_index * entry + 24, 8)
    for section in range(table, table + count * entry, entry):
        start = names + number(section, 4)
        if cubin[start : cubin.index(b"\0", start)].decode() == f".text.{kernel}":
            return number(section + 32, 8)
    raise RuntimeError(f"the cubin has no section .text.{kernel}")


_queue: list[tuple[Launch, int]] = []


def _compile_queued(position: int) -> KernelFacts:
    return compile(*_queue[position])


def identity(launch: Launch, arch: int) -> str:
    """Equal for two starts that run the same compiled code."""
    kernel = f"{launch.kernel.fn.__module__}.{launch.name}"
    return repr((arch, kernel, launch.signature, launch.constexprs, launch.attrs, launch.options))


def compile_all(
    launches: Sequence[tuple[Launch, int]], jobs: int | None = None, progress: bool = False
) -> list[KernelFacts]:
    """The facts of many (launch, arch), in their order; equal ones are compiled once, several at a time.

    Args:
        launches: pairs as `compile` takes them.
        jobs: processes; None for one a core.
        progress: write a line to stderr for every kernel.
    """
    check()
    queue: dict[str, tuple[Launch, int]] = {}
    for launch, arch in launches:
        queue.setdefault(identity(launch, arch), (launch, arch))
    jobs = min(len(queue), jobs or _cores())
    done: dict[str, KernelFacts] = {}

    def note(key: str, facts: KernelFacts) -> None:
        done[key] = facts
        if progress:
            line = f"[{len(done)}/{len(queue)}] {facts.kernel} sm_{facts.arch} {facts.seconds:.1f} s"
            print(line, file=sys.stderr, flush=True)

    if jobs <= 1:
        for key, (launch, arch) in queue.items():
            note(key, compile(launch, arch))
    else:
        # Kernels cannot be pickled: forked processes find them where they are.
        _queue[:] = queue.values()
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(jobs, mp_context=context) as pool:
            futures = {pool.submit(_compile_queued, position): key for position, key in enumerate(queue)}
            for future in as_completed(futures):
                note(futures[future], future.result())
    return [replace(done[identity(launch, arch)], grid=launch.grid) for launch, arch in launches]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def violations(facts: KernelFacts, product: bool = False) -> list[str]:
    """What a shipped kernel must not do, in one line each: spill, exceed the shared memory, multiply without tensor
    cores.

    Args:
        facts: of one kernel.
        product: its work is a matrix product that tensor cores can do.
    """
    where = f"{facts.kernel} sm_{facts.arch}"
    found = []
    if facts.stack_bytes:
        found.append(f"{where}: {facts.stack_bytes} B of local memory a thread, {facts.spill_bytes} B of it spilled")
    limit = LIMITS[facts.arch].shared_block
    if facts.shared > limit:
        found.append(f"{where}: {facts.shared} B of shared memory, the limit is {limit}")
    if facts.occupancy.blocks == 0:
        found.append(f"{where}: not one program fits on an SM, for want of {facts.occupancy.limited_by}")
    if product and not facts.tensor_ops:
        found.append(f"{where}: a product without a tensor-core instruction")
    return found
