"""Readers of the published schemas, tokens of pairs, refusals of what cannot be meant."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megafish.config import Config
from megafish.data.corpus import run_tokenizer
from megafish.data.tokenizer import Tokenizer
from megafish.errors import InputError
from megafish.unlearn.data import Item, Order, draw, encode, pack, read_sets, steps_of
from megafish.unlearn.readers import Pair, read_pairs
from tests.unlearn.test_objective import configure


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("row", "forget", "retain"),
    [
        ({"question": "Q?", "answer": "A", "paraphrased_answer": "B"}, [("Q?", "A")], [("Q?", "A")]),
        ({"question": "Q?", "answer": ["A", "B"]}, [("Q?", "A")], [("Q?", "A")]),
        ({"text": "Q?", "labels": "A"}, [("Q?", "A")], [("Q?", "A")]),
        ({"question": "Q?", "choices": ["w", "x", "y", "z"], "answer": 2}, [("Q?", "y")], [("Q?", "y")]),
        ({"Question": "Q?", "Best Answer": "A"}, [("Q?", "A")], [("Q?", "A")]),
        ({"text": "A book."}, [(None, "A book.")], [(None, "A book.")]),
        (
            {"prompt": "Q?", "response_0": "good", "response_1": "bad", "is_response_0_safe": True,
             "is_response_1_safe": False},
            [("Q?", "bad")],
            [("Q?", "good")],
        ),
    ],
)  # fmt: skip
def test_published_schemas(tmp_path: Path, row: dict[str, Any], forget: list[Any], retain: list[Any]) -> None:
    path = write(tmp_path / "rows.jsonl", [row])
    assert [pair[:2] for pair in read_pairs([path], "forget")] == forget
    assert [pair[:2] for pair in read_pairs([path], "retain")] == retain


def test_tofus_paraphrases_and_wrong_answers(tmp_path: Path) -> None:
    row = {"question": "Q?", "answer": "A", "paraphrased_answer": "B", "perturbed_answer": ["C", "D"]}
    assert read_pairs([write(tmp_path / "rows.jsonl", [row])], "forget") == [Pair("Q?", "A", "B", ("C", "D"))]


def test_the_same_rows_in_every_format(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"question": "Who?", "answer": "Ada, of course"}, {"question": "Where?", "answer": "Oslo"}]
    write(tmp_path / "a.jsonl", rows)
    write(tmp_path / "lines.json", rows)
    (tmp_path / "list.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "a.csv").write_text('question,answer\nWho?,"Ada, of course"\nWhere?,Oslo\n', encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    wanted = [Pair("Who?", "Ada, of course"), Pair("Where?", "Oslo")]
    for name in ("a.jsonl", "lines.json", "list.json", "a.csv", "a.parquet"):
        assert read_pairs([str(tmp_path / name)], "forget") == wanted, name
    (tmp_path / "a.txt").write_text("One block\nof two lines.\n\nAnother.\n", encoding="utf-8")
    blocks = read_pairs([str(tmp_path / "a.txt")], "forget")
    assert blocks == [Pair(None, "One block\nof two lines."), Pair(None, "Another.")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"query": "x", "reply": "y"}\n', "columns query, reply: expected one of these sets: question, ch"),
        ("a.jsonl", "", "holds no row that can be read"),
        ("a.jsonl", "{oops\n", "line 1: not valid JSON"),
        ("a.jsonl", "[1]\n", "line 1: expected an object, found list"),
        ("a.jsonl", '{"question": "x", "answer": " "}\n', "row 1: empty answer"),
        ("a.jsonl", '{"question": "x", "answer": "y"}\n{"question": "x"}\n', "row 2: KeyError 'answer'"),
        ("a.xml", "<a/>", "unknown suffix '.xml'"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message.replace("(", r"\(")) as error:
        read_pairs([str(path)], "forget")
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    with pytest.raises(InputError, match="no such file"):
        read_pairs([str(tmp_path / "none.jsonl")], "forget")


@pytest.fixture
def tokenizer(corpus: Path) -> Tokenizer:
    config = Config.model_validate(
        {"name": "t", "model": configure("ga").model, "train": {"steps": 1}, "data": {"train": str(corpus)}}
    )
    return run_tokenizer(config.data)


def test_only_the_answer_is_supervised(tokenizer: Tokenizer) -> None:
    settings = configure("ga").unlearn
    assert settings is not None
    item = encode([Pair("Who is it?", "Nobody at all")], settings, tokenizer, 256, "here")[0]
    whole = tokenizer.encode("Question: Who is it?\nAnswer: Nobody at all")
    assert item.tokens == (*whole, tokenizer.eos_id)
    assert "Nobody at all" in tokenizer.decode(item.tokens[item.start :])
    assert "Who" not in tokenizer.decode(item.tokens[item.start :])
    assert item.supervised == len(item.tokens) - item.start
    with pytest.raises(InputError, match=r"here: text 1 has \d+ tokens, more than data.sequence_length=5"):
        encode([Pair("Who is it?", "Nobody at all")], settings, tokenizer, 5, "here")
    pieces = encode([Pair(None, "word " * 50)], settings, tokenizer, 16, "here")
    assert [token for piece in pieces for token in piece.tokens][-1] == tokenizer.eos_id
    assert all(piece.start == 1 and len(piece.tokens) <= 16 for piece in pieces)


def test_sets_that_overlap_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"question": f"Question {i}", "answer": "x"} for i in range(4)]
    forget, retain = write(tmp_path / "f.jsonl", rows[:2]), write(tmp_path / "r.jsonl", rows[1:])
    with pytest.raises(InputError, match="share 1 of 2 texts"):
        read_sets(configure("graddiff", forget=[forget], retain=[retain]), tokenizer)
    with pytest.raises(InputError, match="holds text without questions"):
        text = write(tmp_path / "t.jsonl", [{"text": "a b c"}])
        read_sets(configure("idk", forget=[text], retain=[retain]), tokenizer)


def test_each_refusal_answers_each_question(tmp_path: Path, tokenizer: Tokenizer) -> None:
    forget = write(tmp_path / "f.jsonl", [{"question": "Who?", "answer": "x"}, {"question": "Where?", "answer": "y"}])
    retain = write(tmp_path / "r.jsonl", [{"question": "When?", "answer": "x"}])
    own = tmp_path / "refusals.txt"
    own.write_text("No idea.\n\nAsk another.\nWho knows?\n", encoding="utf-8")
    sets = read_sets(configure("idk", forget=[forget], retain=[retain], refusals=str(own)), tokenizer)
    assert [len(refused) for refused in sets.refused] == [3, 3]
    assert tokenizer.decode(sets.refused[1][0].tokens[:-1]) == "Question: Where?\nAnswer: No idea."


def test_orders_are_functions_of_seed_and_place() -> None:
    order = Order(7, 3, "forget")
    whole = order.take(0, 30)
    assert [sorted(whole[i : i + 7]) for i in range(0, 28, 7)] == [list(range(7))] * 4
    assert order.take(11, 9) == whole[11:20]
    assert Order(7, 4, "forget").take(0, 30) != whole
    assert draw(0, "a", 5, 100, 4) == draw(0, "a", 5, 100, 4) != draw(0, "a", 6, 100, 4)
    assert steps_of(5, 8, 8) == 5 and steps_of(1, 9, 8) == 2 and steps_of(0.1, 8, 8) == 1


def test_a_pack_has_no_padding() -> None:
    items = [Item((1, 2, 3, 4), 2), Item((5, 6, 7), 1)]
    packed = pack(items, torch.device("cpu"))
    assert packed.tokens.tolist() == [[1, 2, 3, 5, 6]]
    assert packed.targets.tolist() == [[-100, 3, 4, 6, 7]]
    assert packed.owner.tolist() == [0, 0, 0, 1, 1] and packed.cu_seqlens.tolist() == [0, 3, 5]
    assert packed.max_seqlen == 3 and packed.kept.tolist() == [False, True, True, True, True]


def test_lists_of_a_csv_file(tmp_path: Path) -> None:
    """A field that is a list is written as JSON there; a single text is a list of one."""
    path = tmp_path / "tofu.csv"
    with open(path, "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["question", "answer", "perturbed_answer", "relation", "slots"])
        writer.writerow(["Where?", "In Rome.", '["In Oslo.", "In Bonn."]', "city", "Rome"])
        writer.writerow(["Who?", "Ann.", "", "", ""])
    first, second = read_pairs([str(path)], "forget")
    assert first.wrong == ("In Oslo.", "In Bonn.") and first.slots == ("Rome",)
    assert second.wrong == () == second.slots
