"""The watchdog: ends a run that makes no progress, and says which process is late.

Each process marks what it is about to do (`mark`), which costs nothing. Two threads look on. The first counts how long
the mark has stood still; it talks to nobody, so that nothing can hold it up. The second writes the mark into the store
of the process group, TCP beside the collectives, where all can read it while these hang.

When a mark has stood still for too long in one process, all of them write the stacks of their threads to
logs/stacks_rank_00000.txt and leave with EXIT_STALLED. The one that noticed first compares all marks: late is who gives
no sign any more (stopped, dead, or cut off), else who is furthest behind. The last checkpoint stands as it is.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from megafish.train.guard import EXIT_STALLED

# Seconds between two looks at the mark, and between two publications of it, unless the limit is very short.
_BEAT = 2.0
# Beats: a process that does not publish within so many gives no sign of life; after so many all leave, whatever the
# store has or has not answered.
_SILENT, _LAST_WORDS = 2, 5

WAITING_FOR_DATA = "waiting for data"
"""The phase in which a process waits for its own loader, all others being still ahead of it."""

_instances = itertools.count()


@dataclass(frozen=True)
class Mark:
    """What a process is doing."""

    count: int
    """How many marks were set before: progress that can be compared."""
    phase: str
    step: int
    slow: bool
    """Whether this may take long (start-up, evaluation, checkpoints)."""


class Watchdog:
    """Context around a run. Does nothing where `stall_seconds` is None.

    `stall_seconds`, `slow_seconds`: how long a mark may stand still, in a step and in what may take long. `hint`: what
    to do, at the end of the report.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        folder: Path,
        *,
        stall_seconds: float | None,
        slow_seconds: float,
        hint: str = "",
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.folder = folder
        self.stall_seconds = stall_seconds
        self.slow_seconds = slow_seconds
        self.hint = hint
        self.beat = min(_BEAT, (stall_seconds or _BEAT) / 10)
        self._mark = Mark(0, "start-up", 0, True)
        # torchrun starts the processes again (--max-restarts) with the store that holds the alarm of the last attempt.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._prefix = f"megafish/watchdog/{attempt}/{next(_instances)}"
        self._end = threading.Event()
        self._noticed = threading.Event()  # this process, or another, has waited too long
        self._answered = threading.Event()  # `_report` holds what the store had to say
        self._report = ""
        self._speaks = True  # whether the report is this process's to print
        self._threads: list[threading.Thread] = []

    def mark(self, phase: str, step: int, *, slow: bool = False) -> None:
        """The main thread begins `phase` of `step`."""
        self._mark = Mark(self._mark.count + 1, phase, step, slow)

    def __enter__(self) -> Watchdog:
        if self.stall_seconds is not None:
            self._threads = [threading.Thread(target=self._watch, name="megafish-watchdog", daemon=True)]
            if self.world_size > 1:
                self._threads.append(threading.Thread(target=self._publish, name="megafish-heartbeat", daemon=True))
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        # A thread still in a call of the store when the interpreter ends takes the process with it: the GIL it comes
        # back for is gone, and C++ answers that with abort(). Not for ever: a store that never answers holds no one up.
        for thread in self._threads:
            thread.join(_LAST_WORDS * self.beat)

    # ---- the thread that watches

    def _watch(self) -> None:
        assert self.stall_seconds is not None
        seen, still, last = self._mark, 0.0, time.monotonic()
        while not self._end.wait(self.beat):
            now = time.monotonic()
            # Counted in beats: a job that was suspended as a whole (Ctrl-Z, scontrol suspend) has not stalled.
            passed, last = min(now - last, 2 * self.beat), now
            seen, still = (seen, still + passed) if self._mark is seen else (self._mark, 0.0)
            if still > (self.slow_seconds if seen.slow else self.stall_seconds):
                self._noticed.set()
            if self._noticed.is_set():
                self._leave(seen, still)

    def _leave(self, mark: Mark, still: float) -> None:
        """Stacks, report, end of the process: by os._exit, since the main thread may never return to Python."""
        own = f"rank {self.rank}: {still:.0f} s in {mark.phase} of step {mark.step}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / f"stacks_rank_{self.rank:05d}.txt", "w", encoding="utf-8") as file:
                file.write(f"{own}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            print(f"rank {self.rank}: no stacks written: {error}", file=sys.stderr, flush=True)
        report = own
        if self.world_size > 1:
            if self._answered.wait(_LAST_WORDS * self.beat):
                report = self._report
            else:
                report = f"{own}; rank 0 or its launcher, which keeps the store of the process group, does not answer"
        if self._speaks:
            print(
                f"error: stalled: {report}; stacks of all threads: {self.folder}/stacks_rank_*.txt{self.hint}",
                file=sys.stderr,
                flush=True,
            )
        else:
            # One that does not speak goes on giving signs of life until the one that does has looked for them.
            time.sleep(_LAST_WORDS * self.beat)
        # A thread that is no daemon has something to complete, as one that publishes a checkpoint.
        for thread in threading.enumerate():
            if not thread.daemon and thread is not threading.main_thread():
                thread.join(_LAST_WORDS * self.beat)
        os._exit(EXIT_STALLED)

    # ---- the thread that talks to the others

    def _publish(self) -> None:
        try:
            # A connection of its own: the process group's may be busy waiting for what never comes.
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.PrefixStore(self._prefix, dist.TCPStore(address, port, is_master=False))
            while not self._end.is_set():
                self._set_status(store)
                if not self._answered.is_set() and (self._noticed.is_set() or store.check(["alarm"])):
                    self._speaks = store.add("alarm", 1) == 1
                    if self._speaks:
                        self._report = self._find_late(store)
                    self._answered.set()
                    self._noticed.set()
                self._end.wait(self.beat)
        except RuntimeError:
            pass  # the store went with rank 0: at the end of a run, or in a stall that `_watch` notices by itself

    def _set_status(self, store: dist.Store) -> None:
        store.set(str(self.rank), json.dumps({**asdict(self._mark), "at": time.monotonic()}))

    def _find_late(self, store: dist.Store) -> str:
        before = self._statuses(store)
        self._end.wait(_SILENT * self.beat)
        self._set_status(store)
        return describe(before, self._statuses(store), self.world_size)

    def _statuses(self, store: dist.Store) -> dict[int, str]:
        """What every process published last; those are left out that never did."""
        known = [rank for rank in range(self.world_size) if store.check([str(rank)])]
        return dict(zip(known, (value.decode() for value in store.multi_get(list(map(str, known)))), strict=True))


def describe(before: dict[int, str], after: dict[int, str], world_size: int) -> str:
    """Who is late, in words.

    `before`, `after`: JSON of each process that published its mark, some beats apart.
    """
    marks = {rank: json.loads(text) for rank, text in after.items()}

    def places(ranks: list[int]) -> str:
        by_place: dict[str, list[int]] = {}
        for rank in ranks:
            by_place.setdefault(f"{marks[rank]['phase']} of step {marks[rank]['step']}", []).append(rank)
        return ", ".join(f"{name_ranks(found)} in {place}" for place, found in by_place.items())

    unheard = [rank for rank in range(world_size) if rank not in marks]
    silent = [rank for rank in marks if before.get(rank) == after[rank]]
    speaking = [rank for rank in marks if rank not in silent]
    others = f"; {places(speaking)}" if speaking else ""
    if unheard:
        return f"late: {name_ranks(unheard)}, never heard of{others}"
    if silent:
        return f"late: {places(silent)}, without a sign of life (stopped, dead or cut off){others}"
    least = min(mark["count"] for mark in marks.values())
    behind = [rank for rank in speaking if marks[rank]["count"] == least]
    if len(behind) == len(marks):
        no_data = all(mark["phase"] == WAITING_FOR_DATA for mark in marks.values())
        reason = "the loaders get no data" if no_data else "a collective operation does not end"
        return f"all processes are at the same place ({places(behind)}): {reason}"
    return f"late: {places(behind)}; {places([rank for rank in speaking if rank not in behind])}"


def name_ranks(ranks: list[int]) -> str:
    """'rank 3', 'ranks 0, 2', or the first of many with their number."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = ", ".join(map(str, ranks[:8]))
    return f"ranks {shown}" + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
