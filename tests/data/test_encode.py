from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from megafish.data.encode import (
    DOCUMENT,
    EncodeOptions,
    disk,
    encode_unit,
    finished_unit,
    text_hash,
    unit_file,
)
from megafish.data.readers import ReadOptions, find_files, split_file
from megafish.data.tokenizer import Tokenizer
from megafish.errors import InputError

OPTIONS = EncodeOptions(ReadOptions(goldfish_k_key="k"), 0.25, 0, None)


@pytest.fixture
def encoded(bpe: Tokenizer, tmp_path: Path) -> tuple[list[str], int]:
    """Unit 3 in tmp_path, of 1000 documents; its texts and the bytes of input that were reported."""
    texts = [f"document {number} \N{GRINNING FACE}" for number in range(1000)]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text, "k": 7}) + "\n" for text in texts))
    found = find_files([file], OPTIONS.read)[0][0]
    reported: list[int] = []
    encode_unit(tmp_path, 3, split_file(found, OPTIONS.read, 5000), bpe, OPTIONS, reported.append)
    assert sum(reported) == found.size and min(reported) >= 0
    return texts, len(reported)


def test_a_unit_holds_its_documents(encoded: tuple[list[str], int], bpe: Tokenizer, tmp_path: Path) -> None:
    texts, _ = encoded
    unit = finished_unit(tmp_path, 3)
    assert unit is not None and unit.documents == unit.own_k == sum(unit.pieces) == 1000 and len(unit.pieces) > 1
    tokens = np.fromfile(unit_file(tmp_path, 3, "tokens"), dtype="<u2")
    rows = np.fromfile(unit_file(tmp_path, 3, "documents"), dtype=DOCUMENT)
    expected = [[*bpe.encode(text), bpe.eos_id] for text in texts]
    assert tokens.tolist() == [token for ids in expected for token in ids]
    assert rows["length"].tolist() == [len(ids) for ids in expected]
    assert rows["bytes"].tolist() == [len(text.encode()) for text in texts]
    assert set(rows["k"].tolist()) == {7}
    hashes = [text_hash(text.encode(), 0) for text in texts]
    assert rows["digest"].tolist() == [digest for _, digest in hashes]
    assert rows["valid"].tolist() == [int(split < 2**62) for split, _ in hashes]


@pytest.mark.parametrize("kind", ["tokens", "documents", "json"])
def test_a_damaged_unit_is_not_finished(encoded: tuple[list[str], int], tmp_path: Path, kind: str) -> None:
    file = unit_file(tmp_path, 3, kind)
    data = file.read_bytes()
    # Zeros: as after a crash of the machine that had renamed the file and not written it.
    for damage in (data[:-1], b"", data + b"x", bytes(len(data))):
        file.write_bytes(damage)
        assert finished_unit(tmp_path, 3) is None
    file.unlink()
    assert finished_unit(tmp_path, 3) is None
    assert finished_unit(tmp_path, 4) is None


def test_the_json_comes_last(
    encoded: tuple[list[str], int], bpe: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renamed = []
    replace = os.replace

    def watch(source: Path, target: Path) -> None:
        renamed.append(target.suffix)
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    found = find_files([tmp_path / "a.jsonl"], OPTIONS.read)[0][0]
    unit = encode_unit(tmp_path, 4, split_file(found, OPTIONS.read, 5000), bpe, OPTIONS, lambda _: None)
    assert renamed == [".tokens", ".documents", ".json"]
    assert unit == finished_unit(tmp_path, 4) == finished_unit(tmp_path, 3)


def test_text_hash_is_frozen() -> None:
    """Splits of corpora that exist must not change: blake2b, 16 bytes, keyed with the seed."""
    assert text_hash(b"", 0) == (0x631CD44CCFE531F1, 0xAB3F9C584688DAB2)
    assert text_hash(b"Gold", 7) == (0x4A0DBCEA57637927, 0x8763B8C0A5FEE377)


@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.ENOSPC, "no space left"), (errno.EDQUOT, "no space left"), (errno.EROFS, "cannot be written")],
)
def test_disk_names_the_folder(tmp_path: Path, code: int, message: str) -> None:
    with pytest.raises(InputError, match=f"{tmp_path}: {message}"), disk(tmp_path):
        raise OSError(code, "told")
    with pytest.raises(IsADirectoryError), disk(tmp_path):
        tmp_path.read_bytes()
