"""Against a plain count of every n-gram."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megafish.data.duplicates import Duplicates, bin_bounds, duplicate_bin
from megafish.data.indexed import IndexedWriter
from megafish.errors import InputError

pytest.importorskip("tokengrams")

Documents = list[list[int]]


def write(folder: Path, documents: Documents, dtype: str = "uint16") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(folder / "pair", dtype) as writer:
        for document in documents:
            writer.append(np.array(document, dtype=np.int64))
    return folder / "pair"


def count(documents: Documents, length: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(document[i : i + length]) for document in documents for i in range(len(document) - length + 1))


def found(duplicates: Duplicates, length: int, minimum: int = 1, block: int = 1 << 22) -> dict[tuple[int, ...], int]:
    groups = [tuple(row) for part in duplicates.groups(length, minimum, block=block) for row in part.tolist()]
    texts = {tuple(duplicates.data.tokens[start : start + length].tolist()): n for start, n in groups}
    assert len(texts) == len(groups), "every n-gram is listed once"
    return texts


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(st.lists(st.integers(0, 2), max_size=14), min_size=1, max_size=8).filter(any),
    length=st.integers(1, 6),
    block=st.sampled_from([1, 2, 7, 1000]),
    dtype=st.sampled_from(["uint16", "int32"]),
)
def test_against_a_plain_count(
    tmp_path_factory: pytest.TempPathFactory, documents: Documents, length: int, block: int, dtype: str
) -> None:
    """Few different tokens, empty documents, documents shorter than the n-gram, blocks of any size."""
    pair = write(tmp_path_factory.mktemp("pair"), documents, dtype)
    expected = count(documents, length)
    duplicates = Duplicates.of(pair, progress=False)
    assert found(duplicates, length, block=block) == expected
    assert found(duplicates, length, 2, block) == {ngram: n for ngram, n in expected.items() if n > 1}
    some = [*list(expected)[:4], (9,) * length]
    assert duplicates.count(some) == [expected[ngram] for ngram in some]
    histogram = duplicates.histogram(length)
    assert sum(distinct for distinct, _ in histogram.values()) == len(expected)
    assert sum(occurrences for _, occurrences in histogram.values()) == expected.total()
    for passage in duplicates.most_repeated(length, 3):
        text = tuple(duplicates.data.tokens[passage.start : passage.start + passage.length].tolist())
        assert count(documents, len(text))[text] == passage.count >= 2
        for longer in count(documents, len(text) + 1).items():
            inside = text in (longer[0][1:], longer[0][:-1])
            assert not inside or longer[1] < passage.count, "it could be longer"


def test_the_token_that_ends_a_document_is_no_part(corpus: Path) -> None:
    duplicates = Duplicates.of(corpus, progress=False)
    eos = duplicates.eos_id
    for start, _ in (row for part in duplicates.groups(3) for row in part.tolist()):
        assert eos not in duplicates.data.tokens[start : start + 3]


def test_canaries_are_counted(corpus: Path) -> None:
    lines = [json.loads(line) for line in (corpus / "canaries.jsonl").read_text().splitlines()]
    duplicates = Duplicates.of(corpus, progress=False)
    counts = duplicates.count([line["tokens"] for line in lines])
    assert counts == [line["exposures"] for line in lines]
    length = len(lines[0]["tokens"])
    top = {
        tuple(duplicates.data.tokens[p.start : p.start + p.length].tolist()): p.count
        for p in duplicates.most_repeated(length, 1000)
    }
    for line in lines:
        if line["exposures"] > 1:
            assert top[tuple(line["tokens"])] == line["exposures"], "listed once, at its whole length"


def test_sample_by_duplication(tmp_path: Path) -> None:
    random = np.random.Generator(np.random.Philox(3))
    documents = [random.integers(0, 5, 400).tolist() for _ in range(5)]
    expected = count(documents, 3)
    duplicates = Duplicates.of(write(tmp_path, documents), progress=False)
    bins = duplicates.sample_by_duplication(3, 4, seed=0)
    assert set(bins) == {duplicate_bin(n) for n in expected.values()}
    for number, items in bins.items():
        texts = [tuple(duplicates.data.tokens[one.start : one.start + 3].tolist()) for one in items]
        assert len(set(texts)) == len(texts) == min(4, sum(duplicate_bin(n) == number for n in expected.values()))
        assert [one.count for one in items] == [expected[text] for text in texts]
        for one in items:
            first, last = duplicates.data.bounds(one.document)
            assert first <= one.start and one.start + 3 <= last
    assert duplicates.sample_by_duplication(3, 4, seed=0) == bins
    assert duplicates.sample_by_duplication(3, 4, seed=1) != bins


def test_the_array_is_kept_and_checked(tmp_path: Path) -> None:
    pair = write(tmp_path, [[1, 2, 3]] * 4)
    Duplicates.of(pair, progress=False)
    assert {entry.name for entry in tmp_path.iterdir()} == {
        "pair.bin", "pair.idx", "pair.suffixes", "pair.suffixes.json"
    }  # fmt: skip
    stamp = (tmp_path / "pair.suffixes").stat().st_mtime_ns
    Duplicates.of(pair, progress=False)
    assert (tmp_path / "pair.suffixes").stat().st_mtime_ns == stamp
    (tmp_path / "pair.suffixes").write_bytes(b"")
    with pytest.raises(InputError, match=r"pair\.suffixes: 0 bytes instead of 96: it was cut off"):
        Duplicates.of(pair, progress=False)
    write(tmp_path, [[1, 2, 4]] * 4)
    with pytest.raises(InputError, match=r"not of .*pair\.bin as it is now: delete pair\.suffixes"):
        Duplicates.of(pair, progress=False)


def test_only_results_go_to_standard_output(corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """tokengrams prints by itself, past Python."""
    Duplicates.of(corpus, folder=tmp_path / "suffixes")
    print("after")
    out, err = capfd.readouterr()
    assert out == "after\n" and "sorting the" in err


def test_another_folder(tmp_path: Path) -> None:
    pair = write(tmp_path / "data", [[1, 2, 3]] * 4)
    duplicates = Duplicates.of(pair, folder=tmp_path / "index", progress=False)
    assert duplicates.count([[1, 2]]) == [4]
    assert (tmp_path / "index" / "pair.suffixes").is_file() and not (tmp_path / "data" / "pair.suffixes").exists()


def test_what_cannot_be_counted(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a folder"):
        Duplicates.of(tmp_path / "nothing", progress=False)
    with pytest.raises(InputError, match="has no tokens"):
        Duplicates.of(write(tmp_path / "empty", [[]]), progress=False)
    with pytest.raises(InputError, match="tokens of int64"):
        Duplicates.of(write(tmp_path / "wide", [[1, 2]], "int64"), progress=False)
    duplicates = Duplicates.of(write(tmp_path / "short", [[1, 2]]), progress=False)
    assert list(duplicates.groups(3)) == []
    with pytest.raises(InputError, match="no document has 3 tokens"):
        duplicates.sample_by_duplication(3, 1, 0)
    with pytest.raises(InputError, match="length=0"):
        next(duplicates.groups(0))
    with pytest.raises(InputError, match="empty n-gram"):
        duplicates.count([[]])


def test_without_tokengrams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(InputError, match="tokengrams is not installed"):
        Duplicates.of(write(tmp_path, [[1, 2]]), progress=False)


def test_duplicate_bins() -> None:
    """2^(n/4) <= count < 2^((n+1)/4), exactly at powers of two."""
    for power in range(40):
        assert duplicate_bin(2**power) == 4 * power
        assert power == 0 or duplicate_bin(2**power - 1) < 4 * power
    for count in (*range(1, 300), 10**9, 10**9 + 1):
        number = duplicate_bin(count)
        assert 2**number <= count**4 < 2 ** (number + 1)
        low, high = bin_bounds(number)
        assert low <= count <= high
        assert duplicate_bin(low) == duplicate_bin(high) == number
        assert duplicate_bin(high + 1) > number and (low == 1 or duplicate_bin(low - 1) < number)
    with pytest.raises(ValueError, match="count=0"):
        duplicate_bin(0)
