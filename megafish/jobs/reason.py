"""Why a run failed, from what its processes and Slurm wrote last."""

from __future__ import annotations

import json
import re
from pathlib import Path

from megafish.run import RunDir

# Bytes at the end of a log that are read.
_TAIL = 1 << 16
# Logs that are read, of those that fell silent first.
_FILES = 64

_OUT_OF_MEMORY = re.compile(r"oom[-_ ]kill|OutOfMemoryError|out of memory|Cannot allocate memory", re.IGNORECASE)
# What a process says when another one has gone: the cause stands in that one's log.
_ECHO = re.compile(
    r"closed by peer|connection (?:reset|refused|closed)|DistBackendError|DistNetworkError|NCCL|ProcessGroup",
    re.IGNORECASE,
)
_SLURM = re.compile(
    r"(?:error: \*\*\* |srun: error: |megafish: exit code \d+: (?=no new checkpoint))(.*?)(?: \*\*\*)?$"
)
# Put before each line of a traceback by torch.distributed.
_RANK = re.compile(r"^\[rank\d+\]: ")
# The first line of a start: what stands before it is of another one.
_OPENING = re.compile(r"^\S+ (?:starts|continues at step \d+): ")
_EXCEPTION = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit)\b.*")


def is_out_of_memory(text: str) -> bool:
    """Whether a reason means that memory ran out, the host's or a GPU's."""
    return _OUT_OF_MEMORY.search(text) is not None


def reason_in_logs(run: RunDir, since: float) -> str | None:
    """The line that explains a failure, from the logs of the processes, then from Slurm's own; None if none does.

    `since`: the last start, in seconds since the epoch. Logs are continued by every start.
    """
    echo = None
    for log in _by_silence(run.logs, "rank_*.log", since):
        line = _complaint(tail(log))
        if line is not None and not _ECHO.search(line):
            return line
        echo = echo or line
    for log in _by_silence(run.logs, "slurm_*.log", since):
        for line in reversed(tail(log)):
            if (found := _SLURM.search(line)) is not None:
                return found[1]
    return echo


def last_attempt(run: RunDir) -> dict[str, object] | None:
    """The last line of logs/attempts.jsonl, which the batch script writes; None where there is none."""
    if not run.attempts_file.is_file():
        return None
    for line in reversed(tail(run.attempts_file)):
        try:
            found = json.loads(line)
        except ValueError:
            continue  # cut off by a kill
        if isinstance(found, dict):
            return found
    return None


def tail(path: Path, size: int = _TAIL) -> list[str]:
    """The last lines of a file, up to `size` bytes; the first of them may be cut off."""
    with open(path, "rb") as file:
        file.seek(0, 2)
        file.seek(max(file.tell() - size, 0))
        return file.read().decode("utf-8", errors="replace").splitlines()


def _by_silence(folder: Path, pattern: str, since: float) -> list[Path]:
    """Logs, the one that fell silent first before the others: its process was the first to fail."""
    logs = [(log.stat().st_mtime, log) for log in folder.glob(pattern)] if folder.is_dir() else []
    return [log for written, log in sorted(logs) if written >= since][:_FILES]


def _complaint(lines: list[str]) -> str | None:
    """The last line that a failing process of ours prints: `error: ...`, or the end of a traceback."""
    for line in (_RANK.sub("", line) for line in reversed(lines)):
        if line.startswith("error: "):
            return line.removeprefix("error: ")
        if _EXCEPTION.match(line):
            return line
        if _OPENING.match(line):
            return None
    return None
