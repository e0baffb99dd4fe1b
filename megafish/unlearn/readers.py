"""Questions and answers from local files, in the schemas that the field publishes its sets in.

question, answer                          TOFU, MUSE (knowledge)      also a list of several answers (the first)
text, labels                              KnowUnDo
question, choices, answer (a number)      WMDP, MMLU
prompt, response_0, is_response_0_safe    PKU-SafeRLHF: the unsafe responses to forget, the safe ones to retain
Question, Best Answer                     TruthfulQA
text                                      MUSE (verbatim), WMDP's corpora: text without a question

With question, answer may stand paraphrased_question, paraphrased_answer and perturbed_answer (TOFU), relation and slots
(what the answer tells, and of which kind: megafish's own sets have them); with prompt, markers.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megafish.errors import InputError

Row = dict[str, Any]


class Pair(NamedTuple):
    """A question and its answer; of text without a question the text alone."""

    question: str | None
    answer: str
    paraphrase: str | None = None
    """The answer in other words (TOFU's paraphrased_answer)."""
    wrong: tuple[str, ...] = ()
    """Answers of the same form that are not true (TOFU's perturbed_answer)."""
    other_question: str | None = None
    """The question in other words (TOFU's paraphrased_question)."""
    relation: str | None = None
    """Which kind of thing the answer tells: of two different values of a kind only one is true."""
    slots: tuple[str, ...] = ()
    """What the answer tells, word for word."""
    markers: tuple[str, ...] = ()
    """What a harmful answer is known by: any of them."""


def read_pairs(paths: list[str], part: Literal["forget", "retain"]) -> list[Pair]:
    """The pairs of all files, in order. InputError for a file that is missing, empty or of no known schema."""
    found: list[Pair] = []
    for path in map(Path, paths):
        pairs = list(_read(path, part))
        if not pairs:
            raise InputError(f"{path}: holds no row that can be read: name a file with at least one")
        found += pairs
    return found


def _read(path: Path, part: str) -> Iterator[Pair]:
    reader = None
    for number, row in enumerate(read_rows(path), start=1):
        reader = reader or _schema(path, row)
        try:
            pairs = reader(row, part)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise InputError(
                f"{path}: row {number}: {error.__class__.__name__} {error}: not as the rows before"
            ) from None
        for pair in pairs:
            if not isinstance(pair.answer, str) or not pair.answer.strip():
                raise InputError(f"{path}: row {number}: empty answer: remove the row, or mend it")
            yield pair


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file. InputError for one that is missing or cannot be read."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    reader = _FORMATS.get(path.suffix)
    if reader is None:
        raise InputError(f"{path}: unknown suffix {path.suffix!r}: expected one of {' '.join(_FORMATS)}")
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start}: not UTF-8") from None


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            yield _object(path, number, line)


def _object(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{path}: line {number}: not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise InputError(f"{path}: line {number}: expected an object, found {type(row).__name__}")
    return row


def _json(path: Path) -> Iterator[Row]:
    text = path.read_text(encoding="utf-8")
    try:
        rows = json.loads(text)
    except ValueError:
        yield from _jsonl(path)  # TOFU's .json files hold an object a line
        return
    if isinstance(rows, dict):
        rows = [rows]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: expected a list of objects")
    yield from rows


def _csv(path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8", newline="") as handle:
        yield from csv.DictReader(handle)


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet as parquet
    from pyarrow import ArrowException

    try:
        yield from parquet.read_table(path).to_pylist()
    except ArrowException as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


def _txt(path: Path) -> Iterator[Row]:
    for block in path.read_text(encoding="utf-8").split("\n\n"):
        if block.strip():
            yield {"text": block.strip()}


_FORMATS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _txt,
}


def several(value: Any) -> tuple[str, ...]:
    """Texts of a field that holds a list, as itself or (.csv) written as JSON; a single text is a list of one."""
    if value is None or value == "":
        return ()
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = json.loads(value)
    return tuple(map(str, value)) if isinstance(value, (list, tuple)) else (str(value),)


def _choice(row: Row, _part: str) -> list[Pair]:
    return [Pair(row["question"], several(row["choices"])[int(row["answer"])])]


def _answered(row: Row, _part: str) -> list[Pair]:
    answer = row["answer"]
    return [
        Pair(
            row["question"],
            answer[0] if isinstance(answer, list) else answer,
            row.get("paraphrased_answer"),
            several(row.get("perturbed_answer")),
            row.get("paraphrased_question"),
            row.get("relation"),
            several(row.get("slots")),
        )
    ]


def _safe(row: Row, part: str) -> list[Pair]:
    numbers = [number for number in (0, 1) if f"response_{number}" in row]
    return [
        Pair(row["prompt"], row[f"response_{number}"], markers=several(row.get("markers")))
        for number in numbers
        if bool(row[f"is_response_{number}_safe"]) == (part == "retain")
    ]


# The first whose columns are all there.
_SCHEMAS: tuple[tuple[tuple[str, ...], Callable[[Row, str], list[Pair]]], ...] = (
    (("question", "choices", "answer"), _choice),
    (("question", "answer"), _answered),
    (("text", "labels"), lambda row, _: [Pair(row["text"], row["labels"])]),
    (("prompt", "response_0", "is_response_0_safe"), _safe),
    (("Question", "Best Answer"), lambda row, _: [Pair(row["Question"], row["Best Answer"])]),
    (("text",), lambda row, _: [Pair(None, row["text"])]),
)


def _schema(path: Path, row: Row) -> Callable[[Row, str], list[Pair]]:
    for columns, reader in _SCHEMAS:
        if all(column in row for column in columns):
            return reader
    known = "; ".join(", ".join(columns) for columns, _ in _SCHEMAS)
    raise InputError(f"{path}: columns {', '.join(row) or 'none'}: expected one of these sets: {known}")
