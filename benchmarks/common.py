"""What every benchmark needs: the machine in words, a table, a dated result file, and runs in a process of their own.

A benchmark is started as `python benchmarks/NAME.py [--save]`, so this file is imported as `common`.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import platform
import resource
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "deepspeed",
    "litgpt",
    "tokenizers",
    "sentencepiece",
    "liger-kernel",
    "cut-cross-entropy",
)


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    """Name, memory and driver of every GPU, as nvidia-smi gives them."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    return [f"{line.strip()} (driver)" for line in done.stdout.splitlines() if line.strip()]


def _commit() -> str:
    """Short hash of the checked-out commit, with a note when the tree has changes that it does not hold."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
        changes = subprocess.run(
            ["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return head.stdout.strip() + (" with uncommitted changes" if changes else "")


def machine() -> str:
    """Hardware, versions, commit and date: a Markdown list, the head of every result file."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    lines = [
        f"- CPU: {_cpu_model()}, {cores} cores, {memory:.0f} GiB memory, {platform.system()} {platform.machine()}",
        *(f"- GPU: {gpu}" for gpu in _gpus()),
        f"- versions: {', '.join(versions)}",
        f"- commit: {_commit()}",
        f"- date: {datetime.date.today().isoformat()}",
    ]
    return "\n".join(lines)


def table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """A Markdown table whose columns line up in a terminal: the first column to the left, all others to the right."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if not i else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (width + 1) + ("-" if not i else ":") for i, width in enumerate(widths)) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def save(name: str, text: str) -> Path:
    """Write `text` under the machine's description to results/DATE_NAME.md and return that path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{datetime.date.today().isoformat()}_{name}.md"
    beside = path.with_suffix(".tmp")
    beside.write_text(f"# {name}\n\n{machine()}\n\n{text.strip()}\n", encoding="utf-8")
    os.replace(beside, path)
    return path


class Isolated(NamedTuple):
    """What a run in a process of its own gave back."""

    result: Any
    peak_bytes: int
    """Highest resident memory of that process while the function ran, with everything it had imported."""
    base_bytes: int
    """Resident memory of that process just before the function was called."""


def _status_bytes(field: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def peak_rss() -> int:
    """Highest resident memory of this process so far, or since `reset_peak_rss`, in bytes.

    ru_maxrss, the fallback, also counts what the parent held when it forked: hence /proc first.
    """
    peak = _status_bytes("VmHWM")
    if peak is None:
        scale = 1 if platform.system() == "Darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    return peak


def reset_peak_rss() -> int:
    """Start `peak_rss` anew (Linux) and return the resident memory now, in bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return peak_rss()
    return _status_bytes("VmRSS") or peak_rss()


def _measured(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Isolated:
    base = reset_peak_rss()
    result = function(*args, **kwargs)
    return Isolated(result, peak_rss(), base)


def run_isolated(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Isolated:
    """Call a module-level function in a fresh Python process and measure that process's peak resident memory.

    A fresh process, since the allocator of this one keeps what earlier runs freed. The function should reset the peak
    itself (`reset_peak_rss`) after its set-up where only what follows is to count.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_measured, function, args, kwargs).result()
