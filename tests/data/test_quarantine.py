"""Samples that are left out: the sequence of the others depends neither on processes nor on batch sizes."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from megafish.data.corpus import Corpus, SampleStream, SourceSpec
from megafish.data.indexed import IndexedWriter
from megafish.data.loader import Loader
from megafish.data.quarantine import Quarantine, append_entry, read_entries
from megafish.errors import InputError


def test_numbers_are_those_that_a_plain_search_finds() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        ranges = [(int(rng.integers(0, 60)), int(rng.integers(1, 12))) for _ in range(rng.integers(0, 6))]
        left_out = {number for first, count in ranges for number in range(first, first + count)}
        quarantine = Quarantine(ranges)
        assert len(quarantine) == len(left_out)
        position, count = int(rng.integers(0, 70)), int(rng.integers(1, 40))
        expected = [number for number in range(position, position + 200) if number not in left_out][:count]
        assert quarantine.numbers(position, count).tolist() == expected, (ranges, position, count)


def test_ranges_that_touch_are_one() -> None:
    quarantine = Quarantine([(8, 4), (0, 2)]).with_range(12, 4).with_range(1, 3)
    assert quarantine.ranges == [(0, 4), (8, 8)]
    assert len(quarantine) == 12
    assert not Quarantine()


def test_the_file_keeps_every_entry(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    assert read_entries(path) == [] and len(Quarantine.read(path)) == 0
    for first in (16, 0):
        append_entry(path, {"step": 3, "first_sample": first, "samples": 8, "fault": "loss nan"})
    assert [entry["first_sample"] for entry in read_entries(path)] == [16, 0]
    assert Quarantine.read(path).ranges == [(0, 8), (16, 8)]


@pytest.mark.parametrize(
    "line",
    ["{", "[1, 2]", '{"first_sample": 3}', '{"first_sample": -1, "samples": 2}', '{"first_sample": 0.5, "samples": 2}'],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "quarantine.jsonl"
    path.write_text(f'{{"first_sample": 0, "samples": 8}}\n{line}\n')
    with pytest.raises(InputError, match=r"quarantine.jsonl: line 2: expected"):
        Quarantine.read(path)


@pytest.fixture
def stream(tmp_path: Path) -> SampleStream:
    with IndexedWriter(tmp_path / "corpus", "uint16") as writer:
        writer.append(np.arange(900))
    return SampleStream([SourceSpec(Corpus(tmp_path / "corpus"))], 8, seed=1, halo=0)


def read(stream: SampleStream, without: Quarantine, batch: int, world: int, steps: int, position: int = 0) -> list[int]:
    """Sample numbers in the order of a run."""
    micro = batch // world
    found: list[list[int]] = [[] for _ in range(steps)]
    for rank in range(world):
        batches = Loader(stream, None, micro, batch, rank, world).steps(position, without=without)
        for step in range(steps):
            made = next(batches)
            found[step] += [number for part in made.micro_batches for number in part.sample_ids]
            assert made.end == max(made.end, *found[step]), "the next step begins behind this one"
        batches.close()
    return [number for step in found for number in sorted(step)]


def test_every_batch_size_and_number_of_processes_reads_the_same_sequence(stream: SampleStream) -> None:
    without = Quarantine([(4, 8), (13, 1), (1020, 30)])  # the last one lies across two blocks of located samples
    expected = [number for number in range(1200) if number not in {*range(4, 12), 13, *range(1020, 1050)}]
    for batch, world in ((4, 1), (4, 2), (12, 3)):
        assert read(stream, without, batch, world, 48 // batch) == expected[:48]
    assert read(stream, without, 8, 1, 20, position=1000) == [number for number in expected if number >= 1000][:160]


def test_a_step_says_where_the_next_one_begins(stream: SampleStream) -> None:
    without = Quarantine([(4, 8)])
    batches = Loader(stream, None, 4, 4).steps(2, without=without)
    one, two = next(batches), next(batches)
    assert [(step.first_sample, step.end) for step in (one, two)] == [(2, 14), (14, 18)]
    assert one.ranges == [[2, 2], [12, 2]] and two.ranges == [[14, 4]]
    # A resume computes the hash anew from the ranges alone, whatever is in quarantine by then.
    assert Loader(stream, None, 4, 4).data_hash(one.ranges) == one.data_hash
    batches.close()
    # Left out in the middle of a run, a batch is passed over: what comes after it stays what it was.
    assert read(stream, without.with_range(14, 4), 4, 1, 2, position=14) == list(range(18, 26))


def test_waiting_for_a_batch_can_be_given_up(stream: SampleStream) -> None:
    def never(samples: object) -> np.ndarray:
        waiting.wait()
        raise InputError("too late")

    waiting = threading.Event()
    batches = Loader(stream, never, 2, 2).steps(give_up=lambda: True)
    assert next(batches) is None
    waiting.set()
    batches.close()
