"""A run of several processes on this machine.

Unlike torchrun it keeps the exit codes, hands on every signal that a run answers, and gives a run the time it needs for
its last checkpoint.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import BinaryIO

import psutil

from megafish.jobs.prepare import Prepared, train_command, write_job
from megafish.train.guard import StopRequest

# Seconds that the other processes of a run get after the first one has failed: they notice by themselves, and their
# words tell what happened.
_NOTICE = 30.0
# Seconds between looks at the processes and at the log.
_BEAT = 0.2


def default_processes() -> int:
    """One process for each GPU of this machine, or one."""
    import torch

    return max(torch.cuda.device_count(), 1)


def process_environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """Environment of one process: the variables that torchrun sets, and its share of the cores."""
    threads = str(max((os.cpu_count() or 1) // processes, 1))
    return {
        "OMP_NUM_THREADS": threads,
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def run_local(prepared: Prepared, processes: int) -> int:
    """Train a run, whose directory is there, in `processes` processes, and show what the first one prints.

    Returns the code of the process that failed first (128 + signal for one that a signal killed, as a shell has it), 0
    where all did well.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run = prepared.run
    own = psutil.Process()
    write_job(run, "local", submitted=time.time(), pid=own.pid, born=own.create_time())
    with ExitStack() as stack:
        group: list[subprocess.Popen[bytes]] = []
        stack.callback(_end, group)
        signals = stack.enter_context(_HandOn(group))
        first = run.log_of(0)
        shown = first.stat().st_size if first.is_file() else 0
        for rank in range(processes):
            log = stack.enter_context(open(run.log_of(rank), "ab"))
            group.append(
                subprocess.Popen(
                    train_command(run, prepared.overrides),
                    env={**process_environment(rank, processes, port), "PYTHONUNBUFFERED": "1"},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    # A session of its own: Ctrl-C at the terminal reaches the launcher alone, which hands it on.
                    start_new_session=True,
                )
            )
            signals.catch_up()
        with open(first, "rb") as output:
            output.seek(shown)
            return _watch(group, output, first)


def _watch(group: list[subprocess.Popen[bytes]], output: BinaryIO, log: Path) -> int:
    """Show the log until all processes have ended."""
    code, deadline, read = 0, float("inf"), True
    while True:
        ended = [process.poll() for process in group]
        read = read and _copy(output)
        failed = [number for number in ended if number]
        if failed and not code:
            code = failed[0] if failed[0] > 0 else 128 - failed[0]
            deadline = time.monotonic() + _NOTICE
        if None not in ended:
            return code
        if time.monotonic() > deadline:
            print(f"one process has failed with code {code}: ending the others; logs: {log.parent}", file=sys.stderr)
            _end(group)
        time.sleep(_BEAT)


def _copy(output: BinaryIO) -> bool:
    """Show what is new in the log; False where nobody reads it (`| head`), which is no reason to end a run."""
    try:
        while block := output.read(1 << 16):
            sys.stdout.buffer.write(block)
            sys.stdout.buffer.flush()
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # Python flushes it once more at its end
        return False
    return True


def _end(group: list[subprocess.Popen[bytes]]) -> None:
    """Kill what is left: the launcher leaves no process behind."""
    for process in group:
        if process.poll() is None:
            process.kill()
    for process in group:
        process.wait()


class _HandOn:
    """Context: signals that ask a run to stop go to all its processes."""

    def __init__(self, group: list[subprocess.Popen[bytes]]) -> None:
        self._group = group
        self._last: int | None = None

    def __enter__(self) -> _HandOn:
        self._previous = {number: signal.signal(number, self._send) for number in StopRequest.signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def catch_up(self) -> None:
        """Give the newest process the signal that came before it was there."""
        if self._last is not None:
            self._group[-1].send_signal(self._last)

    def _send(self, number: int, _frame: FrameType | None) -> None:
        self._last = number
        for process in self._group:
            if process.poll() is None:
                process.send_signal(number)
