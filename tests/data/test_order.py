"""The order of samples: permutations, full passes, exact blends, and that nothing but (seed, number) decides."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from megafish.data.order import SLOTS, SampleOrder, blend_pattern, blend_slots, permute
from megafish.errors import InputError


def permuted(size: int, key: int) -> list[int]:
    keys = np.full(size, key, dtype=np.uint64)
    return [int(image) for image in permute(np.arange(size, dtype=np.uint64), size, keys)]


@pytest.mark.parametrize("size", [*range(1, 40), 255, 256, 257, 4099])
def test_permutation_is_a_bijection(size: int) -> None:
    for key in (0, 1, 2**64 - 1):
        assert sorted(permuted(size, key)) == list(range(size))


def test_permutation_of_a_large_range_stays_inside_without_collisions() -> None:
    size = 10**12 + 39
    index = np.arange(size - 20000, size, dtype=np.uint64)
    images = permute(index, size, np.full(20000, 5, dtype=np.uint64))
    assert images.max() < size
    assert len(np.unique(images)) == 20000
    # Neighbours must be scattered over the whole range: the images are uniform (Kolmogorov-Smirnov).
    assert stats.kstest(images.astype(np.float64) / size, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("size", [3, 7, 12])
def test_every_place_is_equally_likely(size: int) -> None:
    keys = np.arange(4000, dtype=np.uint64) * np.uint64(2**40 + 7)
    for index in (0, size - 1):
        images = permute(np.full(4000, index, dtype=np.uint64), size, keys)
        counts = np.bincount(images.astype(np.int64), minlength=size)
        assert stats.chisquare(counts).pvalue > 1e-4, counts


@pytest.mark.parametrize(("tokens", "length"), [(96, 8), (103, 8), (9, 8), (17, 16)])
def test_one_pass_covers_the_stream_once(tokens: int, length: int) -> None:
    order = SampleOrder([tokens], [1.0], length, seed=3)
    chunks = tokens // length
    orders, offsets = set(), set()
    for epoch in range(6):
        places = order.locate(epoch * chunks, chunks)
        assert places.epoch.tolist() == [epoch] * chunks
        inputs = [(int(start) + i) % tokens for start in places.start for i in range(length)]
        targets = [(place + 1) % tokens for place in inputs]
        # No token twice; all of them but the remainder, and all of them where the length divides the stream.
        assert len(set(inputs)) == len(set(targets)) == chunks * length
        orders.add(tuple(places.start.tolist()))
        offsets.add(min(places.start.tolist()) % length)
    assert len(orders) > 1
    assert len(offsets) > 1, "every pass cuts the stream at the same places"


def test_wraps_around_the_end() -> None:
    order = SampleOrder([100], [1.0], 30, seed=1)
    starts = order.locate(0, 300).start
    assert starts.min() >= 0
    assert starts.max() < 100
    assert (starts > 70).any(), "no sample crosses the end of the stream in 100 passes"


def test_pure_function_of_seed_and_number() -> None:
    def order(seed: int = 9) -> SampleOrder:
        return SampleOrder([5000, 700, 90], [3.0, 2.0, 1.0], 16, seed)

    whole = order().locate(0, 4000)
    for first, count in [(0, 1), (17, 1), (3999, 1), (100, 64), (3000, 1000)]:
        part = order().locate(first, count)
        for field, full in zip(part, whole, strict=True):
            np.testing.assert_array_equal(field, full[first : first + count])
    other = order(10).locate(0, 4000)
    np.testing.assert_array_equal(whole.source, other.source)
    assert (whole.start != other.start).mean() > 0.9
    far = order().locate(10**15, 3)
    assert far.number.tolist() == [10**15, 10**15 + 1, 10**15 + 2]


def test_equal_sources_are_read_in_different_orders() -> None:
    places = SampleOrder([4096, 4096], [1.0, 1.0], 16, seed=0).locate(0, 400)
    first, second = (places.start[places.source == source].tolist() for source in (0, 1))
    assert first != second


FROZEN_SOURCES = [0, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 1]
FROZEN_EPOCHS = [1409, 2427, 1409, 1409, 1409, 2427, 1409, 1409, 2427, 1409, 1409, 2427]
FROZEN_STARTS = [958, 239, 766, 310, 478, 207, 278, 342, 3, 574, 118, 271]


def test_order_is_frozen() -> None:
    """A resumed run must see the sequence it was started with: a change here needs a new name for the order."""
    places = SampleOrder([1000, 300], [2.0, 1.0], 32, seed=7).locate(65530, 12)
    assert places.source.tolist() == FROZEN_SOURCES
    assert places.epoch.tolist() == FROZEN_EPOCHS
    assert places.start.tolist() == FROZEN_STARTS


def counts_before(pattern: npt.NDArray[np.uint16], source: int) -> npt.NDArray[np.int64]:
    return np.concatenate(([0], np.cumsum(pattern == source)))


@pytest.mark.parametrize(
    "weights",
    [[1, 1], [1, 2], [0.7, 0.2, 0.1], [1, 1000], [1, 1, 1, 65533], list(range(1, 40)), [0.5, 0.25, 0.125] * 3],
)
def test_blend_is_exact_at_every_prefix(weights: list[float]) -> None:
    slots = blend_slots(weights)
    assert sum(slots) == SLOTS
    share = np.array(weights) / sum(weights)
    assert np.abs(np.array(slots) / SLOTS - share).max() < 1 / SLOTS
    pattern = blend_pattern(slots)
    n = np.arange(SLOTS + 1)
    for source, count in enumerate(slots):
        # In integers: |taken - n * count / SLOTS| < 1.
        assert np.abs(counts_before(pattern, source) * SLOTS - n * count).max() < SLOTS
    np.testing.assert_array_equal(np.bincount(pattern, minlength=len(slots)), slots)


def test_random_blends_are_exact() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        slots = blend_slots((rng.pareto(1.0, size=int(rng.integers(2, 12))) + 0.1).tolist())
        pattern = blend_pattern(slots)
        for source, count in enumerate(slots):
            assert np.abs(counts_before(pattern, source) * SLOTS - np.arange(SLOTS + 1) * count).max() < SLOTS


def test_weight_too_small() -> None:
    with pytest.raises(InputError, match="source 1: weight 1e-09"):
        blend_slots([1.0, 1e-9])


def test_each_source_advances_by_its_own_samples() -> None:
    order = SampleOrder([2000, 500], [3.0, 1.0], 10, seed=2)
    n = SLOTS + 700
    places = order.locate(0, n)
    for source, chunks in enumerate(order.chunks):
        mine = np.flatnonzero(places.source == source)
        assert places.epoch[mine].tolist() == [turn // chunks for turn in range(len(mine))]
    for consumed in (0, 1, 5000, SLOTS, n):
        taken = np.bincount(places.source[:consumed], minlength=2)
        assert order.epochs(consumed) == pytest.approx([taken[0] / 200, taken[1] / 50])
    repeats = np.flatnonzero(places.epoch > 0)
    assert order.unique_samples == repeats[0]


def test_unique_samples_of_one_source() -> None:
    assert SampleOrder([1003], [5.0], 10, seed=0).unique_samples == 100
    assert SampleOrder([10 * SLOTS * 3 + 1], [5.0], 10, seed=0).unique_samples == 3 * SLOTS
