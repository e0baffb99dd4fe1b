from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from megafish.data import assemble as module
from megafish.data.assemble import HashedFile, assemble
from megafish.data.canary import Canary, places
from megafish.data.encode import DOCUMENT, unit_file
from megafish.data.indexed import IndexedDataset

CANARIES = [Canary(0, 3, [90, 91], "ab", ""), Canary(1, 0, [92, 93], "cd", ""), Canary(2, 9, [94], "\xe9", "")]


@pytest.mark.parametrize("block", [1, 7, 1 << 18])
@pytest.mark.parametrize(("n_units", "per_unit"), [(1, 1), (5, 13), (3, 60)])
def test_equals_the_plain_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, n_units: int, per_unit: int
) -> None:
    monkeypatch.setattr(module, "_ROWS", block)
    monkeypatch.setattr(module, "_COPY_BYTES", 8)
    rng = np.random.default_rng(n_units)
    left_out = {3, 7}
    train, valid = [], []
    total = 0
    for number in range(n_units):
        rows = np.zeros(per_unit, dtype=DOCUMENT)
        rows["length"] = rng.integers(1, 9, per_unit)
        rows["bytes"] = rng.integers(1, 50, per_unit)
        rows["k"] = rng.integers(2, 9, per_unit)
        rows["valid"] = rng.random(per_unit) < 0.2
        rows["digest"] = rng.integers(0, 12, per_unit)
        tokens = rng.integers(0, 80, int(rows["length"].sum())).astype("<u2")
        rows.tofile(unit_file(tmp_path, number, "documents"))
        tokens.tofile(unit_file(tmp_path, number, "tokens"))
        total += tokens.nbytes
        ends = np.cumsum(rows["length"])
        for row, end in zip(rows, ends, strict=True):
            if int(row["digest"]) not in left_out:
                document = (tokens[end - row["length"] : end].tolist(), int(row["k"]), int(row["bytes"]))
                (valid if row["valid"] else train).append(document)
    expected = []
    copies = places(CANARIES, 5, len(train))
    for number in range(len(train) + 1):
        for place, canary in copies:
            if place == number:
                expected.append(([*CANARIES[canary].tokens, 2], -1, len(CANARIES[canary].text.encode())))
        expected += train[number : number + 1]

    (tmp_path / "out").mkdir()
    reported: list[int] = []
    splits = assemble(
        tmp_path,
        n_units,
        tmp_path / "out",
        np.dtype("<u2"),
        eos_id=2,
        canaries=CANARIES,
        canary_seed=5,
        left_out=left_out,
        with_valid=True,
        with_k=True,
        on_bytes=reported.append,
    )
    assert sum(reported) == total
    for name, documents in (("train", expected), ("valid", valid)):
        data = IndexedDataset(tmp_path / "out" / name)
        assert [data.document(n).tolist() for n in range(len(data))] == [document[0] for document in documents]
        ks = np.load(tmp_path / "out" / f"{name}.k.npy")
        assert ks.tolist() == [document[1] for document in documents]
        assert splits[name]["bytes"] == sum(document[2] for document in documents)
        assert splits[name]["documents"] == len(documents)
        assert splits[name]["tokens"] == sum(len(document[0]) for document in documents)
    assert len(list((tmp_path / "out").iterdir())) == 6


def test_hashed_file(tmp_path: Path) -> None:
    with HashedFile(tmp_path / "a") as file:
        file.write(b"abc")
        file.write(np.arange(5, dtype="<i8").data)
    data = (tmp_path / "a").read_bytes()
    assert data == b"abc" + np.arange(5, dtype="<i8").tobytes()
    assert file.entry() == {"bytes": 43, "sha256": hashlib.sha256(data).hexdigest()}
