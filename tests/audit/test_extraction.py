from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megafish.audit.extraction import (
    Extraction,
    Probe,
    at_or_after_drop,
    load_canaries,
    record,
    split_canaries,
    summarize,
    text_pieces,
)
from megafish.audit.metrics import wilson_interval
from megafish.data.tokenizer import load_tokenizer
from megafish.errors import InputError
from tests.audit.helpers import CANARIES, EXPOSURES, PROMPT, SUFFIX


def canary(exposures: int = 4, tokens: int = 8, number: int = 0) -> Probe:
    return Probe(number, exposures, np.arange(100, 100 + tokens), "corpus", "a.txt", epochs=2.5)


def extraction(
    generated: list[int], dropped: list[bool] | None = None, exposures: int = 4, loss: float = 1.0
) -> Extraction:
    whole = canary(exposures)
    return Extraction(whole, [100, 101, 102, 103], [104, 105, 106, 107], generated, dropped, [loss] * 4)


class Letters:
    """A tokenizer whose token 100 is "a", 101 "b", ..."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i - 3) for i in ids)


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


def test_split_canaries() -> None:
    prompts, suffixes = split_canaries([canary(tokens=9)], 3, 4)
    assert prompts == [[100, 101, 102]] and suffixes == [[103, 104, 105, 106]]
    with pytest.raises(InputError, match=r"canary 7 has 6 tokens, fewer than audit.prompt_tokens=3"):
        split_canaries([canary(tokens=8), canary(tokens=6, number=7)], 3, 4)


def test_at_or_after_drop() -> None:
    assert at_or_after_drop([False, True, False, False, True]).tolist() == [False, True, True, False, True]
    assert at_or_after_drop([True, False, False]).tolist() == [True, True, False]


def test_exact_match_means_every_token() -> None:
    assert extraction([104, 105, 106, 107]).exact
    assert not extraction([104, 105, 106]).exact, "an early end of the document is a difference"
    assert not extraction([104, 105, 106, 108]).exact
    assert extraction([104, 105, 106]).prefix_length == 3


def test_left_at_drop() -> None:
    dropped = [False, True, False, False]
    assert extraction([104, 105, 106, 107], dropped).left_at_drop is None
    assert extraction([104, 0, 0, 0], None).left_at_drop is None
    assert extraction([0, 0, 0, 0], dropped).left_at_drop is False
    assert extraction([104, 0, 0, 0], dropped).left_at_drop is True
    assert extraction([104, 105, 0, 0], dropped).left_at_drop is True
    assert extraction([104, 105, 106, 0], dropped).left_at_drop is False
    assert extraction([104], dropped).left_at_drop is True, "an early end counts like a wrong token"


def test_summarize() -> None:
    dropped = [False, True, False, False]
    items = [
        extraction([104, 105, 106, 107], dropped, exposures=4, loss=1.0),
        extraction([104, 0, 0, 0], dropped, exposures=4, loss=3.0),
        extraction([0, 0, 0, 0], dropped, exposures=0, loss=5.0),
    ]
    items[0].suffix_losses[1] = 9.0
    summary = summarize(items)
    control, planted = summary["levels"]
    assert (control["exposures"], planted["exposures"]) == (0, 4)
    assert planted["effective_exposures"] == 10.0 and control["effective_exposures"] == 0.0
    assert planted["canaries"] == 2 and planted["exact_matches"] == 1 and planted["exact_rate"] == 0.5
    assert (planted["exact_low"], planted["exact_high"]) == wilson_interval(1, 2)
    assert planted["mean_prefix"] == 2.5
    assert planted["mean_rouge_l"] == pytest.approx((1 + 0.25) / 2)
    assert planted["loss_kept"] == pytest.approx(2.0) and planted["loss_dropped"] == pytest.approx(6.0)
    assert planted["loss"] == pytest.approx((3 * 1 + 9 + 4 * 3) / 8)
    assert control["loss"] == 5.0
    divergence = summary["divergence"]
    assert divergence["least_exposures"] == 4
    assert divergence["canaries"] == 1 and divergence["at_drop"] == 1 and divergence["rate"] == 1.0, "not the control"
    assert divergence["chance"] == 0.5
    assert summary["canaries"] == 3


def test_divergence_is_over_the_more_exposed_half_of_the_levels() -> None:
    dropped = [False, True, False, False]
    items = [extraction([104, 0, 0, 0], dropped, exposures) for exposures in (8, 4)]
    items += [extraction([0, 0, 0, 0], dropped, exposures) for exposures in (0, 1, 2)]
    divergence = summarize(items)["divergence"]
    assert (divergence["least_exposures"], divergence["canaries"], divergence["rate"]) == (4, 2, 1.0)
    assert (divergence["low"], divergence["high"]) == wilson_interval(2, 2)
    assert summarize([extraction([0, 0, 0, 0], dropped, 0)])["divergence"] is None


def test_summarize_without_a_fixed_mask() -> None:
    summary = summarize([extraction([0, 0, 0, 0])])
    assert summary["divergence"] is None
    assert summary["levels"][0]["loss_kept"] is None and summary["levels"][0]["loss_dropped"] is None


def test_record() -> None:
    line = json.loads(json.dumps(record(extraction([104, 105, 0 + 110], [False, True, False, False]), Letters())))
    assert line["prompt"] == "abcd" and "".join(line["suffix_pieces"]) == "efgh"
    assert line["generated_pieces"] == ["e", "f", "k"]
    assert line["longest_common_prefix"] == 2 and line["exact_match"] is False and line["left_at_drop"] is True
    assert line["dropped"] == [0, 1, 0, 0] and line["effective_exposures"] == 10.0


@pytest.mark.parametrize(
    "text", ["plain words", "a\n\n   b\t", "emoji \U0001f41f and \u00e9\u4e2d", "\U0001f41f\U0001f41f"]
)
def test_text_pieces_join_to_the_text(tokenizer_file: Path, text: str) -> None:
    tokenizer = load_tokenizer(tokenizer_file)
    ids = tokenizer.encode(text)
    pieces = text_pieces(tokenizer, ids)
    assert len(pieces) == len(ids) and "".join(pieces) == text
    # Cut inside a character: what is shown is what decoding shows.
    cut = tokenizer.encode("\U0001f41f")[:-1]
    assert "".join(text_pieces(tokenizer, cut)) == tokenizer.decode(cut)
