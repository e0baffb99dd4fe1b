"""Who is late, and processes that are ended for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from megafish.train.guard import EXIT_STALLED
from megafish.train.watchdog import Watchdog, describe, name_ranks


def status(count: int, phase: str, at: float, step: int = 17) -> str:
    return json.dumps({"count": count, "phase": phase, "step": step, "slow": False, "at": at})


def test_a_process_without_a_sign_of_life_is_late() -> None:
    before = {0: status(50, "backward", 1.0), 1: status(50, "backward", 1.0), 2: status(50, "backward", 1.0)}
    after = {**{rank: status(50, "backward", 2.0) for rank in (0, 2)}, 1: before[1]}
    assert describe(before, after, 3) == (
        "late: rank 1 in backward of step 17, without a sign of life (stopped, dead or cut off); "
        "ranks 0, 2 in backward of step 17"
    )


def test_else_who_is_furthest_behind() -> None:
    before = {rank: status(0, "", 0.0) for rank in range(4)}
    after = {rank: status(51, "update", 1.0) for rank in (0, 1)}
    after |= {2: status(46, "data", 1.0), 3: status(50, "backward", 1.0)}
    assert describe(before, after, 4) == (
        "late: rank 2 in data of step 17; ranks 0, 1 in update of step 17, rank 3 in backward of step 17"
    )


def test_else_the_operation_itself() -> None:
    before = {rank: status(0, "", 0.0) for rank in range(2)}
    after = {rank: status(51, "update", 1.0) for rank in range(2)}
    assert describe(before, after, 2) == (
        "all processes are at the same place (ranks 0, 1 in update of step 17): a collective operation does not end"
    )


def test_else_the_data() -> None:
    after = {rank: status(51, "waiting for data", 1.0) for rank in range(2)}
    assert describe({}, after, 2).endswith("in waiting for data of step 17): the loaders get no data")


def test_a_process_that_never_published_is_late() -> None:
    assert describe({0: status(0, "", 0.0)}, {0: status(1, "start-up", 1.0, 0)}, 3) == (
        "late: ranks 1, 2, never heard of; rank 0 in start-up of step 0"
    )
    assert name_ranks(list(range(20))) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more"


SCRIPT = """
import ctypes, sys, time
from pathlib import Path
from megafish.train.watchdog import Watchdog
with Watchdog(0, 1, Path(sys.argv[1]), stall_seconds=1.0, slow_seconds=60.0) as watchdog:
    for step in range(30):
        watchdog.mark("data", step)
        print(step, flush=True)
        time.sleep(0.1)
    watchdog.mark("saving", step, slow=True)
    time.sleep(2)
    watchdog.mark("update", step)
    print("stuck", flush=True)
    ctypes.CDLL(None).sleep(600)  # in C, where no signal handler and no exception of Python arrives
"""


def test_a_process_stuck_in_c_ends_and_one_that_was_suspended_does_not(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "logs")],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "0\n"
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2.5)
    os.kill(process.pid, signal.SIGCONT)
    while process.stdout.readline() != "stuck\n":
        assert process.poll() is None, process.stderr
    started = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == EXIT_STALLED
    assert 0.9 < time.monotonic() - started < 5
    assert "error: stalled: rank 0: 1 s in update of step 29; stacks" in errors
    stacks = (tmp_path / "logs" / "stacks_rank_00000.txt").read_text()
    assert stacks.startswith("rank 0: 1 s in update of step 29\n")
    assert 'File "<string>", line 14 in <module>' in stacks and "_watch" in stacks, "every thread's stack"


def test_no_limit_is_no_thread(tmp_path: Path) -> None:
    import threading

    before = threading.active_count()
    with Watchdog(0, 2, tmp_path, stall_seconds=None, slow_seconds=1.0) as watchdog:
        watchdog.mark("data", 1)
        assert threading.active_count() == before


def test_processes_started_anew_do_not_hear_the_alarm_of_the_last_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun --max-restarts: the store outlives the processes."""
    names = set()
    for attempt in range(3):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        watchdog = Watchdog(0, 2, tmp_path, stall_seconds=1.0, slow_seconds=1.0)
        names.add(watchdog._prefix.rpartition("/")[0])
    assert len(names) == 3


def test_its_threads_end_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A thread that is in a call of the store when the interpreter ends would abort the process."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    publish = Watchdog._set_status

    def publish_slowly(self: Watchdog, own: dist.Store) -> None:
        publish(self, own)
        time.sleep(0.2)

    monkeypatch.setattr(Watchdog, "_set_status", publish_slowly)
    with Watchdog(0, 2, tmp_path, stall_seconds=60, slow_seconds=60):
        time.sleep(0.1)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("megafish-")]
