"""A sweep on this machine: so many runs at one time, until all have ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from types import FrameType

from megafish.jobs.prepare import Prepared, check
from megafish.jobs.table import format_duration
from megafish.progress import Track, track
from megafish.run import RunDir
from megafish.sweep.expand import SweepRun
from megafish.sweep.folder import create_run, metric_of
from megafish.sweep.spec import Metric

_BEAT = 0.2
LOG = "launch.log"
"""In a run's logs/: what its launcher printed."""


@dataclass
class _Active:
    run: SweepRun
    process: subprocess.Popen[bytes]
    started: float = field(default_factory=time.monotonic)


def run_locally(runs: list[SweepRun], *, jobs: int, processes: int, metric: Metric, checked: bool) -> int:
    """Run them, `jobs` at one time with `processes` processes each. A failed one does not stop the others.

    `checked`: refuse first what the first of them would refuse at its start, and with it most likely all.
    Returns 0, 1 where a run has failed, or 128 + signal where one stopped the sweep: the runs that were going on have
    then written a checkpoint.
    """
    if checked:
        check(Prepared(RunDir(runs[0].path), runs[0].config, ()), processes)
    waiting, failed = list(runs), 0
    active: list[_Active] = []
    with track(len(runs), "sweep", "runs") as progress, _Stop() as stop:
        while waiting or active:
            while waiting and len(active) < jobs and stop.signal is None:
                active.append(_start(waiting.pop(0), jobs, processes))
            if stop.signal is not None:
                waiting.clear()
                stop.hand_on([entry.process for entry in active])
            for entry in list(active):
                code = entry.process.poll()
                if code is None:
                    continue
                active.remove(entry)
                failed += code != 0
                progress.advance()
                _tell(progress, entry, code, metric)
            time.sleep(_BEAT)
    if stop.signal is not None:
        return 128 + stop.signal
    return 1 if failed else 0


def _start(run: SweepRun, jobs: int, processes: int) -> _Active:
    create_run(run)
    threads = max((os.cpu_count() or 1) // (jobs * processes), 1)
    with open(run.path / "logs" / LOG, "ab") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "megafish",
                "launch",
                "local",
                str(run.path),
                f"--processes={processes}",
                "--no-check",
            ],
            env={"OMP_NUM_THREADS": str(threads), **os.environ},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # A session of its own: Ctrl-C at the terminal reaches the sweep alone, which hands it on.
            start_new_session=True,
        )
    return _Active(run, process)


def _tell(progress: Track, entry: _Active, code: int, metric: Metric) -> None:
    took = format_duration(time.monotonic() - entry.started)
    if code:
        progress.note(f"{entry.run.name}: exit code {code} after {took}, see megafish logs {entry.run.path}")
        return
    value = metric_of(RunDir(entry.run.path), metric.name)
    progress.note(f"{entry.run.name}: done in {took}" + (f", {metric.name} {value:.4f}" if value is not None else ""))


class _Stop:
    """Context that remembers Ctrl-C or SIGTERM and hands it on, once; a second one kills the runs."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._count = self._handed = 0

    def __enter__(self) -> _Stop:
        self._previous = {number: signal.signal(number, self._remember) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.signal, self._count = number, self._count + 1

    def hand_on(self, processes: list[subprocess.Popen[bytes]]) -> None:
        """Give the runs what came since the last call."""
        if self._count == self._handed:
            return
        first, self._handed = self._handed == 0, self._count
        for process in processes:
            if process.poll() is None:
                if first:
                    process.terminate()
                else:
                    # The launcher's children are in sessions of their own: it has to end them.
                    process.send_signal(signal.SIGINT)
