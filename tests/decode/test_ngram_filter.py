"""Filters against sets of n-grams."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megafish.data.corpus import Corpus
from megafish.data.indexed import IndexedWriter
from megafish.data.tokenizer import load_tokenizer
from megafish.decode import build_filter as module
from megafish.decode.build_filter import build_filter
from megafish.decode.ngram_filter import NgramFilter, coefficients, ngram_keys, theory, window_keys
from megafish.errors import InputError

Documents = list[list[int]]


def ngrams(documents: Documents, n: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(text[i : i + n]) for text in documents for i in range(len(text) - n + 1))


def text_of(corpus: Path) -> Documents:
    opened = Corpus(corpus)
    return [opened.data.document(i)[:-1].tolist() for i in range(opened.num_documents)]


def write(folder: Path, documents: Documents, dtype: str = "uint16") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(folder / "pair", dtype) as writer:
        for document in documents:
            writer.append(np.array(document, dtype=np.int64))
    return folder / "pair"


@pytest.mark.parametrize(("n", "minimum_count", "workers"), [(3, 1, 1), (10, 1, 2), (4, 3, 1)])
def test_what_is_in_the_corpus_is_in_the_filter(
    corpus: Path, tmp_path: Path, n: int, minimum_count: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several pieces and parts: none is missed, of others about the asked share is found."""
    monkeypatch.setattr(module, "PIECE", 20_000)
    path = tmp_path / "f"
    built = build_filter(
        [corpus], path, n=n, minimum_count=minimum_count, false_positive_rate=0.02, workers=workers, progress=False
    )
    counts = ngrams(text_of(corpus), n)
    wanted = [ngram for ngram, count in counts.items() if count >= minimum_count]
    assert built.header["ngrams"] == len(wanted) and built.header["parts"] > 1
    assert built.contains(np.array(wanted)).all()
    others = np.random.Generator(np.random.Philox(1)).integers(0, 512, (50_000, n))
    others = np.array([ngram for ngram in others.tolist() if tuple(ngram) not in counts])
    assert built.contains(others).mean() == pytest.approx(0.02, rel=0.15)
    if minimum_count > 1:
        rare = [ngram for ngram, count in counts.items() if count < minimum_count]
        assert built.contains(np.array(rare)).mean() < 0.04
    bits, hashes = theory(len(wanted), 0.02)
    assert built.header["hashes"] == hashes
    begun = {ngram for ngram, count in ngrams(text_of(corpus), n - 1).items() if count >= minimum_count}
    assert {ngram[:-1] for ngram in wanted} <= begun
    assert built.begins(np.array(list(begun))).all() and built.header["beginnings"]["ngrams"] == len(begun)
    strange = np.array([ngram[:-1] for ngram in others.tolist() if tuple(ngram[:-1]) not in begun])
    assert built.begins(strange).mean() == pytest.approx(0.02, rel=0.2)
    both = bits + theory(len(begun), 0.02)[0]
    assert path.stat().st_size == pytest.approx(both / 8, rel=0.05, abs=2000)
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"], "nothing else is left"


def test_without_beginnings(corpus: Path, tmp_path: Path) -> None:
    """The same n-grams without the others' size, and any text may be the beginning of one."""
    built, whole = (
        build_filter([corpus], tmp_path / name, n=4, beginnings=beginnings, progress=False)
        for name, beginnings in (("f", False), ("g", True))
    )
    own = whole.header["beginnings"]["part_bits"] * whole.header["parts"] / 8
    saved = whole.path.stat().st_size - built.path.stat().st_size
    assert own > 1000 and own <= saved < own + 200, "the header says less, too"
    assert built.header["beginnings"] is None and built.begins([[1, 2, 3], [7, 7, 7]]).all()
    some = np.random.Generator(np.random.Philox(1)).integers(0, 512, (20_000, 4))
    assert (built.contains(some) == whole.contains(some)).all()


def test_the_file_does_not_depend_on_pieces_or_processes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_filter([corpus], tmp_path / "a", workers=1, progress=False)
    monkeypatch.setattr(module, "PIECE", 1 << 30)
    build_filter([corpus], tmp_path / "b", workers=1, progress=False)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    monkeypatch.setattr(module, "PIECE", 30_000)
    built = [build_filter([corpus], tmp_path / name, workers=w, progress=False) for name, w in (("c", 1), ("d", 2))]
    assert (tmp_path / "c").read_bytes() == (tmp_path / "d").read_bytes()
    assert built[0].header["parts"] > 1


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_documents_are_not_joined(tmp_path: Path, dtype: str, corpus: Path) -> None:
    pair = write(tmp_path, [[1, 2, 3], [], [4, 5], [6, 7, 8, 9]], dtype)
    tokenizer = load_tokenizer(corpus / "tokenizer.model")
    built = build_filter([pair], tmp_path / "f", n=3, tokenizer=tokenizer, progress=False)
    assert built.header["ngrams"] == 3
    assert built.contains([[1, 2, 3], [6, 7, 8], [7, 8, 9]]).all()
    assert not built.contains([[2, 3, 4], [3, 4, 5], [4, 5, 6], [5, 6, 7]]).all()


