"""Several processes: how they fail together, and how they share a work of independent parts, as an evaluation or an
audit, where torchrun or srun starts them. (Those of a training run, which exchange tensors, are in train/engine.py.)"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from megafish.errors import InputError
from megafish.launcher import adopt_slurm

T = TypeVar("T")

# One process may have a batch less to do than another, and long batches take minutes; torchrun ends the others when one
# of them dies.
_TIMEOUT = timedelta(days=1)


@dataclass(frozen=True)
class Processes:
    """This process among those that share a work."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def own(self, parts: Sequence[T]) -> Sequence[T]:
        """The parts of the work that are this process's: every size-th."""
        return parts[self.rank :: self.size]

    def complete(self, values: list[T], own: Iterable[int]) -> None:
        """Fill in what the other processes have found; own: the numbers of what this one has. Collective."""
        if self.size > 1:
            for found in self.gather({number: values[number] for number in own}):
                for number, value in found.items():
                    values[number] = value

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks, in each of them."""
        if self.size == 1:
            return [value]
        values = [value] * self.size
        dist.all_gather_object(values, value)
        return values


ALONE = Processes()


def batched(items: Sequence[T], size: int) -> list[list[T]]:
    """Parts of `size` items each, the last one of what is left."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def together(action: Callable[[], T]) -> T:
    """Run `action` in every process; if it failed in one, all of them raise the same InputError. Collective.

    Without it the process that failed leaves and the others wait for it until the collective times out.
    """
    result, problem = attempt(action)
    if problem is not None:
        raise InputError(problem)
    return cast(T, result)


def attempt(action: Callable[[], T]) -> tuple[T | None, str | None]:
    """Run `action` in every process: its result here, and the first process's InputError as text. Collective."""
    result, error = None, None
    try:
        result = action()
    except (InputError, OSError) as caught:
        error = str(caught)
    errors: list[str | None] = [error]
    if dist.is_initialized():
        errors *= dist.get_world_size()
        dist.all_gather_object(errors, error)
    for rank, message in enumerate(errors):
        if message is not None:
            return result, message if rank == 0 else f"process {rank}: {message}"
    return result, None


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """The process group that RANK and WORLD_SIZE name, or srun, until the block ends: none leaves before all are done.
    Objects alone are exchanged, over gloo."""
    adopt_slurm()
    try:
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        raise InputError("RANK and WORLD_SIZE must be whole numbers: start the processes with torchrun") from None
    if size == 1 or dist.is_initialized():
        yield Processes(rank, size)
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(f"WORLD_SIZE={size}, but {missing[0]} is not set: start the processes with torchrun")
    dist.init_process_group("gloo", timeout=_TIMEOUT)
    processes = Processes(rank, size)
    try:
        yield processes
        processes.gather(None)  # a launcher may end what is left once one has gone
    finally:
        dist.destroy_process_group()


def device_of(wanted: str | None) -> torch.device:
    """The device of this process, made the current one: `wanted` (cpu or cuda), by default a GPU where there is one."""
    if wanted is None:
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError("--device cuda, but torch sees no GPU: leave --device out, or install a CUDA build of torch")
    place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(place)
    return place
