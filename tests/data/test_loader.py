"""Batches against the documents, at any number of ranks, and the thread that makes them."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from megafish.data import loader as loader_module
from megafish.data.corpus import Corpus, Sample, SampleStream, SourceSpec
from megafish.data.indexed import IndexedWriter
from megafish.data.loader import IGNORE, Batch, EvalLoader, Loader
from megafish.errors import InputError

S = 16


@pytest.fixture
def stream(tmp_path: Path) -> SampleStream:
    return make_stream(tmp_path / "corpus")


def make_stream(prefix: Path, seed: int = 4, halo: int = 3, corpus_seed: int = 0) -> SampleStream:
    """Documents of 1 to 25 tokens, 700 in all, no id twice: an id tells its place in the stream."""
    rng = np.random.default_rng(corpus_seed)
    cuts = np.flatnonzero(rng.random(700) < 0.1)
    with IndexedWriter(prefix, "uint16") as writer:
        for doc in np.split(np.arange(700) + 1000 * corpus_seed, cuts[cuts > 0]):
            writer.append(doc)
    return SampleStream([SourceSpec(Corpus(prefix))], S, seed, halo)


def thirds(samples: Sequence[Sample]) -> npt.NDArray[np.bool_]:
    """A mask that follows from the target alone."""
    return np.stack([sample.tokens[sample.halo + 1 :] % 3 == 0 for sample in samples])


def first_tokens(stream: SampleStream) -> set[int]:
    data = stream.sources[0].corpus.data
    return {int(data.document(i)[0]) for i in range(len(data))}


def check(batch: Batch, stream: SampleStream, masked: bool = True) -> None:
    firsts = first_tokens(stream)
    starts, dropped, kept = [], 0, 0
    flat = 0
    for row, number in enumerate(batch.sample_ids):
        begin = int(stream.locate(number, 1).start[0])
        for column in range(S):
            token, target = (begin + column) % 700, (begin + column + 1) % 700
            assert int(batch.tokens[row, column]) == token
            assert int(batch.targets[row, column]) == (IGNORE if target in firsts else target)
            drop = masked and target not in firsts and target % 3 == 0
            assert bool(batch.drop[row, column]) == drop
            dropped += drop
            kept += not drop and target not in firsts
            if column == 0 or token in firsts:
                starts.append(flat)
            flat += 1
    assert batch.cu_seqlens.tolist() == [*starts, flat]
    assert batch.max_seqlen == max(np.diff([*starts, flat]))
    assert (batch.kept, batch.dropped) == (kept, dropped)


def test_batches_against_the_documents(stream: SampleStream) -> None:
    loader = Loader(stream, thirds, micro_batch_size=4, global_batch_size=8)
    for consumed in range(0, 160, 8):
        step = loader.step(consumed)
        assert [number for batch in step.micro_batches for number in batch.sample_ids] == [
            *range(consumed, consumed + 8)
        ]
        for batch in step.micro_batches:
            check(batch, stream)
        assert step.kept + step.dropped == sum(int((b.targets != IGNORE).sum()) for b in step.micro_batches)
    assert (batch.tokens.dtype, batch.targets.dtype) == (torch.int64, torch.int64)
    assert (batch.drop.dtype, batch.cu_seqlens.dtype) == (torch.bool, torch.int32)
    for batch in Loader(stream, None, 4, 8).step(0).micro_batches:
        check(batch, stream, masked=False)
        assert batch.dropped == 0 < batch.kept


@pytest.mark.parametrize(("micro", "world"), [(1, 1), (3, 1), (12, 1), (1, 4), (3, 2), (2, 3), (1, 12)])
def test_any_number_of_ranks_sees_the_same_samples(stream: SampleStream, micro: int, world: int) -> None:
    reference = Loader(stream, thirds, 12, 12).step(24)
    ranks = [Loader(stream, thirds, micro, 12, rank, world).step(24) for rank in range(world)]
    assert {step.data_hash for step in ranks} == {reference.data_hash}
    rows = {}
    for rank, step in enumerate(ranks):
        assert step.first_sample == 24
        for number, batch in enumerate(step.micro_batches):
            first = 24 + number * micro * world + rank * micro
            assert batch.sample_ids == list(range(first, first + micro))
            for row, sample in enumerate(batch.sample_ids):
                rows[sample] = (batch.tokens[row], batch.targets[row], batch.drop[row])
    whole = reference.micro_batches[0]
    for row in range(12):
        for field, expected in zip(rows[24 + row], (whole.tokens, whole.targets, whole.drop), strict=True):
            assert torch.equal(field, expected[row])
    assert sum(step.kept for step in ranks) == reference.kept


def test_resuming_and_another_batch_size_continue_the_sequence(stream: SampleStream) -> None:
    steps = Loader(stream, thirds, 2, 4).steps()
    undisturbed = [next(steps) for _ in range(6)]
    steps.close()
    resumed = Loader(stream, thirds, 2, 4).steps(consumed=12)
    for expected in undisturbed[3:]:
        found = next(resumed)
        assert (found.data_hash, found.first_sample) == (expected.data_hash, expected.first_sample)
        for one, other in zip(found.micro_batches, expected.micro_batches, strict=True):
            assert torch.equal(one.tokens, other.tokens)
    resumed.close()
    larger = Loader(stream, thirds, 2, 6).steps(consumed=12)
    assert [number for batch in next(larger).micro_batches for number in batch.sample_ids] == list(range(12, 18))
    larger.close()


@pytest.mark.parametrize("located", [1, 9])
def test_steps_located_together_or_alone_are_the_same(
    stream: SampleStream, monkeypatch: pytest.MonkeyPatch, located: int
) -> None:
    monkeypatch.setattr(loader_module, "_LOCATED", located)
    loader = Loader(stream, thirds, 2, 4)
    steps = loader.steps(consumed=8)
    for number in range(6):
        found, alone = next(steps), loader.step(8 + 4 * number)
        assert (found.first_sample, found.data_hash) == (alone.first_sample, alone.data_hash)
        assert [batch.sample_ids for batch in found.micro_batches] == [
            batch.sample_ids for batch in alone.micro_batches
        ]
    steps.close()


def test_data_hash_names_the_samples_and_the_corpus(tmp_path: Path) -> None:
    def digest(stream: SampleStream, consumed: int = 0, batch: int = 4) -> str:
        return Loader(stream, None, 1, batch).step(consumed).data_hash

    base = digest(make_stream(tmp_path / "a"))
    assert len(base) == 16
    assert int(base, 16) >= 0
    assert digest(make_stream(tmp_path / "copy", halo=7)) == base
    others = [
        digest(make_stream(tmp_path / "a"), consumed=4),
        digest(make_stream(tmp_path / "a"), batch=5),
        digest(make_stream(tmp_path / "a", seed=5)),
        digest(make_stream(tmp_path / "b", corpus_seed=1)),
    ]
    assert len({base, *others}) == 5


@pytest.mark.parametrize(
    ("micro", "batch", "world", "advice"),
    [(4, 30, 2, "use 24 or 32"), (8, 5, 1, "use 8"), (3, 32, 5, "use 30 or 45")],
)
def test_batch_sizes_that_do_not_divide(stream: SampleStream, micro: int, batch: int, world: int, advice: str) -> None:
    with pytest.raises(InputError) as caught:
        Loader(stream, None, micro, batch, 0, world)
    message = str(caught.value)
    assert all(text in message for text in (f"={batch}", f"={micro}", f"{world} data-parallel processes", advice)), (
        message
    )


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "megafish-loader"]


def test_exception_of_the_thread_reaches_the_consumer(stream: SampleStream) -> None:
    def failing(samples: Sequence[Sample]) -> npt.NDArray[np.bool_]:
        if samples[0].number >= 4:
            raise InputError("document 7 is damaged")
        return thirds(samples)

    steps = Loader(stream, failing, 2, 2, prefetch=3).steps()
    assert [next(steps).first_sample for _ in range(2)] == [0, 2]
    with pytest.raises(InputError, match="document 7 is damaged"):
        next(steps)
    assert loader_threads() == []


def test_thread_ends_with_the_loop_and_stays_within_its_lead(stream: SampleStream) -> None:
    made = []

    def counting(samples: Sequence[Sample]) -> npt.NDArray[np.bool_]:
        made.append(samples[0].number)
        return thirds(samples)

    steps = Loader(stream, counting, 1, 1, prefetch=3).steps()
    for number in range(5):
        assert next(steps).first_sample == number
    deadline = time.monotonic() + 10
    while len(made) < 9 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    # 5 taken, 3 waiting in the queue, 1 made and waiting for a place.
    assert made == list(range(9))
    assert len(loader_threads()) == 1
    steps.close()
    assert loader_threads() == []


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {folder!r})
from test_loader import make_stream, Loader
steps = Loader(make_stream(Path({prefix!r})), None, 1, 1).steps()
for step in steps:
    raise KeyboardInterrupt
"""


