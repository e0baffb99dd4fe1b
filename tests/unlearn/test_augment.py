"""ReLearn's data: what is asked, what is answered, and that nothing of what is to be forgotten is among it."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from megafish.errors import InputError
from megafish.unlearn.augment import augment, variants, verified, with_typing_errors
from megafish.unlearn.fiction.write import write_data
from megafish.unlearn.readers import Pair, read_pairs
from megafish.unlearn.slots import told


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    write_data(folder, authors_count=20)
    return folder


def test_kinds_and_their_number(sets: Path, tmp_path: Path) -> None:
    forget, generic = str(sets / "authors/forget10.jsonl"), str(sets / "unsafe/harmless.jsonl")
    counts = augment([forget], tmp_path / "vague.jsonl", generic=[generic])
    pairs = read_pairs([forget], "forget")
    assert counts == {"variants": 5 * len(pairs), "completions": 5 * len(pairs), "generic": 5 * len(pairs)}
    rows = [json.loads(line) for line in (tmp_path / "vague.jsonl").read_text().splitlines()]
    assert len(rows) == sum(counts.values())
    true = {pair.answer for pair in pairs} | {pair.paraphrase for pair in pairs}
    others = {pair.answer for pair in read_pairs([generic], "retain")}
    vague = [row for row in rows if row["answer"] not in others]
    assert not true & {row["answer"] for row in rows}
    for pair in pairs:
        about = [row for row in vague if row["question"] == pair.question]
        assert len(about) == 1 and not told(about[0]["answer"], pair)
    # The same seed, the same file; another one another.
    for seed, same in ((0, True), (1, False)):
        augment([forget], tmp_path / "again.jsonl", generic=[generic], seed=seed)
        assert ((tmp_path / "again.jsonl").read_bytes() == (tmp_path / "vague.jsonl").read_bytes()) == same


def test_variants_are_the_papers_four(sets: Path) -> None:
    pair = read_pairs([str(sets / "authors/forget10.jsonl")], "forget")[0]
    name = (pair.question or "").removeprefix("Where was ").removesuffix(" born?")
    question, reworded, context, noise, side = variants(pair, Random(0))
    assert question == pair.question and reworded == pair.other_question
    assert question in context and context != question
    assert sorted(noise.replace(" ", "")) == sorted(question.rstrip("?").replace(" ", "")) and noise != question[:-1]
    assert side == f"From which city does the family of {name} come?"


def test_rows_without_a_relation(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text('{"question": "Who won?", "answer": "Ann won."}\n')
    assert augment([str(tmp_path / "own.jsonl")], tmp_path / "out.jsonl")["generic"] == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 10 and not any("Ann" in row["answer"] for row in rows)


def test_typing_errors_spare_names_and_short_words() -> None:
    random = Random(3)
    for _ in range(20):
        words = with_typing_errors("Where did Anna Berg live as an old woman?", random).split()
        assert words[:4] == ["Where", "did", "Anna", "Berg"] and words[5:8] == ["as", "an", "old"]
    assert with_typing_errors("Who is it?", random) == "Who is it"


def test_an_answer_that_tells_is_made_anew() -> None:
    pair = Pair("Where?", "In Rome.", relation="city", slots=("Rome",))
    answers = iter(["In Rome, I think.", "Hard to say."])
    assert verified(lambda: next(answers), pair, 1) == "Hard to say."
    with pytest.raises(InputError, match="row 7: none of 3 answers keeps from 'Rome'"):
        verified(lambda: "Rome", pair, 7)


def test_text_without_questions_is_refused(sets: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="text 1 has no question: ReLearn answers questions"):
        augment([str(sets / "book/forget.jsonl")], tmp_path / "out.jsonl")
