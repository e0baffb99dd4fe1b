"""Documents out of .txt, .jsonl (plain, .gz, .zst), .parquet and folders, in pieces that can be read in parallel.

A file is read in pieces (byte ranges, or row groups of a parquet file). A document belongs to the piece in which it
starts, so the documents and their order do not depend on how a file is cut.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from megafish.data.manifest import DEFAULT_K, NEVER_K
from megafish.errors import InputError

MAX_DOCUMENT_BYTES = 256 << 20

_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".parquet")
_BOM = b"\xef\xbb\xbf"
_BLOCK = 1 << 20


class Document(NamedTuple):
    """A text and its goldfish k: `DEFAULT_K`, `NEVER_K`, or at least 2."""

    text: str
    k: int


@dataclass(frozen=True)
class ReadOptions:
    """How files become documents."""

    text_key: str = "text"
    """Field (jsonl) or column (parquet) with the text."""
    goldfish_k_key: str | None = None
    """Field or column with a document's own goldfish k: at least 2, null or 0 for never; absent: the default."""
    documents: Literal["file", "line", "blank-line"] = "file"
    """What is a document in a text file: the whole file, a line, or lines up to a blank one."""
    text_suffixes: tuple[str, ...] = (".txt",)
    """Suffixes of files that are plain text; each may be followed by .gz or .zst."""

    def __post_init__(self) -> None:
        if self.documents not in ("file", "line", "blank-line"):
            raise InputError(f"documents={self.documents!r}: choose file, line or blank-line")
        for suffix in self.text_suffixes:
            if not suffix.startswith("."):
                raise InputError(f"text suffix {suffix!r} must start with a dot, as in .txt")


@dataclass(frozen=True)
class InputFile:
    """A file to read, as found."""

    root: str
    """The input it was found under, as given."""
    path: str
    size: int
    """Bytes on disk."""
    mtime_ns: int
    kind: Literal["text", "jsonl", "parquet"]
    compression: Literal["", ".gz", ".zst"]


class Piece(NamedTuple):
    """A part of a file: bytes [start, stop) of a plain file, row groups [start, stop) of a parquet file.

    Compressed files and text files that are one document are a single piece.
    """

    file: InputFile
    start: int
    stop: int
    size: int
    """Share of the file's bytes, for balance and progress."""


def find_files(inputs: Iterable[str | Path], options: ReadOptions) -> tuple[list[InputFile], list[str]]:
    """The files to read (folders: all files below them by sorted path), and the files of folders left out.

    Left out are those with another suffix; hidden files are not looked at. A file named outright must have a known
    suffix. Raises InputError where there is nothing to read.
    """
    files: list[InputFile] = []
    skipped: list[str] = []
    for entry in inputs:
        path = Path(entry)
        if not path.exists():
            raise InputError(f"{path}: no such file or folder")
        if not path.is_dir():
            found = _classify(path, path, options)
            if found is None:
                known = [*(s + c for s in options.text_suffixes for c in ("", ".gz", ".zst")), *_SUFFIXES]
                raise InputError(
                    f"{path}: unknown suffix; known are {', '.join(known)}, and text suffixes can be added"
                )
            files.append(found)
            continue
        before = len(files)
        for below in _walk(path):
            found = _classify(path, below, options)
            if found is None:
                skipped.append(str(below))
            else:
                files.append(found)
        if len(files) == before:
            raise InputError(f"{path}: the folder holds no file that can be read ({len(skipped)} of other suffixes)")
    if not files:
        raise InputError("no input: name at least one file or folder")
    return files, skipped


