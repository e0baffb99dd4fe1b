from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from megafish.audit.metrics import longest_common_prefix, rouge_l, shared_spans, wilson_interval

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


@pytest.mark.parametrize("trials", [1, 7, 20, 1000])
def test_wilson_interval_against_scipy(trials: int) -> None:
    for successes in {0, 1, trials // 2, trials - 1, trials}:
        expected = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
        assert wilson_interval(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_interval_at_the_ends() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    low, high = wilson_interval(0, 20)
    z2 = 1.959963984540054**2
    assert low == 0.0 and high == pytest.approx(z2 / (20 + z2))
    assert wilson_interval(20, 20)[1] == 1.0
    with pytest.raises(ValueError, match="successes=3"):
        wilson_interval(3, 2)


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
