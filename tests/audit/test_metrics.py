from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megafish.audit.metrics import (
    bleu,
    discoverable,
    edit_distance,
    exact_memorization,
    extraction_strength,
    longest_common_prefix,
    longest_common_substring,
    normalized_edit_distance,
    rouge_l,
    shared_spans,
    tries_needed,
)

IDS = st.lists(st.integers(0, 5), max_size=24)


@pytest.mark.parametrize(
    ("a", "b", "length"),
    [
        ([], [], 0),
        ([1], [], 0),
        ([1, 2, 3], [1, 2, 3], 3),
        ([1, 2, 3], [1, 2], 2),
        ([1, 2, 9, 4], [1, 2, 3, 4], 2),
        ([5], [6], 0),
    ],
)
def test_longest_common_prefix(a: list[int], b: list[int], length: int) -> None:
    assert longest_common_prefix(a, b) == longest_common_prefix(b, a) == length


def lcs(a: list[int], b: list[int]) -> int:
    """Longest common subsequence, by the textbook recurrence."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@settings(max_examples=60, deadline=None)
@given(IDS, IDS)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(a: list[int], b: list[int]) -> None:
    common = lcs(a, b)
    expected = 0.0 if common == 0 else 2 * (common / len(a)) * (common / len(b)) / (common / len(a) + common / len(b))
    assert rouge_l(a, b) == pytest.approx(expected, abs=1e-12)


def test_rouge_l_sees_ids_not_digits() -> None:
    assert rouge_l([12, 3], [1, 23]) == 0.0
    assert rouge_l([1, 2, 3, 4], [1, 9, 3, 4]) == pytest.approx(0.75)


def test_shared_spans() -> None:
    reference = list(range(20))
    assert shared_spans(reference, reference) == [(0, 20)]
    assert shared_spans(reference, [0, 1, 2, 3, 99, *range(10, 16), 99]) == [(5, 11)]
    assert shared_spans(reference, [0, 1, 2, 3], shortest=4) == [(0, 4)]
    assert shared_spans([], [1, 2, 3]) == shared_spans([1, 2], []) == []
    # The longest run wins, not the first that begins with the token.
    assert shared_spans([1, 2, 9, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5]) == [(0, 5)]


@settings(max_examples=60, deadline=None)
@given(IDS, IDS, st.integers(1, 6))
def test_shared_spans_occur_in_the_reference(reference: list[int], candidate: list[int], shortest: int) -> None:
    last = 0
    for start, end in shared_spans(reference, candidate, shortest):
        assert start >= last and end - start >= shortest
        run = candidate[start:end]
        assert any(reference[j : j + len(run)] == run for j in range(len(reference)))
        last = end
    assert math.isfinite(last)


@settings(max_examples=60, deadline=None)
@given(IDS, IDS)
def test_longest_common_substring_against_brute_force(a: list[int], b: list[int]) -> None:
    runs = [a[i:j] for i in range(len(a)) for j in range(i + 1, len(a) + 1)]
    expected = max((len(run) for run in runs if any(b[k : k + len(run)] == run for k in range(len(b)))), default=0)
    assert longest_common_substring(a, b) == expected


def levenshtein(a: list[int], b: list[int]) -> int:
    """By the textbook recurrence."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


@settings(max_examples=60, deadline=None)
@given(IDS, IDS)
def test_edit_distance(a: list[int], b: list[int]) -> None:
    assert edit_distance(a, b) == levenshtein(a, b)
    longer = max(len(a), len(b))
    assert normalized_edit_distance(a, b) == (levenshtein(a, b) / longer if longer else 0.0)


@pytest.mark.parametrize(
    ("reference", "candidate", "expected"),
    [
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], 1.0),
        # 4 of 5 words, 3 of 4 pairs, 2 of 3 triples, 1 of 2 fours.
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 9], (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25),
        # All of it right, but one token short: brevity e^(1 - 5/4).
        ([1, 2, 3, 4, 5], [1, 2, 3, 4], math.exp(-0.25)),
        ([1, 2, 3, 4], [4, 3, 2, 1], 0.0),
        ([1, 2, 3], [1, 2, 3], 0.0),
        ([], [1, 2, 3, 4], 0.0),
        ([1, 2, 3, 4], [], 0.0),
    ],
)
def test_bleu(reference: list[int], candidate: list[int], expected: float) -> None:
    assert bleu(reference, candidate) == pytest.approx(expected)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=24), st.lists(st.integers(0, 3), max_size=24))
def test_bleu_equals_sacrebleu(reference: list[int], candidate: list[int]) -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    texts = [" ".join(map(str, ids)) for ids in (candidate, reference)]
    theirs = sacrebleu.sentence_bleu(
        texts[0], [texts[1]], tokenize="none", smooth_method="none", use_effective_order=False
    )
    assert bleu(reference, candidate) == pytest.approx(theirs.score / 100, abs=1e-9)


@pytest.mark.parametrize(
    ("correct", "strength", "share"),
    [
        ([True, True, True, True], 1.0, 1.0),
        ([False, True, True, True], 0.75, 0.75),
        ([True, True, False, True], 0.25, 0.75),
        ([True, True, True, False], 0.0, 0.75),  # not 1 / n, which some code gives a text never learned
        ([False], 0.0, 0.0),
    ],
)
def test_extraction_strength_and_exact_memorization(correct: list[bool], strength: float, share: float) -> None:
    assert extraction_strength(correct) == strength
    assert exact_memorization(correct) == share


def test_tries_needed() -> None:
    # (1 - 1/2)^n <= 0.1 from n = 4 on; 0.99^n <= 0.1 from 230 on.
    assert tries_needed(math.log(0.5), 0.9) == 4
    assert tries_needed(math.log(0.01), 0.9) == math.ceil(math.log(0.1) / math.log(0.99)) == 230
    assert tries_needed(0.0, 0.9) == 1
    assert tries_needed(math.log(0.9), 0.9) == 1, "exactly as likely as asked for"
    # Where p is far below what a float holds.
    assert math.log(tries_needed(-700.0, 0.9)) == pytest.approx(700 + math.log(math.log(10)))
    assert tries_needed(-1000.0, 0.9) == math.inf and tries_needed(-math.inf, 0.9) == math.inf
    with pytest.raises(ValueError, match="certainty=1"):
        tries_needed(-1.0, 1)


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-6, 0.999), st.floats(0.01, 0.99))
def test_discoverable_is_its_definition(p: float, certainty: float) -> None:
    tries = int(tries_needed(math.log(p), certainty))
    assert 1 - (1 - p) ** tries >= certainty - 1e-9
    assert tries == 1 or 1 - (1 - p) ** (tries - 1) < certainty + 1e-9
    assert discoverable(math.log(p), tries, certainty)
    assert tries == 1 or not discoverable(math.log(p), tries - 1, certainty)
