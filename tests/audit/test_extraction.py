from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megafish.audit.extraction import at_or_after_drop, record, text_pieces
from megafish.data.tokenizer import load_tokenizer
from tests.audit.helpers import extraction


class Letters:
    """A tokenizer whose token 100 is "a", 101 "b", ..."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i - 3) for i in ids)


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


def test_record() -> None:
    line = json.loads(json.dumps(record(extraction([104, 105, 0 + 110], [False, True, False, False]), Letters())))
    assert line["prompt"] == "abcd" and "".join(line["suffix_pieces"]) == "efgh"
    assert line["generated_pieces"] == ["e", "f", "k"]
    assert line["longest_common_prefix"] == 2 and line["exact_match"] is False and line["left_at_drop"] is True
    assert line["dropped"] == [0, 1, 0, 0] and line["effective_exposures"] == 10.0
    assert line["longest_common_substring"] == 2 and line["edit_distance"] == 0.5 and line["bleu"] == 0.0
    assert line["extraction_strength"] == 0.5 and line["exact_memorization"] == 0.75
    # p = 1/2: 0.5^n <= 0.1 from n = log2(10) on.
    assert line["tries_needed"] == pytest.approx(math.log2(10)) or line["tries_needed"] == 4


def test_record_of_what_cannot_be_drawn_and_is_of_unknown_exposures() -> None:
    item = extraction([104], exposures=None, log_probability=-math.inf)
    line = json.loads(json.dumps(record(item, Letters())))
    assert line["log_probability"] is None and line["tries_needed"] is None and line["effective_exposures"] is None


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
