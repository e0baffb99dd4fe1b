"""Many small models at one time: a process a core does more of them than one process with all cores."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

from megafish.progress import Track

_MOST = 8
"""Processes, each of which holds its own copy of the libraries."""
_VARIABLE = "OMP_NUM_THREADS"

Task = tuple[Callable[..., Any], tuple[Any, ...]]


def usual_workers() -> int:
    """A process a core; one where there is a GPU, which all would share."""
    import torch

    return 1 if torch.cuda.is_available() else min(_MOST, len(os.sched_getaffinity(0)))


def run_all(tasks: Sequence[Task], workers: int, bar: Track) -> None:
    """Call all of them, in this process where there is one worker. The first error ends it; what runs is let finish."""
    if not tasks:
        return
    if workers == 1:
        for call, arguments in tasks:
            call(*arguments)
            bar.advance()
        return
    with (
        _threads(max(1, len(os.sched_getaffinity(0)) // workers)),
        ProcessPoolExecutor(min(workers, len(tasks)), mp_context=get_context("spawn")) as pool,
    ):
        futures = [pool.submit(call, *arguments) for call, arguments in tasks]
        try:
            for future in as_completed(futures):
                future.result()
                bar.advance()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """What the processes that are started here find in their environment."""
    before = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = str(count)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_VARIABLE]
        else:
            os.environ[_VARIABLE] = before
