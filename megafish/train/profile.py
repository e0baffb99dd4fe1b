"""Where the time and the memory of a step go: phases of every step, a trace of a few, the allocations of a few.

What is off costs nothing: no clock is read, no event recorded, no function replaced, no device waited for.
"""

from __future__ import annotations

import time
from functools import wraps
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megafish.config import ProfileConfig
from megafish.errors import InputError

PHASES = ("data", "forward", "backward", "optimizer")
"""In the order of a step. data: waiting for the batch and counting its tokens over all processes; backward: with the
collectives that ZeRO starts there; optimizer: clipping and update, and the sum of the loss over all processes."""

# Everything that a process group can be asked for. A call starts a collective, and Work.wait ends one.
_COLLECTIVES = (
    "allreduce",
    "allreduce_coalesced",
    "reduce",
    "broadcast",
    "allgather",
    "_allgather_base",
    "allgather_into_tensor_coalesced",
    "reduce_scatter",
    "_reduce_scatter_base",
    "reduce_scatter_tensor_coalesced",
    "alltoall",
    "alltoall_base",
    "gather",
    "scatter",
    "send",
    "recv",
    "barrier",
)


class Clock(Protocol):
    """Reads the time of a device; the differences are known once the device has come so far."""

    def now(self) -> Any:
        """A moment, as an opaque value."""

    def seconds(self, begin: Any, end: Any) -> float:
        """Between two moments."""


class HostClock:
    """The time on a CPU, where an operation is over when its call returns."""

    def now(self) -> float:
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


class StreamClock:
    """The time on the current CUDA stream: events, read after the step, so that nothing waits in between."""

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return begin.elapsed_time(end) / 1000


