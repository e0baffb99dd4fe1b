"""The order of samples: a pure function of (seed, sample number), with no state and nothing to build at start-up.

One pass over a source of N tokens is floor(N / S) chunks of S tokens. Pass e begins at a pseudo-random token o of the
stream, taken as a circle, so that the chunk borders and the N mod S tokens left over are others in each pass. Chunk c
is the tokens o + c*S ... o + (c+1)*S: S inputs, and the same shifted by one as targets. Chunks are visited in a
pseudo-random permutation: a Feistel network over the next power of 4, walked along its cycle until it lands inside
(Black and Rogaway 2002, "Ciphers with arbitrary finite domains", method 3), which needs no table.

Sources are blended by a fixed pattern of 65,536 slots in which every source is always less than one sample away from
its exact share.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megafish.errors import InputError

SLOTS = 65536
"""Slots of the blend pattern: weights are rounded to multiples of 1 / 65,536."""

ORDER = "megafish-order-v1"
"""Name of this order. Whatever would change the sequence of samples must change the name."""

_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15

UInts = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]


class Locations(NamedTuple):
    """Where samples come from. Each field is int64 [n]."""

    number: Ints
    """Number of the sample in the run."""
    source: Ints
    """Which source."""
    epoch: Ints
    """Which pass over that source."""
    start: Ints
    """First input token, as an offset into the source's stream."""


class SampleOrder:
    """Maps sample numbers of a run to places in its sources.

    `tokens`: length of each source's stream, all longer than `sequence_length` (S). `weights`: share of the samples of
    each, positive. The constructor costs milliseconds for any length; `locate` some microseconds a sample.
    """

    def __init__(self, tokens: Sequence[int], weights: Sequence[float], sequence_length: int, seed: int) -> None:
        assert len(tokens) == len(weights) > 0 and min(tokens) > sequence_length, (tokens, weights, sequence_length)
        self.sequence_length = sequence_length
        self.seed = seed
        self.tokens = list(tokens)
        self.chunks = [n // sequence_length for n in tokens]
        """Samples in one pass over each source."""
        self.slots = blend_slots(weights)
        """Slots of each source in the blend pattern."""
        self._pattern = blend_pattern(self.slots)
        # Turn of a slot: how many slots before it, in the same pattern, belong to the same source.
        self._turn = np.empty(SLOTS, dtype=np.int64)
        for source in range(len(tokens)):
            mine = np.flatnonzero(self._pattern == source)
            self._turn[mine] = np.arange(len(mine))
        root = _mix(np.array([seed % 2**64], dtype=np.uint64))
        self._keys = [_draw(root, source) for source in range(len(tokens))]

    @property
    def unique_samples(self) -> int:
        """How many samples of the run come before any source begins its second pass."""
        first_repeats = []
        for source, chunks in enumerate(self.chunks):
            rounds, turn = divmod(chunks, self.slots[source])
            slot = int(np.flatnonzero(self._pattern == source)[turn])
            first_repeats.append(rounds * SLOTS + slot)
        return min(first_repeats)

    def epochs(self, consumed: int) -> list[float]:
        """Passes made over each source once the first `consumed` samples of the run are read."""
        rounds, slot = divmod(consumed, SLOTS)
        within = np.bincount(self._pattern[:slot], minlength=len(self.slots))
        return [
            (rounds * slots + int(extra)) / chunks
            for slots, extra, chunks in zip(self.slots, within, self.chunks, strict=True)
        ]

    def locate(self, first: int, count: int) -> Locations:
        """Places of the samples first ... first + count - 1."""
        return self.place(np.arange(first, first + count, dtype=np.int64))

    def place(self, number: Ints) -> Locations:
        """Places of the samples with these numbers, int64 [n]."""
        slot = number % SLOTS
        source = self._pattern[slot].astype(np.int64)
        epoch, start = np.empty_like(number), np.empty_like(number)
        for which in np.unique(source):
            rows = np.flatnonzero(source == which)
            turns = number[rows] // SLOTS * self.slots[which] + self._turn[slot[rows]]
            epoch[rows] = turns // self.chunks[which]
            start[rows] = self._starts(int(which), turns)
        return Locations(number, source, epoch, start)

    def _starts(self, source: int, turns: Ints) -> Ints:
        """First tokens of a source's samples, given their places in the sequence of this source's samples alone."""
        chunks, tokens = self.chunks[source], self.tokens[source]
        epoch, index = np.divmod(turns, chunks)
        keys = _draw(self._keys[source], epoch.astype(np.uint64))
        offset = (_draw(keys, _ROUNDS) % np.uint64(tokens)).astype(np.int64)
        chunk = permute(index.astype(np.uint64), chunks, keys).astype(np.int64)
        return (offset + chunk * self.sequence_length) % tokens


def permute(index: UInts, size: int, keys: UInts) -> UInts:
    """Pseudo-random permutation of 0 ... size - 1, one for each key: the image of each index. All arrays [n]."""
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    rounds = [_draw(keys, number) for number in range(_ROUNDS)]
    image = index.copy()
    walking = np.arange(len(index))
    while walking.size:
        left, right = image[walking] >> half, image[walking] & low
        for round_keys in rounds:
            left, right = right, left ^ (_mix(right + round_keys[walking]) & low)
        image[walking] = (left << half) | right
        walking = walking[image[walking] >= size]
    return image


def blend_slots(weights: Sequence[float]) -> list[int]:
    """Slots of each source out of 65,536: shares rounded by largest remainder, so that they add up exactly."""
    total = float(sum(weights))
    exact = [weight / total * SLOTS for weight in weights]
    slots = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda source: (slots[source] - exact[source], source))
    for source in by_remainder[: SLOTS - sum(slots)]:
        slots[source] += 1
    for source, count in enumerate(slots):
        if count == 0:
            raise InputError(
                f"source {source}: weight {weights[source]} of {total} is below 1/{SLOTS} of the samples: "
                "raise it or leave the source out"
            )
    return slots


