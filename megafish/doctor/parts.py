"""What is installed on this machine, and what of it megafish uses.

Nothing optional is imported here: a package is looked up by its metadata, and imported in a process of its own, so that
a broken one is told instead of taking the doctor with it.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal

State = Literal["ok", "missing", "broken", "unused"]

_IMPORT_SECONDS = 60


@dataclass(frozen=True)
class Part:
    """One line of the report."""

    group: str
    name: str
    state: State
    detail: str
    """Version, and what is used of it."""
    purpose: str
    required: bool = False
    remedy: str | None = None
    """Command that puts it right."""

    @property
    def fault(self) -> bool:
        """Whether megafish cannot work like this."""
        return self.required and self.state in ("missing", "broken")


@dataclass(frozen=True)
class Package:
    """A package that megafish imports somewhere."""

    name: str
    module: str
    purpose: str
    extra: str | None = None
    """The extra of setup.py that brings it; None: megafish requires it."""
    gpu: bool = False
    """Of no use without an NVIDIA GPU."""


PACKAGES = (
    Package("torch", "torch", "everything"),
    Package("deepspeed", "deepspeed", "training (ZeRO, offloading)"),
    Package("numpy", "numpy", "data"),
    Package("sentencepiece", "sentencepiece", "tokenizers"),
    Package("tokenizers", "tokenizers", "tokenizer.json"),
    Package("safetensors", "safetensors", "checkpoints"),
    Package("pyarrow", "pyarrow", "parquet files"),
    Package("zstandard", "zstandard", ".zst files"),
    Package("rouge-score", "rouge_score", "audit: ROUGE-L"),
    Package("matplotlib", "matplotlib", "plots"),
    Package("tensorboard", "tensorboard", "track.tensorboard"),
    Package("triton", "triton", "the loss, mask and element-wise kernels on a GPU", extra="dev"),
    Package("flash-attn", "flash_attn", "attention on a GPU (else torch's varlen_attn)", extra="cuda", gpu=True),
    Package("wandb", "wandb", "track.wandb", extra="wandb"),
    Package("transformers", "transformers", "using an export, and the tests", extra="hf"),
    Package("lm-eval", "lm_eval", "megafish eval", extra="eval"),
)

# What a process of its own finds out about torch, as JSON.
_TORCH = """
import json, torch
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps({
    "version": torch.__version__, "cuda": torch.version.cuda, "threads": torch.get_num_threads(),
    "nccl": torch.distributed.is_nccl_available() and ".".join(map(str, torch.cuda.nccl.version())),
    "gloo": torch.distributed.is_gloo_available(),
    "gpus": [[g.name, g.total_memory, g.major, g.minor] for g in gpus],
}))
"""


@dataclass(frozen=True)
class Torch:
    """What torch says of the machine."""

    version: str = ""
    cuda: str | None = None
    threads: int = 0
    nccl: str | bool = False
    gloo: bool = False
    gpus: tuple[tuple[str, int, int, int], ...] = ()
    """(name, bytes, compute capability's two numbers)."""


def inspect_machine(folder: Path = Path()) -> list[Part]:
    """All parts, required ones first in their group. `folder`: where runs are to be kept."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        asked = pool.submit(_torch)
        states = pool.map(_look_at, PACKAGES)
        torch = asked.result()
        packages = [_package_part(package, *found, torch) for package, found in zip(PACKAGES, states, strict=True)]
    return [*_machine(folder), *_gpu(torch), *packages, *_tools(torch)]


def _torch() -> Torch:
    done = _python("-c", _TORCH)
    if done is None or done.returncode:
        return Torch()
    found = json.loads(done.stdout.splitlines()[-1])
    return Torch(**{**found, "gpus": tuple(map(tuple, found["gpus"]))})


def _python(*arguments: str) -> subprocess.CompletedProcess[str] | None:
    """A call of this interpreter; None where it takes too long."""
    command = [sys.executable, *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return None


def _look_at(package: Package) -> tuple[State, str]:
    """(state, version or what is wrong)."""
    try:
        version = distribution(package.name).version
    except PackageNotFoundError:
        return "missing", ""
    done = _python("-c", f"import {package.module}")
    if done is None:
        return "broken", f"{version}: import takes more than {_IMPORT_SECONDS} s"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"the import ends with code {done.returncode}"]
        return "broken", f"{version}: {lines[-1]}"
    return "ok", version


def _package_part(package: Package, state: State, detail: str, torch: Torch) -> Part:
    required = package.extra is None
    if state == "missing" and package.gpu and not torch.gpus:
        return Part("packages", package.name, "unused", "needs an NVIDIA GPU", package.purpose)
    if package.name == "triton":
        state, detail = _triton_state(state, detail, torch)
    remedy = None
    if state == "missing":
        remedy = _install(package)
    elif state == "broken":
        remedy = f"pip install --force-reinstall --no-deps {package.name}=={detail.split(':')[0]}"
    return Part("packages", package.name, state, detail, package.purpose, required, remedy)


def _triton_state(state: State, detail: str, torch: Torch) -> tuple[State, str]:
    if torch.gpus:
        return state, f"{detail} on the GPU" if state == "ok" else detail
    if state == "missing":
        return "unused", "needs an NVIDIA GPU: torch's own operators serve here"
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    use = "interpreted (TRITON_INTERPRET=1)" if interpreted else "idle without a GPU, torch's own operators serve"
    return state, f"{detail}, {use}" if state == "ok" else detail


def _install(package: Package) -> str:
    if package.name == "flash-attn":
        return "pip install --no-build-isolation 'megafish[cuda]'"
    return "pip install megafish" if package.extra is None else f"pip install 'megafish[{package.extra}]'"


def _machine(folder: Path) -> Iterator[Part]:
    python = platform.python_version()
    fits = sys.version_info >= (3, 10)
    yield Part("machine", "Python", "ok" if fits else "broken", python, "3.10 or later", True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Part("machine", "CPU", "ok", f"{cores} cores, {memory / 2**30:.0f} GiB memory", "")
    free = shutil.disk_usage(folder).free
    low = free < 5 << 30
    yield Part(
        "machine",
        "disk",
        "broken" if low else "ok",
        f"{free / 2**30:.0f} GiB free in {folder.resolve()}",
        "checkpoints: 14 bytes a parameter each (bf16)",
        remedy="keep runs elsewhere: run_dir=FOLDER" if low else None,
    )
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        small = size < 1 << 30
        yield Part(
            "machine",
            "/dev/shm",
            "broken" if small else "ok",
            f"{size / 2**30:.1f} GiB",
            "NCCL between processes of a node",
            remedy="in a container: docker run --shm-size=8g" if small else None,
        )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft != resource.RLIM_INFINITY and soft < 1024
    yield Part(
        "machine",
        "open files",
        "broken" if few else "ok",
        "no limit" if soft == resource.RLIM_INFINITY else f"{soft}",
        "corpora of many sources",
        remedy=f"ulimit -n {4096 if hard == resource.RLIM_INFINITY else min(hard, 4096)}" if few else None,
    )


def _gpu(torch: Torch) -> Iterator[Part]:
    driver = shutil.which("nvidia-smi")
    for index, (name, memory, major, minor) in enumerate(torch.gpus):
        half = "bf16 and FlashAttention" if major >= 8 else "too old for bf16 and FlashAttention: train.precision=fp32"
        detail = f"{name}, {memory / 2**30:.0f} GiB, compute capability {major}.{minor}"
        yield Part("GPU", f"GPU {index}", "ok", detail, half)
    if not torch.gpus and driver and torch.version and not torch.cuda:
        yield Part(
            "GPU",
            "GPU",
            "broken",
            f"a driver is there, but torch {torch.version} is a CPU build",
            "training",
            remedy="pip install --force-reinstall torch (the build for your CUDA version: pytorch.org/get-started)",
        )
    elif not torch.gpus:
        detail = f"none that torch {torch.version or '(missing)'} sees: training runs on the CPU"
        yield Part("GPU", "GPU", "unused", detail, "training")
    else:
        nccl = f"NCCL {torch.nccl}" if torch.nccl else "no NCCL"
        yield Part("GPU", "NCCL", "ok" if torch.nccl else "missing", nccl, "several GPUs", len(torch.gpus) > 1)


def _tools(torch: Torch) -> Iterator[Part]:
    yield Part(
        "processes",
        "gloo",
        "ok" if torch.gloo else "missing",
        "with torch" if torch.gloo else "",
        "training on CPUs, agreement between processes",
        True,
        None if torch.gloo else "pip install --force-reinstall torch",
    )
    compiler, nvcc = shutil.which("g++") or shutil.which("c++"), shutil.which("nvcc")
    yield Part(
        "processes",
        "C++ compiler",
        "ok" if compiler else "unused",
        compiler or "none: nothing that megafish calls by itself needs one",
        "DeepSpeed's own operators, where engine.deepspeed asks for them",
        remedy=None if compiler else "apt-get install g++",
    )
    if torch.gpus:
        yield Part(
            "processes",
            "nvcc",
            "ok" if nvcc else "unused",
            nvcc or "none: needed to build flash-attn from source",
            "building flash-attn",
        )
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        yield Part("processes", "Slurm", "unused", "no sbatch here", "megafish launch slurm")
        return
    try:
        done = subprocess.run([sbatch, "--version"], capture_output=True, text=True, timeout=10, check=False)
        version = done.stdout.strip() if done.returncode == 0 else "sbatch is there"
        answers = subprocess.run(["sinfo", "-h"], capture_output=True, text=True, timeout=10, check=False)
        failed = (answers.stderr.strip().splitlines() or ["sinfo fails"])[-1] if answers.returncode else None
    except (OSError, subprocess.TimeoutExpired) as error:
        version, failed = "sbatch is there", re.sub(r"\s+", " ", str(error))
    yield Part(
        "processes",
        "Slurm",
        "broken" if failed else "ok",
        f"{version}: {failed}" if failed else version,
        "megafish launch slurm",
        remedy="scontrol ping" if failed else None,
    )
