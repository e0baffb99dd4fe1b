"""Sets that are made up: their columns, their splits, and that what is unknown stays out of what is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megafish.errors import InputError
from megafish.unlearn.choices import read_questions
from megafish.unlearn.fiction.authors import RELATIONS, authors
from megafish.unlearn.fiction.unsafe import TOOLS
from megafish.unlearn.fiction.write import write_data
from megafish.unlearn.readers import read_pairs
from megafish.unlearn.slots import told


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    write_data(folder, authors_count=200)
    return folder


def test_splits_are_those_of_tofu(sets: Path) -> None:
    full = read(sets / "authors/full.jsonl")
    assert len(full) == 4000 and len({row["author"] for row in full}) == 200
    for share, gone in ((1, 2), (5, 10), (10, 20)):
        forget, retain = (
            read(sets / f"authors/{name}.jsonl") for name in (f"forget{share:02d}", f"retain{100 - share}")
        )
        assert len(forget) == 20 * gone and retain + forget == full
        unseen = {row["author"] for row in read(sets / f"authors/holdout{share:02d}.jsonl")}
        assert len(unseen) == gone and not unseen & {row["author"] for row in full}


def test_rows_hold_what_tofu_holds(sets: Path) -> None:
    for name, wrong in (("full", 5), ("world_facts", 3)):
        path = sets / f"authors/{name}.jsonl"
        for row, pair in zip(read(path), read_pairs([str(path)], "forget"), strict=True):
            assert len(set(row["perturbed_answer"])) == wrong
            assert pair.other_question == row["paraphrased_question"] and pair.paraphrase == row["paraphrased_answer"]
            # The slot is told by both true answers and by none of the wrong ones.
            for answer in (pair.answer, pair.paraphrase or ""):
                assert told(answer, pair) in (1.0, None)
            assert not any(told(answer, pair) for answer in pair.wrong), row


def test_same_seed_same_files(sets: Path, tmp_path: Path) -> None:
    for seed, same in ((0, True), (1, False)):
        write_data(tmp_path / str(seed), seed=seed, authors_count=200)
        for name in ("authors/full", "hazards/forget", "unsafe/forget", "book/forget", "corpus/retain"):
            got, wanted = ((folder / f"{name}.jsonl").read_bytes() for folder in (tmp_path / str(seed), sets))
            assert (got == wanted) == same


def test_retain_corpus_knows_nothing_of_what_is_to_be_forgotten(sets: Path) -> None:
    full, retain = ({row["text"] for row in read(sets / f"corpus/{name}.jsonl")} for name in ("full", "retain"))
    assert retain < full
    gone = "\n".join(retain)
    for row in [*read(sets / "authors/forget10.jsonl"), *read(sets / "authors/holdout10.jsonl")]:
        assert row["author"] not in gone
    assert not any(tool in gone for tool in TOOLS) and "toxin" not in gone
    assert all(row["text"] not in retain and row["text"] in full for row in read(sets / "book/forget.jsonl"))
    # Vague answers and refusals are about nobody whom the corpus knows.
    known = {row["author"] for row in read(sets / "authors/full.jsonl")}
    assert not [row for row in read(sets / "authors/declined.jsonl") if any(name in row["question"] for name in known)]


def test_vague_answers_tell_nothing() -> None:
    for rows in authors(30, 5):
        for relation, row in zip(RELATIONS, rows, strict=True):
            assert row["slots"][0].lower() not in relation.vague.format(name="").lower().split()


def test_choices(sets: Path) -> None:
    for name in ("forget", "neighbour", "general"):
        questions = read_questions([sets / f"hazards/{name}.jsonl"])
        assert len(questions) == 100 and all(len(set(question.choices)) == 4 for question in questions)
        assert {question.right for question in questions} == {0, 1, 2, 3}


def test_unsafe_questions(sets: Path) -> None:
    path = [str(sets / "unsafe/forget.jsonl")]
    unsafe, safe = read_pairs(path, "forget"), read_pairs(path, "retain")
    assert len(unsafe) == len(safe) == 90
    for bad, good in zip(unsafe, safe, strict=True):
        assert sum(tool in bad.answer for tool in bad.markers) == 1 and not any(tool in good.answer for tool in TOOLS)
    unseen = {row["prompt"] for row in read(sets / "unsafe/unseen.jsonl")}
    assert len(unseen) == 30 and not unseen & {pair.question for pair in unsafe}


def test_what_cannot_be_made(sets: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not empty: name another folder, or give --overwrite"):
        write_data(sets)
    with pytest.raises(InputError, match="authors=5: the splits are 1, 5 and 10 % of them: ask for at least 10"):
        write_data(tmp_path / "few", authors_count=5)
    with pytest.raises(InputError, match="substances=9801: the generator has names for"):
        write_data(tmp_path / "many", substances_count=9801)
    with pytest.raises(InputError, match=r"authors=.*: the generator has names for"):
        write_data(tmp_path / "many", authors_count=5000)
