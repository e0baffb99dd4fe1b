from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megafish.data import readers
from megafish.data.manifest import DEFAULT_K, NEVER_K
from megafish.data.readers import ReadOptions, find_files, read_piece, split_file
from megafish.errors import InputError

TEXTS = ["first", "second line\nwith two\r\n", "", "tabs\t\0 \u2581 \N{GRINNING FACE}", " spaces ", "last"]
KEPT = [text for text in TEXTS if text]


def read_all(path: Path, options: ReadOptions | None = None, piece_bytes: int = 1 << 20) -> list[Any]:
    options = options or ReadOptions()
    files, _ = find_files([path], options)
    return [
        doc for file in files for piece in split_file(file, options, piece_bytes) for doc in read_piece(piece, options)
    ]


def texts(path: Path, options: ReadOptions | None = None, piece_bytes: int = 1 << 20) -> list[str]:
    return [document.text for document in read_all(path, options, piece_bytes)]


def jsonl(records: list[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def test_jsonl_plain_and_compressed(tmp_path: Path) -> None:
    data = jsonl([{"text": text} for text in TEXTS])
    frames = zstandard.compress(data[:40]) + zstandard.compress(data[40:])
    for name, content in {
        "a.jsonl": data,
        "b.jsonl.gz": gzip.compress(data),
        "c.jsonl.zst": frames,
        "d.json.gz": gzip.compress(data[:9]) + gzip.compress(data[9:]),
        "e.jsonl": b"\xef\xbb\xbf" + data,
        "f.jsonl": data.replace(b"\n", b"\r\n\n  \n")[:-6],
    }.items():
        (tmp_path / name).write_bytes(content)
        assert texts(tmp_path / name) == KEPT, name


@pytest.mark.parametrize("piece_bytes", [1, 2, 7, 40, 1000])
def test_pieces_never_change_the_documents(tmp_path: Path, piece_bytes: int) -> None:
    plain = tmp_path / "a.txt"
    plain.write_bytes("\ufeffone\ntwo \u2581\r\n\n \t\r\nthree\n\n\n\nfour\nfive\nsix".encode())
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(jsonl([{"text": text} for text in TEXTS * 3]))
    assert texts(lines, piece_bytes=piece_bytes) == KEPT * 3
    by_line = ReadOptions(documents="line")
    assert texts(plain, by_line, piece_bytes) == ["one", "two \u2581", "three", "four", "five", "six"]
    by_block = ReadOptions(documents="blank-line")
    assert texts(plain, by_block, piece_bytes) == ["one\ntwo \u2581", "three", "four\nfive\nsix"]


def test_a_text_file_is_one_document_to_the_byte(tmp_path: Path) -> None:
    text = " \r\n\ttext\0 \n\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "c.txt.zst").write_bytes(zstandard.compress(text.encode()))
    assert texts(tmp_path, piece_bytes=1) == [text] * 3


@pytest.mark.parametrize("piece_bytes", [1, 100_000])
def test_parquet(tmp_path: Path, piece_bytes: int) -> None:
    table = pa.table({"body": TEXTS * 4, "k": [None, 0, 2, 50, 4, -1] * 4, "other": range(24)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    documents = read_all(tmp_path, ReadOptions(text_key="body", goldfish_k_key="k"), piece_bytes)
    assert [document.text for document in documents] == KEPT * 4
    assert [document.k for document in documents] == [NEVER_K, NEVER_K, 50, 4, DEFAULT_K] * 4


def test_parquet_without_the_column_of_k(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet: no column 'kk' for the goldfish k \(it has 'text'\)"):
        read_all(tmp_path, ReadOptions(goldfish_k_key="kk"))


def test_k_of_a_document(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(jsonl([{"text": "a"}, *({"text": "a", "k": k} for k in (None, 0, 2, 128))]))
    assert [d.k for d in read_all(file, ReadOptions(goldfish_k_key="k"))] == [DEFAULT_K, NEVER_K, NEVER_K, 2, 128]
    assert {d.k for d in read_all(file)} == {DEFAULT_K}
    for bad in (1, -2, 2.5, "4", True, False, 2**31):
        file.write_bytes(jsonl([{"text": "a"}, {"text": "a", "k": bad}]))
        with pytest.raises(InputError, match=r"a\.jsonl:2: k=.* must be an integer of at least 2, or null"):
            read_all(file, ReadOptions(goldfish_k_key="k"))


def test_folders_are_read_in_order_of_path(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/.hidden.txt", ".git/x.txt", "a.txt", "readme.md", "a/code.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    files, skipped = find_files([tmp_path], ReadOptions())
    assert [file.path for file in files] == [str(tmp_path / name) for name in ("a.txt", "a/z.txt", "b.txt")]
    assert skipped == [str(tmp_path / name) for name in ("a/code.py", "readme.md")]
    code, _ = find_files([tmp_path], ReadOptions(text_suffixes=(".py", ".md")))
    assert [file.path for file in code] == [str(tmp_path / name) for name in ("a/code.py", "readme.md")]


@pytest.mark.parametrize("piece_bytes", [10, 1 << 20])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"bad\.jsonl:4: not JSON"),
        (b'{"body": "a", "id": 1}', r"bad\.jsonl:4: no field 'text' \(it has 'body', 'id'\)"),
        (b'{"text": 7}', r"bad\.jsonl:4: field 'text' is not a string"),
        (b'["text"]', r"bad\.jsonl:4: a JSON object is expected"),
        (b'{"text": "\xff"}', r"bad\.jsonl:4: invalid UTF-8 at byte 10 of the line"),
        (b'{"text": "\\ud800"}', r"bad\.jsonl:4: character 0 of the text is half a surrogate pair"),
        (b'{"text": "a", "n": ' + b"7" * 5000 + b"}", r"bad\.jsonl:4: a number with too many digits"),
        (b"[" * 100_000, r"bad\.jsonl:4: JSON nested too deeply"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, message: str, piece_bytes: int) -> None:
    good = b'{"text": "good"}\n'
    file = tmp_path / "bad.jsonl"
    file.write_bytes(good + b"\n" + good + line + b"\n" + good)
    with pytest.raises(InputError, match=message):
        read_all(file, piece_bytes=piece_bytes)


def test_bad_text_is_named(tmp_path: Path) -> None:
    file = tmp_path / "bad.txt"
    file.write_bytes(b"\xef\xbb\xbfgood\nb\xe9d\n")
    with pytest.raises(InputError, match=r"bad\.txt: invalid UTF-8 at byte 9"):
        read_all(file)
    for documents in ("line", "blank-line"):
        with pytest.raises(InputError, match=r"bad\.txt:2: invalid UTF-8 at byte 1 of the line"):
            read_all(file, ReadOptions(documents=documents))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    data = jsonl([{"text": os.urandom(50).hex()} for _ in range(200)])
    sound = {"a.jsonl.gz": gzip.compress(data), "b.jsonl.zst": zstandard.compress(data)}
    pq.write_table(pa.table({"text": ["a"] * 50}), tmp_path / "c.parquet")
    sound["c.parquet"] = (tmp_path / "c.parquet").read_bytes()
    for name, content in sound.items():
        for number, damaged in enumerate((content[:-30], b"nonsense" + content[8:], b"")):
            file = tmp_path / f"{number}{name}"
            file.write_bytes(damaged)
            if damaged or name.endswith("parquet"):
                with pytest.raises(InputError, match=rf"{number}{name}: damaged (gzip|zstd|parquet) file"):
                    read_all(file)
    flipped = bytearray(sound["c.parquet"])
    flipped[4:12] = b"\xff" * 8
    (tmp_path / "d.parquet").write_bytes(flipped)
    with pytest.raises(InputError, match=r"d\.parquet"):
        read_all(tmp_path / "d.parquet")


def test_bad_parquet_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    invalid = pa.Array.from_buffers(pa.binary(), 1, pa.array([b"\xff"]).buffers()).view(pa.string())
    for column, message in (
        (pa.array(["a", None]), "row 1: column 'text' is null"),
        (pa.array([1, 2]), "column 'text' is int64, not text"),
        (invalid, "rows 0 to 0: invalid UTF-8"),
    ):
        pq.write_table(pa.table({"text": column}), file)
        with pytest.raises(InputError, match=rf"a\.parquet: {message}"):
            read_all(file)
    with pytest.raises(InputError, match=r"a\.parquet: no column 'body' \(it has 'text'\)"):
        read_all(file, ReadOptions(text_key="body"))


def test_missing_and_unknown_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing: no such file or folder"):
        find_files([tmp_path / "missing"], ReadOptions())
    with pytest.raises(InputError, match="holds no file that can be read"):
        find_files([tmp_path], ReadOptions())
    with pytest.raises(InputError, match="no input"):
        find_files([], ReadOptions())
    (tmp_path / "a.csv").write_text("a")
    with pytest.raises(InputError, match=r"a\.csv: unknown suffix; known are \.txt, "):
        find_files([tmp_path / "a.csv"], ReadOptions())
    with pytest.raises(InputError, match="documents='page': choose file, line or blank-line"):
        ReadOptions(documents="page")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="text suffix 'py' must start with a dot"):
        ReadOptions(text_suffixes=("py",))


def test_unreadable_file(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("a")
    found, _ = find_files([file], ReadOptions())
    file.unlink()
    file.mkdir()  # stands for any failure to open: permissions mean nothing to root
    with pytest.raises(InputError, match=r"a\.txt: cannot read the file"):
        list(read_piece(split_file(found[0], ReadOptions(), 100)[0], ReadOptions()))


def test_documents_have_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 1 << 20)
    file = tmp_path / "a.txt"
    file.write_bytes(b"a\n" * (1 << 19) + b"a")
    with pytest.raises(InputError, match=r"a\.txt: over 1 MiB in one document; say where documents end"):
        read_all(file)
    packed = tmp_path / "b.txt.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    with pytest.raises(InputError, match=r"b\.txt\.gz: over 1 MiB in one document"):
        read_all(packed)
    for piece_bytes in (1 << 10, 1 << 30):
        with pytest.raises(InputError, match=r"a\.txt:\d+: no blank line within 1 MiB"):
            read_all(file, ReadOptions(documents="blank-line"), piece_bytes)
    with pytest.raises(InputError, match=r"b\.txt\.gz:524289: no blank line within 1 MiB"):
        read_all(packed, ReadOptions(documents="blank-line"))
    file.write_bytes(b"a" * (1 << 20) + b"a")
    with pytest.raises(InputError, match=r"a\.txt:1: the line is longer than 1 MiB"):
        read_all(file, ReadOptions(documents="line"))
