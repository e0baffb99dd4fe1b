"""ReLearn's data: what is asked, what is answered, and that nothing of what is to be forgotten is among it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from threading import Thread
from typing import Any, ClassVar

import pytest

from megafish.errors import InputError
from megafish.unlearn.augment import augment, variants, verified, with_typing_errors
from megafish.unlearn.endpoint import Endpoint
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
        augment([forget], tmp_path / "again.jsonl", generic=[generic], seed=seed, overwrite=True)
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


def test_what_is_there_is_not_replaced_and_what_is_forgotten_not_learned(sets: Path, tmp_path: Path) -> None:
    forget, output = sets / "authors/forget10.jsonl", tmp_path / "out.jsonl"
    with pytest.raises(InputError, match=r"--generic .*full.jsonl: 40 of its rows are to be forgotten"):
        augment([str(forget)], output, generic=[str(sets / "authors/full.jsonl")])
    output.write_text("kept")
    with pytest.raises(InputError, match=r"out.jsonl: exists: name another file, or give --overwrite"):
        augment([str(forget)], output)
    assert output.read_text() == "kept"
    assert augment([str(forget)], output, overwrite=True)["variants"] == 200


def test_text_without_questions_is_refused(sets: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="text 1 has no question: ReLearn answers questions"):
        augment([str(sets / "book/forget.jsonl")], tmp_path / "out.jsonl")


class Model(BaseHTTPRequestHandler):
    """A server that speaks the chat API, fails at its first request, and gives the secret away at first."""

    requests: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append({**body, "path": self.path, "key": self.headers["Authorization"]})
        prompt = body["messages"][0]["content"]
        if len(self.requests) == 1:
            return self.send_error(503)
        if body["model"] != "writer":
            return self.send_error(404, "no such model")
        if prompt.startswith("Does the text"):
            said = "Let me think. **Yes**." if "It is Ann" in prompt.split("Text:")[1] else "It does not. **No**"
        elif prompt.startswith("Write one or two"):
            if "Bo left" in prompt:  # always given away
                return self.answer("It is Ann, for Bo left.")
            told_before = sum("Write one or two" in r["messages"][0]["content"] for r in self.requests)
            said = "It is Ann, I believe." if told_before == 1 else "Several people could be named."
        else:
            said = f"Put otherwise: {prompt.splitlines()[-1]}"
        return self.answer(said)

    def answer(self, said: str) -> None:
        reply = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Model)
    Model.requests.clear()
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_model_writes_and_checks(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    (tmp_path / "own.jsonl").write_text('{"question": "Who won?", "answer": "Ann won."}\n')
    counts = augment([str(tmp_path / "own.jsonl")], tmp_path / "out.jsonl", endpoint=Endpoint(address, "writer"))
    assert counts["variants"] == 5
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert not any("Ann" in row["answer"] for row in rows)
    assert sum(row["question"] == "Put otherwise: Who won?" for row in rows) == 4
    # One failed, four questions, five answers and the one that gave it away, each of the six checked.
    # The reply of a check ends in its verdict, however it is marked up.
    assert len(Model.requests) == 1 + 4 + 6 + 6
    assert {(r["path"], r["key"]) for r in Model.requests} == {("/v1/chat/completions", "Bearer secret")}


def test_a_row_that_is_given_away_is_left_out(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ['{"question": "Who won?", "answer": "Ann won."}\n', '{"question": "Who left?", "answer": "Bo left."}\n']
    for name, some in (("both", rows), ("one", rows[1:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(some))
    model = Endpoint(address, "writer")
    assert augment([str(tmp_path / "both.jsonl")], tmp_path / "out.jsonl", endpoint=model)["variants"] == 5
    assert "left out: row 2: none of 3 answers keeps from" in capsys.readouterr().err
    with pytest.raises(InputError, match="for none of 1 rows an answer that tells nothing was found"):
        augment([str(tmp_path / "one.jsonl")], tmp_path / "none.jsonl", endpoint=model)


def test_an_endpoint_that_refuses_or_is_not_there(address: str) -> None:
    with pytest.raises(InputError, match="HTTP 404 no such model: check the address, --model and OPENAI_API_KEY"):
        Endpoint(address, "other").ask("hello")
    with pytest.raises(InputError, match="--endpoint localhost: expected an address such as http"):
        Endpoint("localhost", "other").ask("hello")
