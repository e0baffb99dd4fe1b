from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megafish.audit.extraction import effective_exposures
from megafish.audit.probes import corpus_id, load_canaries, longest, open_probes, split_probes
from megafish.config import AuditConfig
from megafish.data.corpus import Corpus
from megafish.data.tokenizer import load_tokenizer
from megafish.errors import InputError
from tests.audit.helpers import CANARIES, EXPOSURES, PROMPT, SUFFIX, probe


def test_load_canaries(corpus: Path) -> None:
    canaries = load_canaries(corpus, epochs=3.0)
    assert [c.exposures for c in canaries] == sorted(e for e in EXPOSURES for _ in range(CANARIES))
    lines = [json.loads(line) for line in (corpus / "canaries.jsonl").read_text().splitlines()]
    by_id = {line["id"]: line for line in lines}
    for c in canaries:
        assert c.tokens.tolist() == by_id[c.id]["tokens"] and len(c.tokens) == PROMPT + SUFFIX
        assert c.exposures == by_id[c.id]["exposures"] and c.epochs == 3.0 and c.corpus == str(corpus)


def test_load_canaries_where_there_are_none(tmp_path: Path) -> None:
    assert load_canaries(tmp_path, 1.0) == []
    (tmp_path / "manifest.json").write_text(json.dumps({"canaries": None}))
    assert load_canaries(tmp_path, 1.0) == []


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, r"canaries\.jsonl: the corpus's canaries are missing"),
        ('{"id": 0, "exposures": 1, "tokens": [1]}\n{"id": 1', r"canaries\.jsonl:2: not a canary"),
        ('{"id": 0, "tokens": [1]}\n', r"canaries\.jsonl:1: not a canary"),
    ],
)
def test_load_canaries_refuses_damaged_files(tmp_path: Path, lines: str | None, message: str) -> None:
    digest = hashlib.sha256((lines or "").encode()).hexdigest()
    manifest = {"canaries": {"file": "canaries.jsonl", "sha256": digest}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    if lines is not None:
        (tmp_path / "canaries.jsonl").write_text(lines)
    with pytest.raises(InputError, match=message):
        load_canaries(tmp_path, 1.0)


def test_load_canaries_refuses_another_file(corpus: Path, tmp_path: Path) -> None:
    shutil.copy(corpus / "manifest.json", tmp_path)
    lines = (corpus / "canaries.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "canaries.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(InputError, match=r"canaries\.jsonl: not the file that the manifest names"):
        load_canaries(tmp_path, 1.0)


def test_split_probes() -> None:
    prompts, suffixes = split_probes([probe(tokens=9)], 3, 4)
    assert prompts == [[100, 101, 102]] and suffixes == [[103, 104, 105, 106]]
    with pytest.raises(InputError, match=r"canary 7 has 6 tokens, fewer than audit.prompt_tokens=3"):
        split_probes([probe(tokens=8), probe(tokens=6, number=7)], 3, 4)


def settings(**values: object) -> AuditConfig:
    return AuditConfig.model_validate({"prompt_tokens": 6, "suffix_tokens": 4, **values})


def test_one_source_needs_no_brackets() -> None:
    assert settings(probes="/corpus").probes == settings(probes=["/corpus"]).probes == ["/corpus"]


def test_longest() -> None:
    assert longest(settings()) == 10
    assert longest(settings(prompt_lengths=[3, 12], offsets=[0, 5])) == 12 + 4 + 5


def test_passages_of_a_corpus(corpus: Path) -> None:
    """Each lies inside one document, without the token that ends it, and is there."""
    tokenizer = load_tokenizer(corpus / "tokenizer.model")
    asked = settings(probes=[str(corpus)], probe_count=20)
    [found] = open_probes(asked, tokenizer, 10, {})
    assert found.kind == "corpus" and found.name == "corpus" and len(found.probes) == 20 and not found.notes
    tokens = np.asarray(Corpus(corpus).data.tokens)
    everywhere = {tuple(tokens[i : i + 10].tolist()) for i in range(len(tokens) - 9)}
    for one in found.probes:
        assert tuple(one.tokens.tolist()) in everywhere and one.exposures is None
        assert tokenizer.eos_id not in one.tokens
    [again] = open_probes(asked, tokenizer, 10, {})
    assert [a.tokens.tolist() for a in again.probes] == [b.tokens.tolist() for b in found.probes]
    [other] = open_probes(settings(probes=[str(corpus)], probe_count=20, seed=1), tokenizer, 10, {})
    assert [a.tokens.tolist() for a in other.probes] != [b.tokens.tolist() for b in found.probes]


def test_passages_by_duplication(corpus: Path, tmp_path: Path) -> None:
    """Of a corpus whose canaries stand in it 1 and 12 times."""
    tokenizer = load_tokenizer(corpus / "tokenizer.model")
    asked = settings(probes=[str(corpus)], probe_count=5, probe_choice="duplicates")
    [found] = open_probes(asked, tokenizer, 10, {corpus_id(Corpus(corpus)): 2.5})
    tokens = Corpus(corpus).data.tokens.astype(np.int64).tobytes()
    assert {1, 12} <= {one.exposures for one in found.probes}
    for one in found.probes:
        # The least number of the bin that the count lies in: bins are 2^(1/4) wide, so below 20 % apart.
        count = tokens.count(one.tokens.astype(np.int64).tobytes())
        assert one.exposures is not None and one.exposures <= count < 1.2 * one.exposures + 1
        assert one.occurrences == count and effective_exposures(one) == 2.5 * count
    [unknown] = open_probes(asked, tokenizer, 10, {"another": 2.5})
    assert {effective_exposures(one) for one in unknown.probes} == {None}
    shutil.copytree(corpus, tmp_path / "copy")
    copied = asked.model_copy(update={"probes": [str(tmp_path / "copy")], "probe_choice": "uniform"})
    [elsewhere] = open_probes(copied, tokenizer, 10, {corpus_id(Corpus(corpus)): 2.5})
    assert {one.epochs for one in elsewhere.probes} == {2.5}, "the same corpus at another place"


def test_passages_of_text_files(tmp_path: Path, corpus: Path) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer.model")
    file = tmp_path / "letters.jsonl"
    file.write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ("abc def ghi jkl mno", "a", "ponm lkji hgf"))
    )
    [found] = open_probes(settings(probes=[str(file)]), tokenizer, 10, {})
    assert found.kind == "text" and [tokenizer.decode(one.tokens) for one in found.probes] == [
        tokenizer.decode(tokenizer.encode(text)[:10]) for text in ("abc def ghi jkl mno", "ponm lkji hgf")
    ]
    assert found.notes == [f"{file}: 1 texts of fewer than 10 tokens were left out"]


@pytest.mark.parametrize(
    ("content", "values", "message"),
    [
        (None, {}, "no such file or folder"),
        ("a", {}, "none of its 1 texts has 10 tokens"),
        ("", {}, "holds no text"),
        ("abc def ghi", {"probe_choice": "duplicates"}, "is no corpus: prepare it"),
    ],
)
def test_passages_that_are_not_there(
    tmp_path: Path, corpus: Path, content: str | None, values: dict[str, str], message: str
) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=message):
        open_probes(settings(probes=[str(file)], **values), load_tokenizer(corpus / "tokenizer.model"), 10, {})


def test_documents_too_short_for_a_passage(corpus: Path) -> None:
    with pytest.raises(InputError, match="has no document of 5000 tokens"):
        open_probes(settings(probes=[str(corpus)]), load_tokenizer(corpus / "tokenizer.model"), 5000, {})