class CommunicationTimer:
    """Measures how long the process (on CUDA: its current stream) stands still for collectives while it is entered.

    Timed are each collective's call and each wait for its result, wherever they are made (DeepSpeed's, ours): the
    functions of torch's process groups are replaced meanwhile. A collective that runs beside the computation
    (`overlap_comm`, ZeRO-3's prefetching) counts only as far as something waits for it; waiting for a process that is
    late counts in full.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._spans: list[tuple[Any, Any]] = []
        self._inside = False
        self._replaced: list[tuple[type, str, Any]] = []

    def __enter__(self) -> CommunicationTimer:
        for name in _COLLECTIVES:
            self._replace(dist.ProcessGroup, name)
        self._replace(dist.Work, "wait")
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, function in self._replaced:
            setattr(owner, name, function)
        self._replaced.clear()

    def take(self) -> float:
        """Seconds since the last call."""
        spans, self._spans = self._spans, []
        return sum(self.clock.seconds(begin, end) for begin, end in spans)

    def _replace(self, owner: type, name: str) -> None:
        function = getattr(owner, name)
        # Kept as the class holds it: put back as an attribute gives it, it would not be a method any more.
        self._replaced.append((owner, name, owner.__dict__[name]))

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:  # one collective may be made of others
                return function(*args, **kwargs)
            self._inside = True
            begin = self.clock.now()
            try:
                return function(*args, **kwargs)
            finally:
                self._spans.append((begin, self.clock.now()))
                self._inside = False

        setattr(owner, name, timed)


def check_ranks(config: ProfileConfig, world_size: int) -> None:
    """InputError where processes are to record that a run of this size does not have."""
    if unknown := [number for number in config.ranks if number >= world_size]:
        raise InputError(f"profile.ranks={unknown}: this run has the processes 0 to {world_size - 1}")


class Profiler:
    """Follows the loop by `begin(phase)` and `end_step`, which return at once where nothing is asked for."""

    def __init__(
        self, config: ProfileConfig, folder: Path, *, rank: int, world_size: int, device: torch.device, first_step: int
    ) -> None:
        """`folder`: where traces go. `first_step`: the step that comes next (a window that began before it is over, and
        nothing is recorded). Raises InputError for what cannot be recorded here."""
        if config.memory_step is not None and device.type != "cuda":
            raise InputError(
                "profile.memory_step records the allocations of a GPU, and this run is on a CPU: set it to null (the "
                "peak of the resident memory is in metrics.jsonl)"
            )
        check_ranks(config, world_size)
        self.config = config
        self.folder = folder
        self.rank = rank
        self.step = self.first_step = first_step
        records = rank in config.ranks
        self.trace_steps = _window(config.trace_step if records else None, config.steps)
        self.memory_steps = _window(config.memory_step if records else None, config.steps)
        self.files: list[Path] = []
        self.totals: dict[str, float] = {}
        self.measured_steps = 0
        self._on = config.phases or bool(self.trace_steps or self.memory_steps)
        self._clock: Clock = HostClock() if device.type == "cpu" else StreamClock()
        self._communication = CommunicationTimer(self._clock) if config.phases else None
        self._marks: list[tuple[str, Any]] = []
        self._in_step = False
        self._range: Any = None
        self._trace: torch.profiler.profile | None = None
        self._recording_memory = False

    def __enter__(self) -> Profiler:
        if self._communication is not None:
            self._communication.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what a run that ends inside the window has recorded."""
        self._leave_range()
        self._stop_recording()
        if self._communication is not None:
            self._communication.__exit__()

    def begin(self, phase: str) -> None:
        """From here on the time belongs to `phase` (one of PHASES)."""
        if not self._on:
            return
        if not self._in_step:
            self._in_step = True
            self._start_recording()
        if self.config.phases:
            self._marks.append((phase, self._clock.now()))
        if self._trace is not None:
            self._leave_range()
            self._range = torch.profiler.record_function(f"megafish: {phase}")
            self._range.__enter__()

    def end_step(self) -> dict[str, float]:
        """Close the step. Returns its seconds by phase for metrics.jsonl: nothing where phases are off."""
        self.step += 1
        if not self._on:
            return {}
        if self.config.phases:
            self._marks.append(("", self._clock.now()))
        self._leave_range()
        self._stop_recording(unless_step=self.step)
        self._in_step = False
        if self._communication is None:
            return {}
        marks, self._marks = self._marks, []
        seconds = dict.fromkeys((*PHASES, "communication"), 0.0)
        for (phase, begin), (_, end) in pairwise(marks):
            seconds[phase] += self._clock.seconds(begin, end)
        seconds["communication"] = self._communication.take()
        # The first step also allocates and warms up.
        if self.measured_steps:
            for phase, value in seconds.items():
                self.totals[phase] = self.totals.get(phase, 0.0) + value
        self.measured_steps += 1
        return {f"seconds_{phase}": value for phase, value in seconds.items()}

    def report(self) -> list[str]:
        """Lines for the end of the run: the table of phases, where the files are and what opens them."""
        self._stop_recording()
        lines = []
        steps = self.measured_steps - 1
        if self.totals:
            whole = sum(self.totals[phase] for phase in PHASES)
            lines.append(f"a step of process {self.rank}, mean over {steps} steps (the first left out):")
            for phase in PHASES:
                lines.append(f"  {phase:<10} {self.totals[phase] / steps:9.4f} s {self.totals[phase] / whole:6.1%}")
            lines.append(
                f"  of these, standing still for communication: {self.totals['communication'] / steps:.4f} s "
                f"{self.totals['communication'] / whole:.1%}"
            )
        for path in self.files:
            viewer = "https://ui.perfetto.dev" if path.suffix == ".json" else "https://pytorch.org/memory_viz"
            lines.append(f"next: open {path} in {viewer}")
        others = [rank for rank in self.config.ranks if rank != self.rank]
        for name, start in (("trace_step", self.config.trace_step), ("memory_step", self.config.memory_step)):
            if start is not None and others and self.first_step <= start < self.step:
                lines.append(f"profile.{name}={start}: the files of the processes {others} are in {self.folder}")
            if start is not None and not self.first_step <= start < self.step:
                lines.append(
                    f"profile.{name}={start}: nothing recorded, this was not among the steps {self.first_step} to "
                    f"{self.step - 1}"
                )
        return lines

    def _start_recording(self) -> None:
        """At the first phase of a step."""
        if self.step == self.trace_steps.start and self.trace_steps:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
            self._trace = torch.profiler.profile(activities=kinds)
            self._trace.start()
        if self.step == self.memory_steps.start and self.memory_steps:
            torch.cuda.memory._record_memory_history(max_entries=1_000_000)
            self._recording_memory = True

    def _stop_recording(self, unless_step: int | None = None) -> None:
        """Write and stop what does not go on with `unless_step`."""
        if self._trace is not None and unless_step not in self.trace_steps:
            self._trace.stop()
            path = self._file("trace", self.trace_steps, "json")
            self._trace.export_chrome_trace(str(path))
            self._trace = None
        if self._recording_memory and unless_step not in self.memory_steps:
            torch.cuda.memory._dump_snapshot(str(self._file("memory", self.memory_steps, "pickle")))
            torch.cuda.memory._record_memory_history(enabled=None)
            self._recording_memory = False

    def _file(self, kind: str, steps: range, suffix: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{kind}_step_{steps.start:08d}_rank_{self.rank:05d}.{suffix}"
        self.files.append(path)
        return path

    def _leave_range(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None


def _window(start: int | None, steps: int) -> range:
    return range(0) if start is None else range(start, start + steps)