def test_interrupted_program_ends(tmp_path: Path) -> None:
    """Ctrl-C in the loop: nobody closes the iterator, and the thread must not keep the program alive."""
    script = SCRIPT.format(folder=str(Path(__file__).parent), prefix=str(tmp_path / "corpus"))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert result.returncode != 0
    assert result.stderr.strip().endswith("KeyboardInterrupt"), result.stderr
    assert result.stderr.count("Traceback") == 1, result.stderr


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("micro", [1, 2, 4, 100])
def test_evaluation_counts_every_sequence_once(stream: SampleStream, micro: int, world: int) -> None:
    sequences = 7
    expected: dict[int, list[int]] = {}
    for number in range(sequences):
        sample = stream.read(number)
        targets = sample.tokens[sample.halo + 1 :].copy()
        targets[sample.document_starts[sample.halo + 1 :]] = IGNORE
        expected[number] = targets.tolist()
    seen: dict[int, list[int]] = {}
    shapes = set()
    kept = 0
    for rank in range(world):
        loader = EvalLoader(stream, sequences, micro, rank, world)
        batches = list(loader)
        shapes.add((len(loader), len(batches), *(tuple(batch.tokens.shape) for batch in batches)))
        for batch in batches:
            kept += batch.kept
            assert batch.cu_seqlens[-1] == batch.tokens.numel()
            for row, number in enumerate(batch.sample_ids):
                if number == -1:
                    assert (batch.targets[row] == IGNORE).all()
                    assert not batch.drop[row].any()
                else:
                    assert number not in seen
                    seen[number] = batch.targets[row].tolist()
    assert seen == expected
    assert len(shapes) == 1, "ranks differ in their number of micro-batches or in their sizes"
    assert kept == sum(target != IGNORE for row in expected.values() for target in row)


def test_evaluation_with_a_mask_and_again(stream: SampleStream) -> None:
    loader = EvalLoader(stream, 6, 4, mask=thirds)
    first, second = list(loader), list(loader)
    check(first[0], stream)
    assert first[1].sample_ids == [4, 5, -1, -1]
    assert first[1].dropped == int(((first[1].targets % 3 == 0) & (first[1].targets != IGNORE)).sum()) > 0
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.drop, other.drop)


def test_evaluation_never_repeats_the_corpus(stream: SampleStream) -> None:
    loader = EvalLoader(stream, 10**6, 8)
    assert loader.sequences == 700 // S
    assert sum(number >= 0 for batch in loader for number in batch.sample_ids) == 700 // S