def blend_pattern(slots: Sequence[int]) -> npt.NDArray[np.uint16]:
    """Source of each of the 65,536 slots, uint16.

    Turn t of a source with share w may not come before slot floor(t / w) nor after slot ceil((t + 1) / w) - 1; the
    earliest deadline goes first. Each source then has less than one sample too many or too few after any number of
    slots (Baruah et al. 1996, "Proportionate progress", for one resource).
    """
    pattern = np.zeros(SLOTS, dtype=np.uint16)
    if len(slots) == 1:
        return pattern
    waiting = [(0, source) for source in range(len(slots))]
    ready: list[tuple[int, int]] = []
    turns = [0] * len(slots)
    for slot in range(SLOTS):
        while waiting and waiting[0][0] <= slot:
            source = heapq.heappop(waiting)[1]
            heapq.heappush(ready, (-(-(turns[source] + 1) * SLOTS // slots[source]), source))
        deadline, source = heapq.heappop(ready)
        assert slot < deadline, (slot, deadline, source)
        pattern[slot] = source
        turns[source] += 1
        heapq.heappush(waiting, (turns[source] * SLOTS // slots[source], source))
    return pattern


def _mix(state: UInts) -> UInts:
    """The output step of splitmix64 (Steele, Lea and Flood 2014): a bijection of 64 bits that mixes well."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _draw(keys: UInts, number: int | UInts) -> UInts:
    """Draw `number` of the splitmix64 stream seeded with each key."""
    if isinstance(number, int):
        # Python's integers: numpy warns when a scalar product wraps around, as this one is meant to.
        return _mix(keys + np.uint64((number + 1) * _GOLDEN % 2**64))
    return _mix(keys + (number + np.uint64(1)) * np.uint64(_GOLDEN))
