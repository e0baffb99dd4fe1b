"""Processes that encode units for `prepare`, beside its own.

A worker is a fresh interpreter that imports what encoding needs and nothing else. It is not forked: the caller may have
threads, whose locks a fork would copy. Nor is it spawned by `multiprocessing`, which runs the caller's script once more
in each process and starts another one to track semaphores; a small corpus would be encoded before they have started.

Requests and answers are pickles on its standard input and output. It has nothing to lose but its unfinished unit, so
that it is simply killed when it is not wanted any more; it ends by itself when the main process is gone.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megafish.data.encode import EncodeOptions, Unit, encode_unit
from megafish.data.readers import Piece
from megafish.data.tokenizer import load_tokenizer
from megafish.errors import InputError

_START = "import sys; sys.path[:] = sys.argv[1:]; from megafish.data.workers import serve; serve()"


class WorkerKilledError(Exception):
    """A worker is gone without a word of its own."""


class Worker:
    """The main process's side of a worker. Each is used by one thread at a time; `kill` may come from any."""

    def __init__(self, tokenizer: str | Path, eos: str | int | None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # NumPy copies arrays here. The threads that its algebra starts on import would only delay the encoding.
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # out of reach of Ctrl-C: the main process decides
        )
        self._send((tokenizer, eos))

    def tokenizer_sha256(self) -> str:
        """The hash of the tokenizer that it has loaded. Waits until it has: call it once, before anything else."""
        return self._answer()

    def encode_unit(
        self,
        folder: Path,
        number: int,
        pieces: Sequence[Piece],
        options: EncodeOptions,
        on_bytes: Callable[[int], None],
    ) -> Unit:
        """As the function of this name, with the worker's own tokenizer. Raises WorkerKilledError too."""
        self._send((folder, number, pieces, options))
        while isinstance(answer := self._answer(), int):
            on_bytes(answer)
        return answer

    def kill(self) -> None:
        """End it and wait until it is gone; who waits for an answer gets WorkerKilledError."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Kill it and close the pipes; not while anyone waits for an answer."""
        self.kill()
        self._process.communicate()

    def _send(self, request: tuple[Any, ...]) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: `_answer` says why
            pickle.dump(request, self._process.stdin)
            self._process.stdin.flush()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        try:
            answer = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError):  # cut off
            if self._process.wait() > 0:
                raise RuntimeError("a worker process failed; its traceback is above") from None
            raise WorkerKilledError from None
        if isinstance(answer, Exception):
            raise answer
        return answer


@contextmanager
def start_workers(count: int, tokenizer: str | Path, eos: str | int | None) -> Iterator[list[Worker]]:
    """Workers for the length of a `with` block. They load `tokenizer` while the block goes on."""
    workers: list[Worker] = []
    try:
        for _ in range(count):
            workers.append(Worker(tokenizer, eos))
        yield workers
    finally:
        for worker in workers:
            worker.close()


def serve() -> None:
    """What a worker runs: load the tokenizer and encode what is asked for, until there is nobody left to ask."""
    requests = sys.stdin.buffer
    answers = open(os.dup(1), "wb", buffering=0)  # noqa: SIM115 - open as long as the process
    os.dup2(2, 1)  # what a library may print must not end up among the answers

    def answer(value: Any) -> None:
        pickle.dump(value, answers)

    with suppress(EOFError, BrokenPipeError):  # the main process is gone
        try:
            path, eos = pickle.load(requests)
            tokenizer = load_tokenizer(path, eos=eos)
            answer(tokenizer.sha256)
            while True:
                folder, number, pieces, options = pickle.load(requests)
                answer(encode_unit(folder, number, pieces, tokenizer, options, answer))
        except (InputError, OSError) as error:  # a defect ends the process, with its traceback on standard error
            answer(error)
