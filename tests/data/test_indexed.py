"""The Megatron layout, byte by byte, and the refusal of everything that breaks it."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from megafish.data import indexed
from megafish.data.indexed import IndexedDataset, IndexedWriter, file_pair, optimal_dtype
from megafish.errors import InputError

# Documents as lists of sequences: several sequences, an empty sequence, no sequence at all.
DOCUMENTS: list[list[list[int]]] = [[[5, 6, 7]], [[1], [2, 3]], [[]], [], [[9, 8, 7, 6]], []]


def write(prefix: Path, documents: list[list[list[int]]] = DOCUMENTS, dtype: str = "uint16") -> None:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.append(
                np.array([token for sequence in document for token in sequence], dtype=np.int64),
                sequence_lengths=[len(sequence) for sequence in document],
            )


def layout(documents: list[list[list[int]]], code: int, letter: str) -> tuple[bytes, bytes]:
    """The two files, packed by hand from the published layout."""
    sequences = [sequence for document in documents for sequence in document]
    lengths = [len(sequence) for sequence in sequences]
    size = struct.calcsize("<" + letter)
    pointers = [size * sum(lengths[:i]) for i in range(len(lengths))]
    entries = [sum(len(document) for document in documents[:i]) for i in range(len(documents) + 1)]
    idx = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(entries))
    idx += struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(pointers)}q", *pointers)
    idx += struct.pack(f"<{len(entries)}q", *entries)
    tokens = [token for sequence in sequences for token in sequence]
    return struct.pack(f"<{len(tokens)}{letter}", *tokens), idx


CODES = [
    ("uint8", 1, "B"),
    ("int8", 2, "b"),
    ("int16", 3, "h"),
    ("int32", 4, "i"),
    ("int64", 5, "q"),
    ("uint16", 8, "H"),
]


@pytest.mark.parametrize(("dtype", "code", "letter"), CODES)
def test_layout_both_ways(tmp_path: Path, dtype: str, code: int, letter: str) -> None:
    expected_bin, expected_idx = layout(DOCUMENTS, code, letter)
    write(tmp_path / "written", dtype=dtype)
    assert (tmp_path / "written.bin").read_bytes() == expected_bin
    assert (tmp_path / "written.idx").read_bytes() == expected_idx

    (tmp_path / "packed.bin").write_bytes(expected_bin)
    (tmp_path / "packed.idx").write_bytes(expected_idx)
    data = IndexedDataset(tmp_path / "packed")
    assert data.dtype == np.dtype(dtype)
    assert (len(data), data.num_sequences, data.num_tokens) == (6, 5, 10)
    flat = [[token for sequence in document for token in sequence] for document in DOCUMENTS]
    assert [data.document(i).tolist() for i in range(len(data))] == flat
    assert data.tokens.tolist() == [5, 6, 7, 1, 2, 3, 9, 8, 7, 6]
    assert not data.tokens.flags.writeable


@pytest.mark.parametrize("documents", [[], [[]], [[[]]]])
def test_no_tokens(tmp_path: Path, documents: list[list[list[int]]]) -> None:
    write(tmp_path / "empty", documents)
    data = IndexedDataset(tmp_path / "empty")
    assert (data.num_documents, data.num_tokens, data.tokens.size) == (len(documents), 0, 0)


def test_blocks_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [[[i] * (i % 4)] for i in range(23)]
    write(tmp_path / "whole", documents)
    monkeypatch.setattr(indexed, "_BLOCK", 5)
    write(tmp_path / "blocks", documents)
    assert (tmp_path / "blocks.idx").read_bytes() == (tmp_path / "whole.idx").read_bytes()
    assert IndexedDataset(tmp_path / "blocks").tokens.tolist() == [i for i in range(23) for _ in range(i % 4)]


@pytest.mark.parametrize("several", [False, True])
def test_documents_in(tmp_path: Path, several: bool) -> None:
    rng = np.random.default_rng(3)
    documents = [[[1] * int(n)] for n in rng.integers(0, 4, 40)]
    if several:
        documents = [sequences * int(rng.integers(0, 3)) for sequences in documents]
    write(tmp_path / "data", documents)
    data = IndexedDataset(tmp_path / "data")
    owner = [i for i, document in enumerate(documents) for sequence in document for _ in sequence]
    begins = {number: owner.index(number) for number in owner}
    for start in range(data.num_tokens):
        for stop in range(start + 1, data.num_tokens + 1):
            numbers, firsts = data.documents_in(start, stop)
            expected = sorted(set(owner[start:stop]))
            assert numbers.tolist() == expected
            assert firsts.tolist() == [begins[number] for number in expected]
    assert numbers.dtype == firsts.dtype == np.int64


def poke(offset: int, value: bytes) -> bytes:
    """The index of three documents of 2, 3 and 1 tokens with some bytes replaced."""
    data = bytearray(layout([[[1, 2]], [[3, 4, 5]], [[6]]], 8, "H")[1])
    data[offset : offset + len(value)] = value
    return bytes(data)


int32, int64 = struct.Struct("<i").pack, struct.Struct("<q").pack
# Lengths at 34, 38, 42; pointers at 46, 54, 62; document entries at 70, 78, 86, 94.
DAMAGE = {
    "magic": (poke(0, b"TNTIDX"), ["byte 0", "magic"]),
    "version": (poke(9, b"\x02"), ["byte 9", "version 2"]),
    "float": (poke(17, b"\x07"), ["byte 17", "dtype code 7"]),
    "header": (poke(0, b"")[:20], ["20 bytes", "truncated"]),
    "truncated": (poke(0, b"")[:-1], ["101 bytes", "102"]),
    "longer": (poke(0, b"") + b"x", ["103 bytes", "102"]),
    "no entries": (poke(26, int64(0))[:-32], ["byte 26"]),
    "negative length": (poke(38, int32(-3)), ["byte 38", "sequence 1", "-3"]),
    "first pointer": (poke(46, int64(2)), ["byte 46", "sequence 0", "starts at byte 2"]),
    "pointer": (poke(62, int64(8)), ["byte 62", "sequence 2", "starts at byte 8", "make 10"]),
    "first entry": (poke(70, int64(1)), ["byte 70", "entry 0", "expected 0"]),
    "falling entry": (poke(86, int64(0)), ["byte 86", "entry 2", "at least 1"]),
    "last entry": (poke(94, int64(4)), ["byte 94", "entry 3", "expected 3"]),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_index(tmp_path: Path, case: str) -> None:
    content, phrases = DAMAGE[case]
    (tmp_path / "data.bin").write_bytes(b"\0" * 12)
    (tmp_path / "data.idx").write_bytes(content)
    with pytest.raises(InputError) as caught:
        IndexedDataset(tmp_path / "data")
    message = str(caught.value)
    assert all(phrase in message for phrase in ["data.idx", *phrases]), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("size", "phrase"), [(11, "truncated at byte 11"), (0, "truncated at byte 0"), (14, "byte 12")]
)
def test_bin_of_another_size(tmp_path: Path, size: int, phrase: str) -> None:
    (tmp_path / "data.idx").write_bytes(poke(0, b""))
    (tmp_path / "data.bin").write_bytes(b"\0" * size)
    with pytest.raises(InputError, match=rf"data\.bin: {size} bytes, data\.idx describes 12.*{phrase}"):
        IndexedDataset(tmp_path / "data")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.bin: no such file"):
        IndexedDataset(tmp_path / "nothing")


def test_prefix_may_carry_an_extension(tmp_path: Path) -> None:
    pair = (tmp_path / "a.b.bin", tmp_path / "a.b.idx")
    assert file_pair(tmp_path / "a.b") == file_pair(tmp_path / "a.b.bin") == file_pair(tmp_path / "a.b.idx") == pair


@pytest.mark.parametrize(
    ("dtype", "vocab_size", "ids", "phrases"),
    [
        ("uint16", None, [1, 65536], ["document 1", "position 1", "65536", "uint16 holds"]),
        ("int32", 100, [5, 6, 100], ["document 1", "position 2", "id 100", "100 ids that the vocabulary has"]),
        ("int32", None, [0, -1], ["document 1", "position 1", "id -1"]),
        ("uint16", None, [0.5], ["document 1", "integer"]),
        ("uint16", None, [[1]], ["document 1", "1-D"]),
    ],
)
def test_writer_refuses_ids(
    tmp_path: Path, dtype: str, vocab_size: int | None, ids: list[int], phrases: list[str]
) -> None:
    with pytest.raises(InputError) as caught, IndexedWriter(tmp_path / "d", dtype, vocab_size=vocab_size) as writer:
        writer.append([0])
        writer.append(ids)
    assert all(phrase in str(caught.value) for phrase in phrases), caught.value
    assert list(tmp_path.iterdir()) == []


def test_writer_refuses_lengths_and_floats(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\[1, 1\] do not add up"), IndexedWriter(tmp_path / "d", "uint16") as writer:
        writer.append([1, 2, 3], sequence_lengths=[1, 1])
    with pytest.raises(InputError, match="float32"):
        IndexedWriter(tmp_path / "d", np.float32)
    with pytest.raises(InputError, match="cannot be written"):
        IndexedWriter(tmp_path / "no" / "such" / "folder", "uint16")


def test_failed_writer_leaves_the_old_pair(tmp_path: Path) -> None:
    write(tmp_path / "data")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(KeyboardInterrupt), IndexedWriter(tmp_path / "data", "uint16") as writer:
        writer.append([1, 2, 3])
        raise KeyboardInterrupt
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with IndexedWriter(tmp_path / "data", "uint16") as writer:
        writer.append([1, 2, 3])
        assert (writer.num_documents, writer.num_tokens) == (1, 3)
    assert IndexedDataset(tmp_path / "data").tokens.tolist() == [1, 2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bin", "data.idx"]


def test_optimal_dtype() -> None:
    assert optimal_dtype(65499) == np.uint16
    assert optimal_dtype(65500) == np.int32
