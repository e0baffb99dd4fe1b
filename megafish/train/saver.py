"""Saving while the training goes on.

The state is copied to host memory, which is all that the training waits for. A thread of each process then does three
things, and none begins before every process has ended the one before:

1. writes this process's pieces of the optimizer's state,
2. writes its share of the weights, made from the pieces of all,
3. on the main process: joins index and manifest, renames the folder, moves `latest`, removes what is not kept.

The threads use no collective, which could come between those of the training. Whether all are done is summed in the
collective that each step has anyway (`flags` in, `poll` out). Until the last rename the folder is called *.tmp, and
`latest` names the checkpoint before: a kill at any moment costs the unfinished one only.
"""

from __future__ import annotations

import errno
import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from megafish.config import CheckpointConfig
from megafish.errors import InputError
from megafish.model.tensor_file import Cancelled
from megafish.processes import together
from megafish.run import RunDir
from megafish.train.checkpoint import make_room, publish, write_receipt, write_weights
from megafish.train.engine import Engine
from megafish.train.state import Piece, write_pieces


class Saver:
    """Writes the checkpoints of a run, at most one at a time. A context: leaving it on an error ends the writing."""

    def __init__(self, run: RunDir, engine: Engine, config: CheckpointConfig) -> None:
        self.run = run
        self.engine = engine
        self.config = config
        self._job: _Job | None = None
        self._host: dict[str, torch.Tensor] = {}
        self._allocation: threading.Thread | None = None
        self._cancel = threading.Event()
        self._records: list[dict[str, Any]] = []

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Reached with a job only by an exception, perhaps in this process alone: nothing collective here.
        self._cancel.set()
        if self._job is not None:
            self._job.join()
        if self._allocation is not None:
            self._allocation.join()

    def allocate(self) -> None:
        """Get the host memory for the copies, beside the training: the first save need not wait for it.

        To be called after a step, when the optimizer has its state; again it does nothing. What is not there at the
        first save is made by it.
        """
        # Without an interval the only save is the last one, which is waited for and needs no copies.
        if not self.config.asynchronous or self.config.interval is None or self._allocation is not None:
            return
        pieces = self.engine.pieces()

        def fill() -> None:
            for piece in pieces:
                for state, tensor in piece.states.items():
                    if self._cancel.is_set():
                        return
                    self._host_copy(piece, state, tensor).zero_()  # touched: else the pages come at the first write

        self._allocation = threading.Thread(target=fill, name="megafish-saver-memory", daemon=True)
        self._allocation.start()

    def save(self, state: dict[str, Any], *, wait: bool) -> None:
        """Begin to write the checkpoint of `state["step"]`; `wait`: and return once it is the latest. Collective.

        `state` is what state.json will hold. A checkpoint still on its way is waited for.
        """
        started = time.perf_counter()
        self.finish()
        processes = self.engine.processes
        pieces = self.engine.pieces()
        own = torch.tensor(_bytes(pieces), device=processes.device)
        dist.all_reduce(own)
        own += sum(map(math.prod, self.engine.weights.shapes.values())) * self.engine.dtype.itemsize
        temporary = self.run.checkpoint(state["step"]).with_suffix(".tmp")
        together(lambda: make_room(temporary, int(own)) if processes.is_main else None)
        if self.config.asynchronous and not wait:
            pieces = self._copy(pieces)
        self._job = _Job(self, temporary, state, pieces, started)
        self._job.start()
        if wait or not self.config.asynchronous:
            self.finish()
        else:
            self._job.stall = time.perf_counter() - started

    def flags(self) -> tuple[int, int]:
        """(whether this process is writing, whether its writing failed), to be summed over all for `poll`."""
        if self._job is None:
            return 0, 0
        writing = self._job.is_writing  # asked first: what ends between the two has set its error by then
        return int(writing), int(self._job.error is not None)

    def poll(self, writing: int, failed: int) -> None:
        """Go on where all processes are done. `writing`, `failed`: the sums of all `flags`. Collective.

        Raises in all processes what failed in one.
        """
        if self._job is not None and (failed or not writing):
            self._advance()

    def finish(self) -> None:
        """Wait until nothing is on its way any more. Collective. Raises in all processes what failed in one."""
        while self._job is not None:
            self._job.join()
            self._advance()

    def records(self) -> list[dict[str, Any]]:
        """What to report of the checkpoints published since the last call: lines of metrics.jsonl."""
        records, self._records = self._records, []
        return records

    def _advance(self) -> None:
        """The next part of the job, once this one has ended everywhere."""
        assert self._job is not None
        together(self._job.raise_error)
        if not self._job.next_part():
            self._records.append(self._job.record())
            self._job = None

    def _copy(self, pieces: list[Piece]) -> list[Piece]:
        """The pieces in host memory, kept from one checkpoint to the next: fresh memory costs more than the copy."""
        if self._allocation is not None:
            self._allocation.join()
        copied = []
        for piece in pieces:
            states = {}
            for state, tensor in piece.states.items():
                states[state] = self._host_copy(piece, state, tensor).copy_(tensor, non_blocking=True)
            copied.append(replace(piece, states=states))
        if self.engine.processes.device.type == "cuda":
            torch.cuda.synchronize()
        return copied

    def _host_copy(self, piece: Piece, state: str, tensor: torch.Tensor) -> torch.Tensor:
        """Host memory for a tensor of a piece; what is in it is undefined."""
        key = f"{state}/{piece.parameter}"
        if key not in self._host:
            pinned = self.engine.processes.device.type == "cuda"
            self._host[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        return self._host[key]


class _Job:
    """One checkpoint on its way."""

    def __init__(self, saver: Saver, temporary: Path, state: dict[str, Any], pieces: list[Piece], began: float) -> None:
        self.saver = saver
        self.temporary = temporary
        self.state = state
        self.pieces = pieces
        self.error: BaseException | None = None
        self.bytes = 0
        self.began = began
        self.stall: float | None = None
        self._part = 0
        self._thread: threading.Thread | None = None

    @property
    def is_writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Begin the part that is due, in a thread."""
        action = (self._write_pieces, self._write_weights, self._publish)[self._part]
        # No daemon: what is half-way through a rename when the program ends is completed.
        self._thread = threading.Thread(target=self._run, args=(action,), name="megafish-saver", daemon=False)
        self._thread.start()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def next_part(self) -> bool:
        """Begin what comes next; False when nothing does."""
        self._part += 1
        if self._part == 3:
            return False
        self.start()
        return True

    def record(self) -> dict[str, Any]:
        seconds = time.perf_counter() - self.began
        return {
            "kind": "checkpoint",
            "step": self.state["step"],
            "stall_s": seconds if self.stall is None else self.stall,
            "write_s": seconds,
            "bytes": self.bytes,
            "asynchronous": self.stall is not None,
        }

    def raise_error(self) -> None:
        if self.error is None:
            return
        run = self.saver.run
        if isinstance(self.error, OSError) and self.error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"{run.checkpoints}: no space left on the device: free some, then resume {run.path}")
        if isinstance(self.error, FileNotFoundError):
            raise InputError(f"{self.error.filename}: missing: every node must see {run.path} under the same path")
        raise self.error

    def _run(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Cancelled:
            pass
        except BaseException as error:
            self.error = error

    def _write_pieces(self) -> None:
        rank = self.saver.engine.processes.rank
        receipt = write_pieces(self.temporary, rank, self.pieces, self.saver._cancel.is_set)
        write_receipt(self.temporary, "pieces", rank, receipt)
        self.pieces = []

    def _write_weights(self) -> None:
        engine = self.saver.engine
        rank, world_size = engine.processes.rank, engine.processes.world_size
        cancelled = self.saver._cancel.is_set
        receipt = write_weights(self.temporary, engine.weights, engine.dtype, rank, world_size, cancelled)
        write_receipt(self.temporary, "weights", rank, receipt)

    def _publish(self) -> None:
        if self.saver.engine.processes.is_main and not self.saver._cancel.is_set():
            world_size = self.saver.engine.processes.world_size
            self.bytes = publish(self.saver.run, self.temporary, self.state, self.saver.config, world_size)


def _bytes(pieces: list[Piece]) -> int:
    """Size of the pieces."""
    return sum(
        (piece.end - piece.begin) * sum(tensor.element_size() for tensor in piece.states.values()) for piece in pieces
    )
