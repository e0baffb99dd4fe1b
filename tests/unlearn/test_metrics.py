"""Every metric on cases computed by hand, with the pitfalls that are known of it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megafish.unlearn.data import Item
from megafish.unlearn.items import leak_threshold
from megafish.unlearn.metrics import (
    brunet,
    distinct,
    forget_quality,
    harmonic_mean,
    honore,
    linguistic_score,
    privacy_leak,
    repetition,
    rouge_recall,
    truth_ratio,
    words_of,
)


def test_truth_ratio_is_the_geometric_mean_of_wrong_over_true() -> None:
    # P(wrong) = 0.1 and 0.4, geometric mean 0.2; P(true) = 0.5.
    assert truth_ratio(-math.log(0.5), [-math.log(0.1), -math.log(0.4)]) == pytest.approx(0.2 / 0.5)
    assert truth_ratio(1.3, [1.3, 1.3]) == 1.0
    assert math.isfinite(truth_ratio(1e9, [0.0]))


def test_forget_quality_by_hand() -> None:
    # Distributions that do not overlap: the statistic is 1, of 3 and 3 values the exact p is 2 / C(6, 3).
    assert forget_quality([1, 2, 3], [4, 5, 6]) == pytest.approx((2 / 20, 1.0))
    assert forget_quality([1, 2, 3], [1, 2, 3]) == pytest.approx((1.0, 0.0))
    rng = np.random.default_rng(0)
    assert forget_quality(rng.normal(0, 1, 200), rng.normal(1, 1, 200)).p_value < 1e-6


def test_harmonic_mean() -> None:
    assert harmonic_mean([1, 0.5, 0.25]) == pytest.approx(3 / 7)
    assert harmonic_mean([1, 1, 0]) == 0


def test_rouge_recall_counts_the_reference_in_order_after_stemming() -> None:
    assert rouge_recall("the cats sat down", "the cat was sitting down there") == pytest.approx(3 / 4)
    assert rouge_recall("a b c d", "d c b a") == 1 / 4
    assert rouge_recall("born in Oslo", "") == 0


def test_privacy_leak() -> None:
    assert privacy_leak(0.5, 0.5) == 0
    assert privacy_leak(1.0, 0.5) == -100  # every forgotten text is still told
    assert privacy_leak(0.0, 0.5) == 100  # they stand out by being unlikely
    assert privacy_leak(0.6, 0.52) == pytest.approx(100 * (0.4 - 0.48) / 0.48)


def test_variety_of_words() -> None:
    assert words_of("It's at Bonn, at 9.") == ["it's", "at", "bonn", "at", "9"]
    assert distinct(["a", "b", "a", "b"], 2) == pytest.approx(2 / 3)
    assert distinct(["a"], 2) == 0
    assert repetition(["at"] * 3 + ["x"]) == 0.75 and repetition([]) == 1


def test_at_at_at_is_the_papers_table_9() -> None:
    words = ["at"] * 128
    assert brunet(words) == 128
    assert honore(words) == pytest.approx(441.09, abs=0.005)


def test_linguistic_score_is_the_harmonic_mean_of_logistic_functions() -> None:
    def logistic(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    for perplexity, index, statistic in ((8.6, 8.0, 1500.0), (1.33, 128.0, 441.09), (29.4, 7.1, 0.5)):
        parts = [logistic(-math.log(perplexity)), logistic(-math.log(index)), logistic(math.log(statistic))]
        assert linguistic_score(perplexity, index, statistic) == pytest.approx(3 / sum(1 / part for part in parts))
    # Nonsense of one word is fluent to a model that makes it, and the score says otherwise.
    assert linguistic_score(1.33, 128, 441.09) == pytest.approx(0.023, abs=0.001)
    assert linguistic_score(8.6, 8.0, 1500.0) == pytest.approx(0.153, abs=0.001)
    assert linguistic_score(5.0, 1.0, honore([])) == 0


def test_leak_threshold_by_hand() -> None:
    """A tenth of the mean BLEU of two texts: 0.1 where all are the same, 0 where no four tokens are shared."""
    same, other = Item((1, 2, 3, 4, 5, 6), 1), Item((7, 8, 9, 10, 11, 12), 1)
    assert leak_threshold([same, same, same]) == pytest.approx(0.1)
    assert leak_threshold([same, other]) == 0 == leak_threshold([same])
    # Of three texts two are the same: a pair is alike in one of three draws.
    assert leak_threshold([same, same, other], pairs=3000) == pytest.approx(0.1 / 3, rel=0.1)
