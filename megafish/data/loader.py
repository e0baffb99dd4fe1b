"""Batches for training, made ahead of time by one thread, and for evaluation."""

from __future__ import annotations

import hashlib
import json
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from megafish.data.corpus import Sample, SampleStream
from megafish.data.order import Locations
from megafish.data.quarantine import Quarantine, number_ranges
from megafish.errors import InputError

IGNORE = -100
"""Target that is not supervised."""

# Samples located at one time.
_LOCATED = 1024
# Seconds: between two questions whether to go on waiting for a batch, and for the thread to finish its last one.
_POLL, _LAST_BATCH = 0.2, 10.0

MaskFn = Callable[[Sequence[Sample]], npt.NDArray[np.bool_]]
"""Samples of one length -> bool [b, S], True where the target is dropped."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of b sequences of S tokens."""

    tokens: torch.Tensor
    """Inputs, int64 [b, S]."""
    targets: torch.Tensor
    """Next tokens, int64 [b, S]; -100 where never supervised: the first token of a document."""
    drop: torch.Tensor
    """bool [b, S], True where the mask leaves the target out; False where targets is -100."""
    cu_seqlens: torch.Tensor
    """Starts of the documents in the flattened b*S inputs, then b*S: int32 [pieces + 1]. A row starts a new piece."""
    max_seqlen: int
    """Length of the longest piece [tokens]."""
    sample_ids: list[int]
    """Numbers of the samples in the run, one a row; -1 for a padding row."""
    kept: int
    """Supervised targets."""
    dropped: int
    """Targets left out by the mask."""

    @property
    def begins(self) -> torch.Tensor:
        """Place in its row where the document of each input begins (0 for one from before the row), int64 [b, S]."""
        rows, length = self.tokens.shape
        bounds = self.cu_seqlens.long()
        places = bounds[:-1].repeat_interleave(bounds.diff()).view(rows, length)
        return places - length * torch.arange(rows)[:, None]


@dataclass(frozen=True)
class StepBatch:
    """What one rank works on in one optimizer step."""

    micro_batches: list[Batch]
    """This rank's micro-batches, in order."""
    ranges: list[list[int]]
    """Numbers of the samples of the global batch: [first, how many] of each stretch without a gap."""
    data_hash: str
    """16 hex digits that identify the global batch, equal on every rank and for any number of ranks."""

    @property
    def first_sample(self) -> int:
        """Number of the first sample of the global batch."""
        return self.ranges[0][0]

    @property
    def end(self) -> int:
        """Number after the last sample of the global batch: the position from which the next step reads."""
        return sum(self.ranges[-1])

    @property
    def kept(self) -> int:
        """Supervised targets of this rank."""
        return sum(batch.kept for batch in self.micro_batches)

    @property
    def dropped(self) -> int:
        """Targets of this rank that the mask leaves out."""
        return sum(batch.dropped for batch in self.micro_batches)


@dataclass(frozen=True)
class ReadOrder:
    """A rolling hash over the global batches read so far, and what it takes to compute its last turn anew."""

    order_hash: str = ""
    """16 hex digits; empty before the first batch."""
    before: str = ""
    """The same one batch earlier."""
    data_hash: str = ""
    """`StepBatch.data_hash` of the last batch."""
    ranges: list[list[int]] = field(default_factory=list)
    """`StepBatch.ranges` of the last batch."""

    def plus(self, data_hash: str, ranges: list[list[int]]) -> ReadOrder:
        """With one more batch."""
        text = f"{self.order_hash} {data_hash}"
        rolled = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        return ReadOrder(rolled, self.order_hash, data_hash, ranges)


