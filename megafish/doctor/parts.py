"""All parts of the report: the machine, its GPUs, the packages, and what starts processes."""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megafish.doctor import probe
from megafish.doctor.packages import PACKAGES, Found, look_at, package_part
from megafish.doctor.part import Part, State
from megafish.doctor.probe import Torch


def inspect_machine(folder: Path = Path()) -> tuple[list[Part], Torch]:
    """All parts, and what torch says. `folder`: where runs are to be kept."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        asked = pool.submit(probe.look)
        found = list(pool.map(look_at, PACKAGES))
        torch = asked.result()
    packages = [package_part(package, one, torch) for package, one in zip(PACKAGES, found, strict=True)]
    deepspeed = next(one for package, one in zip(PACKAGES, found, strict=True) if package.name == "deepspeed")
    return [*_machine(folder), *_gpu(torch), *packages, *_used(torch, deepspeed), *_processes(torch), *_slurm()], torch


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
    for index, (name, memory, major, minor) in enumerate(torch.gpus):
        half = "bf16 and FlashAttention" if major >= 8 else "too old for bf16 and FlashAttention: train.precision=fp32"
        detail = f"{name}, {memory / 2**30:.0f} GiB, compute capability {major}.{minor}"
        yield Part("GPU", f"GPU {index}", "ok", detail, half)
    if torch.gpus or not torch.version:
        return
    there = _listed_gpus()
    if not there:
        detail = f"none that torch {torch.version} sees: training runs on the CPU"
        yield Part("GPU", "GPU", "unused", detail, "training")
    elif not torch.cuda:
        yield Part(
            "GPU",
            "GPU",
            "broken",
            f"the driver lists {there}, but torch {torch.version} is a CPU build",
            "training",
            remedy="pip install --force-reinstall torch (the build for your CUDA version: pytorch.org/get-started)",
        )
    else:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = torch.error or f"torch {torch.version} for CUDA {torch.cuda} sees none"
        yield Part(
            "GPU",
            "GPU",
            "broken",
            f"the driver lists {there}, but {why}" + (f" (CUDA_VISIBLE_DEVICES={visible!r})" if visible == "" else ""),
            "training",
            remedy="unset CUDA_VISIBLE_DEVICES" if visible == "" else "nvidia-smi (its CUDA version must be torch's)",
        )


def _listed_gpus() -> int:
    """GPUs that the driver knows of, whatever torch sees."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    try:
        done = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return len(re.findall(r"^GPU \d+:", done.stdout, re.MULTILINE)) if done.returncode == 0 else 0


def _used(torch: Torch, deepspeed: Found) -> Iterator[Part]:
    if torch.attention:
        yield Part("in use", "attention", "ok", torch.attention, "the model")
        kernels = "Triton kernels" if torch.kernels == "triton" else "torch's operators"
        yield Part("in use", "kernels", "ok", kernels, "the loss and the element-wise operators")
    elif torch.version:
        yield Part("in use", "attention", "broken", torch.error or "not known", "the model")
    if torch.version:
        yield Part("in use", "optimizer", "ok", "torch's AdamW, or Muon", "training")
    if deepspeed.operators:
        detail = ", ".join(f"{name} {how}" for name, how in deepspeed.operators)
        yield Part("in use", "DeepSpeed's operators", "unused", f"not needed: {detail}", "nothing by itself")


def _processes(torch: Torch) -> Iterator[Part]:
    reinstall = "pip install --force-reinstall torch"
    if torch.gpus:
        several = len(torch.gpus) > 1
        state: State = "ok" if torch.nccl else "missing"
        remedy = None if torch.nccl else reinstall
        yield Part("processes", "NCCL", state, torch.nccl or "", "training on several GPUs", several, remedy)
    if torch.version:  # without torch there is nothing to say that its own line does not
        with_gloo: State = "ok" if torch.gloo else "missing"
        purpose = "training on CPUs, agreement between processes"
        yield Part(
            "processes",
            "gloo",
            with_gloo,
            "with torch" if torch.gloo else "",
            purpose,
            True,
            None if torch.gloo else reinstall,
        )
    compiler, nvcc = shutil.which("g++") or shutil.which("c++"), shutil.which("nvcc")
    yield Part(
        "processes",
        "C++ compiler",
        "ok" if compiler else "unused",
        compiler or "none, and none is needed",
        "building DeepSpeed's operators or flash-attn",
    )
    yield Part(
        "processes",
        "nvcc",
        "ok" if nvcc else "unused",
        nvcc or "none, and none is needed",
        "building flash-attn from source",
    )


def _slurm() -> Iterator[Part]:
    sbatch = shutil.which("sbatch")
    purpose = "megafish launch slurm"
    if sbatch is None:
        yield Part("processes", "Slurm", "unused", "no sbatch here", purpose)
        return
    try:
        done = subprocess.run([sbatch, "--version"], capture_output=True, text=True, timeout=10, check=False)
        version = done.stdout.strip() if done.returncode == 0 else "sbatch is there"
        answers = subprocess.run(["sinfo", "-h"], capture_output=True, text=True, timeout=10, check=False)
        failed = (answers.stderr.strip().splitlines() or ["sinfo fails"])[-1] if answers.returncode else None
    except (OSError, subprocess.TimeoutExpired) as error:
        version, failed = "sbatch is there", re.sub(r"\s+", " ", str(error))
    if failed is None:
        yield Part("processes", "Slurm", "ok", version, purpose)
        return
    # The message of a machine that has the programs and no cluster.
    remedy = (
        "export SLURM_CONF=FILE (the cluster's slurm.conf), or work on a login node"
        if "configuration source" in failed
        else "scontrol ping"
    )
    yield Part("processes", "Slurm", "broken", f"{version}: {failed}", purpose, remedy=remedy)