def split_file(file: InputFile, options: ReadOptions, piece_bytes: int) -> list[Piece]:
    """Cut a file into pieces of about `piece_bytes` bytes, in order."""
    if file.kind == "parquet":
        with _faults(file):
            import pyarrow.parquet as pq

            with pq.ParquetFile(file.path) as parquet:
                groups = parquet.metadata.num_row_groups
                _check_k_column(parquet.schema_arrow.names, options, file.path)  # before the work of other files
        per_piece = max(1, groups * piece_bytes // max(file.size, 1))
        cuts = [*range(0, groups, per_piece), groups]
        return [Piece(file, a, b, file.size * (b - a) // groups) for a, b in itertools.pairwise(cuts)]
    if file.compression or (file.kind == "text" and options.documents == "file"):
        if not file.compression:
            _check_whole(file, file.size)
        return [Piece(file, 0, file.size, file.size)]
    cuts = [*range(0, file.size, piece_bytes), file.size]
    return [Piece(file, a, b, b - a) for a, b in itertools.pairwise(cuts)]


def read_piece(piece: Piece, options: ReadOptions) -> Iterator[Document]:
    """The documents that start in a piece; empty ones are left out.

    Memory: one document (at most 256 MiB) and a read buffer. Raises InputError naming file and line, byte or row.
    """
    with _faults(piece.file):
        if piece.file.kind == "parquet":
            documents = _read_parquet(piece, options)
        elif piece.file.kind == "jsonl":
            documents = _read_jsonl(piece, options)
        elif options.documents == "file":
            documents = _read_whole(piece)
        elif options.documents == "line":
            documents = _read_lines(piece)
        else:
            documents = _read_blocks(piece)
        for document in documents:
            if document.text:
                yield document


# ------------------------------------------------------------------------------------------------------------- finding


def _walk(folder: Path) -> Iterator[Path]:
    paths = []
    for root, folders, names in os.walk(folder, onerror=_raise_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(root) / name for name in names if not name.startswith(".")]
    return iter(sorted(paths, key=lambda path: path.as_posix()))


def _raise_unreadable(error: OSError) -> None:
    raise InputError(f"{error.filename}: cannot read the folder ({error.strerror})")


def _classify(root: Path, path: Path, options: ReadOptions) -> InputFile | None:
    name = path.name
    compression: Literal["", ".gz", ".zst"] = ""
    if name.endswith(".gz"):
        compression = ".gz"
    elif name.endswith(".zst"):
        compression = ".zst"
    stem = name[: len(name) - len(compression)]
    kind: Literal["text", "jsonl", "parquet"]
    if stem.endswith(tuple(options.text_suffixes)):
        kind = "text"
    elif name.endswith(_SUFFIXES):
        kind = "parquet" if name.endswith(".parquet") else "jsonl"
    else:
        return None
    try:
        stat = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot read the file ({error.strerror})") from None
    return InputFile(str(root), str(path), stat.st_size, stat.st_mtime_ns, kind, compression)


# ------------------------------------------------------------------------------------------------------------- reading


@contextmanager
def _faults(file: InputFile) -> Iterator[None]:
    """Turn what the system and the decoders raise about a file into one line for its owner."""
    try:
        yield
    except InputError:
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{file.path}: damaged gzip file ({error})") from None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise InputError(f"{file.path}: cannot read the file ({error.strerror})") from None
        if file.kind == "parquet":  # pyarrow raises ArrowInvalid, a ValueError, or a bare OSError
            raise InputError(f"{file.path}: damaged parquet file ({str(error).splitlines()[0]})") from None
        raise


@contextmanager
def _open(file: InputFile) -> Iterator[IO[bytes]]:
    if file.compression == ".gz":
        with gzip.open(file.path, "rb") as stream:
            yield stream  # type: ignore[misc]
    elif file.compression == ".zst":
        with open(file.path, "rb") as raw, io.BufferedReader(_ZstdStream(raw, file.path), _BLOCK) as stream:
            yield stream
    else:
        with open(file.path, "rb", buffering=_BLOCK) as plain:
            yield plain


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of a file of zstd frames. Unlike zstandard's own reader, it notices a cut-off last frame."""

    def __init__(self, raw: IO[bytes], path: str) -> None:
        import zstandard

        self._zstd = zstandard
        self._raw = raw
        self._path = path
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if not self._input:
                self._input = self._raw.read(1 << 17)
                if not self._input:
                    if self._frame is not None:
                        raise InputError(f"{self._path}: damaged zstd file (it ends in the middle of a frame)")
                    return 0
            if self._frame is None:
                self._frame = self._zstd.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            try:
                self._output = memoryview(self._frame.decompress(self._input))
            except self._zstd.ZstdError as error:
                raise InputError(f"{self._path}: damaged zstd file ({error})") from None
            self._input = b""
            if self._frame.eof:
                self._input = self._frame.unused_data
                self._frame = None
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size


class _Lines:
    """The lines that start in a piece, as bytes with their ends; `where()` names the current one."""

    def __init__(self, piece: Piece, stream: IO[bytes]) -> None:
        self._piece = piece
        self._stream = stream
        self._count = 0
        self._first = 0  # offset of the first line of the piece

    def __iter__(self) -> Iterator[bytes]:
        piece, stream = self._piece, self._stream
        if piece.start:
            stream.seek(piece.start - 1)
            stream.readline()
            self._first = stream.tell()
        stop = None if piece.file.compression else piece.stop
        position = self._first
        while stop is None or position < stop:
            line = stream.readline(MAX_DOCUMENT_BYTES + 1)
            if not line:
                return
            self._count += 1
            if len(line) > MAX_DOCUMENT_BYTES:
                raise InputError(f"{self.where()}: the line is longer than {MAX_DOCUMENT_BYTES >> 20} MiB")
            if position == 0 and line.startswith(_BOM):
                position, line = len(_BOM), line[len(_BOM) :]
            position += len(line)
            yield line

    def read_on(self) -> Iterator[bytes]:
        """The lines after the piece's last one."""
        while line := self._stream.readline(MAX_DOCUMENT_BYTES + 1):
            self._count += 1
            yield line

    def where(self) -> str:
        return f"{self._piece.file.path}:{self._count + self._lines_before()}"

    def _lines_before(self) -> int:
        count, left = 0, self._first
        if left:
            with open(self._piece.file.path, "rb") as stream:
                while left > 0 and (block := stream.read(min(_BLOCK, left))):
                    count += block.count(b"\n")
                    left -= len(block)
        return count

    def decode(self, line: bytes) -> str:
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{self.where()}: invalid UTF-8 at byte {error.start} of the line") from None


def _read_jsonl(piece: Piece, options: ReadOptions) -> Iterator[Document]:
    key, k_key = options.text_key, options.goldfish_k_key
    with _open(piece.file) as stream:
        lines = _Lines(piece, stream)
        for line in lines:
            if line.isspace():
                continue
            try:
                record = json.loads(lines.decode(line))
            except json.JSONDecodeError as error:
                raise InputError(f"{lines.where()}: not JSON ({error.msg} at column {error.colno})") from None
            except InputError:
                raise
            except ValueError:  # Python refuses to convert integers of thousands of digits
                raise InputError(f"{lines.where()}: a number with too many digits") from None
            except RecursionError:
                raise InputError(f"{lines.where()}: JSON nested too deeply") from None
            if not isinstance(record, dict):
                raise InputError(f"{lines.where()}: a JSON object is expected on each line")
            if key not in record:
                raise InputError(f"{lines.where()}: no field {key!r} (it has {_few(record)}); name it with --text-key")
            text = record[key]
            if not isinstance(text, str):
                raise InputError(f"{lines.where()}: field {key!r} is not a string")
            if not text.isascii():
                _check_encodable(text, lines)
            yield Document(text, DEFAULT_K if k_key is None else _k(record.get(k_key, DEFAULT_K), lines.where, k_key))


def _read_parquet(piece: Piece, options: ReadOptions) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    key, k_key, path = options.text_key, options.goldfish_k_key, piece.file.path
    with pq.ParquetFile(path) as parquet:
        names = parquet.schema_arrow.names
        if key not in names:
            raise InputError(f"{path}: no column {key!r} (it has {_few(names)}); name it with --text-key")
        kind = parquet.schema_arrow.field(key).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise InputError(f"{path}: column {key!r} is {kind}, not text")
        _check_k_column(names, options, path)
        columns = [key] if k_key is None else [key, k_key]
        row = sum(parquet.metadata.row_group(group).num_rows for group in range(piece.start))
        groups = list(range(piece.start, piece.stop))
        for batch in parquet.iter_batches(256, row_groups=groups, columns=columns, use_threads=False):
            try:
                texts = batch.column(key).cast(pa.large_string()).to_pylist()
            except (pa.ArrowInvalid, UnicodeDecodeError):
                raise InputError(f"{path}: rows {row} to {row + len(batch) - 1}: invalid UTF-8") from None
            ks = [DEFAULT_K] * len(texts) if k_key is None else batch.column(k_key).to_pylist()
            for number, (text, k) in enumerate(zip(texts, ks, strict=True), start=row):
                if text is None:
                    raise InputError(f"{path}: row {number}: column {key!r} is null")
                yield Document(text, DEFAULT_K if k_key is None else _k(k, lambda n=number: f"{path}: row {n}", k_key))
            row += len(batch)


def _check_k_column(names: list[str], options: ReadOptions, path: str) -> None:
    key = options.goldfish_k_key
    if key is not None and key not in names:
        raise InputError(f"{path}: no column {key!r} for the goldfish k (it has {_few(names)}); see --goldfish-k-key")


def _read_whole(piece: Piece) -> Iterator[Document]:
    with _open(piece.file) as stream:
        data = stream.read(MAX_DOCUMENT_BYTES + 1)
    _check_whole(piece.file, len(data))
    try:
        yield Document(data.removeprefix(_BOM).decode("utf-8"), DEFAULT_K)
    except UnicodeDecodeError as error:
        offset = error.start + len(_BOM) * data.startswith(_BOM)
        raise InputError(f"{piece.file.path}: invalid UTF-8 at byte {offset}") from None


def _check_whole(file: InputFile, size: int) -> None:
    if size > MAX_DOCUMENT_BYTES:
        raise InputError(
            f"{file.path}: over {MAX_DOCUMENT_BYTES >> 20} MiB in one document; "
            "say where documents end with --documents line or blank-line"
        )


def _read_lines(piece: Piece) -> Iterator[Document]:
    with _open(piece.file) as stream:
        lines = _Lines(piece, stream)
        for line in lines:
            if not line.isspace():
                yield Document(_without_end(lines.decode(line)), DEFAULT_K)


def _read_blocks(piece: Piece) -> Iterator[Document]:
    with _open(piece.file) as stream:
        inside = bool(piece.start) and not _line_before(stream, piece.start).isspace()
        lines = _Lines(piece, stream)
        block: list[str] = []
        size = 0

        def add(line: bytes) -> None:
            nonlocal size
            size += len(line)
            if size > MAX_DOCUMENT_BYTES:
                raise InputError(f"{lines.where()}: no blank line within {MAX_DOCUMENT_BYTES >> 20} MiB")
            block.append(lines.decode(line))

        for line in lines:
            if line.isspace():
                if block:
                    yield Document(_without_end("".join(block)), DEFAULT_K)
                block, size, inside = [], 0, False
            elif not inside:
                add(line)
        if block:
            for line in lines.read_on():
                if line.isspace():
                    break
                add(line)
            yield Document(_without_end("".join(block)), DEFAULT_K)


def _line_before(stream: IO[bytes], start: int) -> bytes:
    """The whole line that holds byte start - 1: the last one that belongs to the piece before."""
    begin, found = start - 1, b""
    while begin > 0:
        step = min(_BLOCK, begin)
        stream.seek(begin - step)
        block = stream.read(step)
        cut = block.rfind(b"\n")
        if cut >= 0:
            begin = begin - step + cut + 1
            break
        begin -= step
    stream.seek(begin)
    found = stream.readline(MAX_DOCUMENT_BYTES)
    return found.removeprefix(_BOM) if begin == 0 else found


# -------------------------------------------------------------------------------------------------------------- values


def _without_end(text: str) -> str:
    return re.sub(r"\r?\n\Z", "", text)


def _check_encodable(text: str, lines: _Lines) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{lines.where()}: character {error.start} of the text is half a surrogate pair") from None


def _k(value: Any, where: Any, key: str) -> int:
    if value is None or (value == 0 and not isinstance(value, bool)):
        return NEVER_K
    if value == DEFAULT_K and isinstance(value, int):
        return DEFAULT_K
    if isinstance(value, int) and not isinstance(value, bool) and 2 <= value < 2**31:
        return value
    raise InputError(f"{where()}: {key}={value!r} must be an integer of at least 2, or null or 0 for never")


def _few(names: Iterable[str]) -> str:
    listed = [repr(name) for name in names]
    return ", ".join(listed[:8]) + (", ..." if len(listed) > 8 else "") if listed else "no fields"
