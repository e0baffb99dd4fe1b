"""Megatron's files, blends and splits. tests/data/golden/make.py had megatron-core write what is read here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megafish.config import DataConfig, load_config
from megafish.config_megatron import SPLITS, parse_blend, parse_split
from megafish.data.corpus import open_train, open_valid
from megafish.data.indexed import IndexedDataset, IndexedWriter
from megafish.data.megatron import split_range
from megafish.errors import InputError

GOLDEN = Path(__file__).parent / "golden"
DOCUMENTS = [[1, 2, 3], [], [4, 5, 6], [], [7, 8, 9, 10], [5499, 0], []]


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_files_of_megatron_core_are_read(dtype: str) -> None:
    data = IndexedDataset(GOLDEN / f"megatron_{dtype}")
    assert data.dtype == np.dtype(dtype)
    assert [data.document(number).tolist() for number in range(len(data))] == DOCUMENTS
    assert data.num_sequences == 6, "of empty and of several sequences to a document"


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_megatron_core_reads_ours(dtype: str, tmp_path: Path) -> None:
    peer = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 60000, size).tolist() for size in (5, 0, 1, 300, 0, 77)]
    with IndexedWriter(tmp_path / "ours", dtype) as writer:
        for document in documents:
            writer.append(np.array(document, dtype=np.int64))
    data = peer.IndexedDataset(str(tmp_path / "ours"))
    assert data.index.dtype == np.dtype(dtype)
    assert [data[number].tolist() for number in range(len(data))] == documents
    assert data.document_indices.tolist() == list(range(len(documents) + 1))


@pytest.mark.parametrize("split", json.loads((GOLDEN / "megatron_splits.json").read_text()).items(), ids=lambda s: s[0])
def test_splits_are_megatrons(split: tuple[str, dict[str, list[list[int] | None]]]) -> None:
    text, ranges = split
    shares = parse_split(text)
    for count, wanted in ranges.items():
        for name, expected in zip(SPLITS, wanted, strict=True):
            got = split_range(shares, name, int(count))
            assert got == tuple(expected) if expected else got[0] == got[1], (text, count, name)


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """Two hundred documents of 0 to 9 tokens, none twice."""
    rng = np.random.default_rng(1)
    start = 0
    with IndexedWriter(tmp_path / "text_document", "uint16") as writer:
        for size in rng.integers(0, 10, 200).tolist():
            writer.append(np.arange(start, start + size))
            start += size
    return tmp_path / "text_document"


def config(**values: Any) -> DataConfig:
    return DataConfig.model_validate({"sequence_length": 8, **values})


def test_a_split_parts_the_documents(pair: Path) -> None:
    whole = IndexedDataset(pair)
    parts = config(train=str(pair), split="7,2,1")
    (train,), (valid,) = open_train(parts), open_valid(parts)
    for part, (first, last) in ((train.corpus, (0, 140)), (valid.corpus, (140, 180))):
        assert part.num_documents == last - first
        expected = np.concatenate([whole.document(number) for number in range(first, last)])
        np.testing.assert_array_equal(part.data.tokens, expected)
        for number in range(last - first):
            np.testing.assert_array_equal(part.data.document(number), whole.document(first + number))
        # Documents are found in the part as in a file of its own.
        window = part.window(5, 60)
        np.testing.assert_array_equal(window.tokens, expected[5:65])
        firsts = {int(whole.bounds(number)[0]) for number in range(first, last)}
        begin = whole.bounds(first)[0]
        assert [begin + 5 + at for at in np.flatnonzero(window.document_starts)] == [
            place for place in range(begin + 5, begin + 65) if place in firsts
        ]
    assert train.corpus.fingerprint() != valid.corpus.fingerprint()
    assert train.corpus.fingerprint() != open_train(config(train=str(pair)))[0].corpus.fingerprint()


def test_a_blend_in_one_line(pair: Path, tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "small", "uint16") as writer:
        writer.append(np.arange(30))
    weighted = open_train(config(train=f"0.3 {pair} 7e-1 {tmp_path}/small"))
    assert [(source.corpus.path, source.weight) for source in weighted] == [(pair, 0.3), (tmp_path / "small", 0.7)]
    sizes = open_train(config(train=f"{pair} {tmp_path}/small"))
    assert (
        [source.weight for source in sizes]
        == [source.corpus.num_tokens for source in sizes]
        == [
            IndexedDataset(pair).num_tokens,
            30,
        ]
    )


def test_a_path_with_a_space_is_a_path(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "1 text", "uint16") as writer:
        writer.append(np.arange(30))
    assert parse_blend(str(tmp_path / "1 text")) is None
    (source,) = config(train=str(tmp_path / "1 text")).train
    assert source.path == str(tmp_path / "1 text")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"train": "0.3 a 0.7"}, "a blend is `WEIGHT PREFIX WEIGHT PREFIX ...`"),
        ({"train": "0.3 a b c"}, "a blend is"),
        ({"train": "a 0.3 b 0.7"}, "a blend is"),
        ({"train": "0 a 1 b"}, "weight"),
        ({"train": "a", "split": "9,x"}, "expected up to three numbers"),
        ({"train": "a", "split": "1,2,3,4"}, "expected up to three numbers"),
        ({"train": "a", "split": "9,-1"}, "expected up to three numbers"),
        ({"train": "a", "split": "0,1"}, "leaves nothing for training"),
        ({"train": "a", "valid": "b", "split": "9,1"}, "leave out one of them"),
        ({"train": [{"path": "a", "weight": "size"}, "b"]}, "give all of them one kind"),
    ],
)
def test_what_makes_no_sense_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config(**values)


def test_a_split_is_read_from_a_command_line() -> None:
    settings = ["data.split=969,30,1", "data.train=a 0.5 b"]
    with pytest.raises(InputError, match="a blend is"):
        load_config("tiny", settings)
    assert load_config("tiny", ["data.split=969,30,1", "data.train=1 a 0.5 b"]).data.split == "969,30,1"
    assert load_config("tiny", ["data.split=9,1", "data.train=a"]).data.shares == (0.9, 0.1, 0.0)


def test_text_that_cannot_be_split_is_named(pair: Path, corpus: Path) -> None:
    with pytest.raises(InputError, match="documents of one sequence each"):
        open_train(config(train=str(GOLDEN / "megatron_uint16"), split="9,1"))
    with pytest.raises(InputError, match=r"leaves no text of 200 documents for valid"):
        open_valid(config(train=str(pair), split="9999,1"))
    with pytest.raises(InputError, match="has a split of its own"):
        open_train(config(train=str(corpus), split="9,1"))