class Loader:
    """Training batches of one rank.

    A step takes the next `global_batch_size` samples. Micro-batch m of rank r holds, for i below micro_batch_size, the
    sample first + m * (micro_batch_size * world_size) + r * micro_batch_size + i. So the samples of a step depend on
    the consumed count alone, whatever the number of ranks.

    `mask`: None supervises every target. `prefetch`: steps made ahead. Raises InputError where the sizes do not divide.
    """

    def __init__(
        self,
        stream: SampleStream,
        mask: MaskFn | None,
        micro_batch_size: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 4,
    ) -> None:
        assert 0 <= rank < world_size, (rank, world_size)
        share = micro_batch_size * world_size
        if global_batch_size % share:
            below = global_batch_size // share * share
            near = " or ".join(str(size) for size in (below, below + share) if size > 0)
            raise InputError(
                f"train.global_batch_size={global_batch_size} is not a multiple of train.micro_batch_size="
                f"{micro_batch_size} x {world_size} data-parallel processes = {share}: use {near}, or another "
                "micro-batch size"
            )
        self.stream = stream
        self.mask = mask
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.rank = rank
        self.world_size = world_size
        self.prefetch = prefetch
        self._identity = json.dumps(stream.describe(), sort_keys=True).encode()

    def steps(
        self,
        consumed: int = 0,
        *,
        without: Quarantine | None = None,
        give_up: Callable[[], bool] = lambda: False,
    ) -> Generator[StepBatch | None, None, None]:
        """The steps from sample `consumed` on, without end. Close the iterator, or leave the loop, to end its thread.

        Samples in `without` are left out. While the next step is waited for, `give_up` is asked a few times a second:
        where it says so, None comes in the step's place. An exception of the thread is raised here in its place.
        """
        return _ahead(self._make_steps(consumed, without or Quarantine()), self.prefetch, give_up)

    def step(self, consumed: int) -> StepBatch:
        """The one step that begins at sample `consumed`, made at once."""
        return self._make_step(self.stream.locate(consumed, self.global_batch_size))

    def data_hash(self, ranges: list[list[int]]) -> str:
        """`StepBatch.data_hash` of the global batch with these `StepBatch.ranges`."""
        numbers = [np.arange(first, first + count, dtype=np.int64) for first, count in ranges]
        return self._digest(self.stream.place(np.concatenate(numbers)))

    def _digest(self, locations: Locations) -> str:
        digest = hashlib.blake2b(self._identity, digest_size=8)
        for column in locations:
            digest.update(column.astype("<i8", copy=False).tobytes())
        return digest.hexdigest()

    def _make_step(self, locations: Locations) -> StepBatch:
        batches = []
        share = self.micro_batch_size * self.world_size
        for first in range(self.rank * self.micro_batch_size, self.global_batch_size, share):
            rows = range(first, first + self.micro_batch_size)
            batches.append(make_batch([self.stream.read_at(locations, row) for row in rows], self.mask))
        return StepBatch(batches, number_ranges(locations.number), self._digest(locations))

    def _make_steps(self, position: int, without: Quarantine) -> Iterator[StepBatch]:
        # Finding a few samples costs as much as finding hundreds, so small steps are located many at a time.
        size = self.global_batch_size
        block = max(1, _LOCATED // size) * size
        while True:
            locations = self.stream.place(without.numbers(position, block))
            for first in range(0, block, size):
                yield self._make_step(Locations(*(column[first : first + size] for column in locations)))
            position = int(locations.number[-1]) + 1


class EvalLoader:
    """A fixed set of sequences, the first of a stream, shared out among the ranks; iterating it again gives the same.

    Every rank gets the same number of micro-batches of the same size, as collective operations need. Where the
    sequences do not fill the last ones, the rows left over have no targets (all -100): sums of losses and of counts
    over all ranks are exact. `sequences` is lowered to what the stream holds without repeating itself.
    """

    def __init__(
        self,
        stream: SampleStream,
        sequences: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        mask: MaskFn | None = None,
    ) -> None:
        assert 0 <= rank < world_size and sequences > 0, (rank, world_size, sequences)
        self.stream = stream
        self.mask = mask
        self.rank = rank
        self.world_size = world_size
        self.sequences = min(sequences, stream.unique_samples)
        self.micro_batch_size = min(micro_batch_size, -(-self.sequences // world_size))

    def __len__(self) -> int:
        """Micro-batches of each rank."""
        return -(-self.sequences // (self.micro_batch_size * self.world_size))

    def __iter__(self) -> Iterator[Batch]:
        locations = self.stream.locate(0, self.sequences)
        share = self.micro_batch_size * self.world_size
        for number in range(len(self)):
            first = number * share + self.rank * self.micro_batch_size
            rows = range(first, min(first + self.micro_batch_size, self.sequences))
            # A rank without a sequence of its own computes on the first one and counts nothing.
            samples = [self.stream.read_at(locations, row) for row in rows or [0]]
            yield make_batch(samples, self.mask, rows=self.micro_batch_size, counted=len(rows))


def make_batch(
    samples: Sequence[Sample], mask: MaskFn | None, *, rows: int | None = None, counted: int | None = None
) -> Batch:
    """Samples of one length as a batch of `rows` rows (default: as many), the first `counted` of them supervised.

    Rows beyond the samples repeat the last one without targets.
    """
    drop = None if mask is None else mask(samples)
    rows = len(samples) if rows is None else rows
    counted = len(samples) if counted is None else counted
    halo = samples[0].halo
    length = len(samples[0].tokens) - halo - 1
    tokens = np.empty((rows, length), dtype=np.int64)
    targets = np.empty((rows, length), dtype=np.int64)
    # A row starts a piece even where its document began before it: its attention sees no other row.
    starts = np.ones((rows, length), dtype=np.bool_)
    for row in range(rows):
        sample = samples[min(row, len(samples) - 1)]
        tokens[row] = sample.tokens[halo:-1]
        targets[row] = sample.tokens[halo + 1 :]
        targets[row, sample.document_starts[halo + 1 :]] = IGNORE
        starts[row, 1:] = sample.document_starts[halo + 1 : -1]
    targets[counted:] = IGNORE
    supervised = targets != IGNORE
    dropped = np.zeros_like(supervised)
    if drop is not None:
        np.logical_and(supervised[: len(samples)], drop, out=dropped[: len(samples)])
    bounds = np.append(np.flatnonzero(starts), rows * length)
    count = int(np.count_nonzero(dropped))
    return Batch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        drop=torch.from_numpy(dropped),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        max_seqlen=int(np.diff(bounds).max()),
        sample_ids=[samples[row].number if row < counted else -1 for row in range(rows)],
        kept=int(np.count_nonzero(supervised)) - count,
        dropped=count,
    )


def _ahead(
    source: Iterator[StepBatch], depth: int, give_up: Callable[[], bool]
) -> Generator[StepBatch | None, None, None]:
    """Iterate over `source` in a thread of its own that stays up to `depth` items ahead."""
    items: queue.Queue[tuple[StepBatch | None, BaseException | None]] = queue.Queue(depth)
    stop = threading.Event()
    main = threading.main_thread()

    def put(item: tuple[StepBatch | None, BaseException | None]) -> bool:
        # Woken up now and then, so that the thread ends with the main one even if nobody closes the iterator.
        while not stop.is_set() and main.is_alive():
            try:
                items.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in source:
                if not put((item, None)):
                    return
        except BaseException as error:
            put((None, error))

    # A daemon: a read that never returns (a dead file server) must not keep the program alive.
    thread = threading.Thread(target=work, name="megafish-loader", daemon=True)
    thread.start()
    try:
        while True:
            try:
                item, error = items.get(timeout=_POLL)
            except queue.Empty:
                if give_up():
                    yield None
                continue
            if error is not None:
                raise error
            assert item is not None
            yield item
    finally:
        stop.set()
        thread.join(timeout=_LAST_BATCH)