def test_several_corpora(corpus: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer.model")
    pair = write(tmp_path, [[400, 401, 402, 403]])
    built = build_filter([corpus, pair], tmp_path / "f", n=4, tokenizer=tokenizer, progress=False)
    assert built.contains([400, 401, 402, 403]) and built.contains(np.array(text_of(corpus)[0][:4]))
    assert [source["tokens"] for source in built.header["sources"]] == [Corpus(corpus).num_tokens, 4]
    built.check_tokenizer(tokenizer)


def test_a_corpus_named_twice_counts_once(corpus: Path, tmp_path: Path) -> None:
    once = build_filter([corpus], tmp_path / "a", n=4, minimum_count=2, progress=False)
    again = [corpus, corpus / ".." / corpus.name]
    twice = build_filter(again, tmp_path / "b", n=4, minimum_count=2, progress=False)
    assert twice.header["ngrams"] == once.header["ngrams"] and len(twice.header["sources"]) == 1


def test_a_pair_ends_its_documents_as_the_tokenizer_says(corpus: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer.model")
    folder = build_filter([corpus], tmp_path / "a", n=4, progress=False)
    pair = build_filter([corpus / "train"], tmp_path / "b", n=4, tokenizer=tokenizer, progress=False)
    assert pair.header["ngrams"] == folder.header["ngrams"]


def test_a_folder_is_no_place_for_a_filter(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a folder: name a file"):
        build_filter([corpus], tmp_path, progress=False)


def test_keys_in_whole_numbers() -> None:
    """The definition, with Python's integers."""
    c = [int(x) for x in coefficients(5, 3)]
    total = (c[0] + c[1] * 8 + c[2] * 1 + c[3] * 131072) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        total = (total ^ (total >> shift)) * factor % 2**64
    total ^= total >> 31
    ids = np.array([7, 0, 131071])
    assert int(ngram_keys(ids[None], coefficients(5, 3))[0]) == total == int(window_keys(ids, coefficients(5, 3))[0])


def test_contains_next_is_contains(corpus: Path, tmp_path: Path) -> None:
    built = build_filter([corpus], tmp_path / "f", n=4, progress=False)
    context = np.array([text[:3] for text in text_of(corpus)[:5]])
    candidates = np.tile(np.arange(512), (5, 1))
    whole = np.concatenate([np.repeat(context, 512, axis=0), candidates.reshape(-1, 1)], axis=1)
    assert (built.contains_next(context, candidates) == built.contains(whole).reshape(5, 512)).all()


def test_theory() -> None:
    """m = -N ln p / (ln 2)^2: 9.585 bits an n-gram and 7 hash functions at 1 %."""
    assert theory(10_000_000, 0.01) == (95850584, 7)


def broken(path: Path, change: str) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[8:16], "little")
    header = json.loads(data[16 : 16 + length])
    if change == "cut":
        path.write_bytes(data[:-1])
    elif change == "other":
        path.write_bytes(b"x" * 100)
    elif change == "empty":
        path.write_bytes(b"")
    else:
        changed = {**header, "version": 9} if change == "newer" else {k: v for k, v in header.items() if k != change}
        text = json.dumps(changed).encode()
        path.write_bytes(data[:8] + len(text).to_bytes(8, "little") + text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("cut", "its header asks for .*: it was cut off"),
        ("other", "not a filter of n-grams, or damaged"),
        ("empty", "not a filter of n-grams, or damaged"),
        ("beginnings", "its header has no beginnings: it is damaged"),
        ("hashes", "its header has no hashes: it is damaged"),
        ("newer", "megafish-ngrams version 9, this program reads megafish-ngrams version 2"),
    ],
)
def test_damaged_files(corpus: Path, tmp_path: Path, change: str, message: str) -> None:
    build_filter([corpus], tmp_path / "f", progress=False)
    broken(tmp_path / "f", change)
    with pytest.raises(InputError, match=message):
        NgramFilter.open(tmp_path / "f")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 1}, "n=1: must be at least 2"),
        ({"false_positive_rate": 1.0}, "false_positive_rate=1.0: must be above 0 and below 1"),
        ({"minimum_count": 10_000}, "no text of 10 tokens occurs 10000 times"),
    ],
)
def test_what_cannot_be_built(corpus: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_filter([corpus], tmp_path / "f", progress=False, **options)
    assert not list(tmp_path.iterdir())


def test_documents_shorter_than_an_ngram(corpus: Path, tmp_path: Path) -> None:
    pair, tokenizer = write(tmp_path / "short", [[1, 2, 3], [4, 5]]), load_tokenizer(corpus / "tokenizer.model")
    with pytest.raises(InputError, match="no text of 4 tokens occurs 1 times"):
        build_filter([pair], tmp_path / "f", n=4, tokenizer=tokenizer, progress=False)


def test_tokenizers(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file: build a filter"):
        NgramFilter.open(tmp_path / "f")
    with pytest.raises(InputError, match=r"does not say what tokenizer made it: name one \(--tokenizer FILE\)"):
        build_filter([write(tmp_path, [[1, 2, 3]])], tmp_path / "f", progress=False)
    built = build_filter([corpus], tmp_path / "f", progress=False)
    built.header["tokenizer"] = "0" * 64
    with pytest.raises(InputError, match="of the ids of another tokenizer"):
        built.check_tokenizer(load_tokenizer(corpus / "tokenizer.model"))
    with pytest.raises(InputError, match="neither a folder"):
        build_filter([tmp_path / "nothing"], tmp_path / "g", progress=False)
