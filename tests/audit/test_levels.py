from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megafish.audit.levels import rate, summarize
from megafish.audit.statistics import wilson_interval
from tests.audit.helpers import extraction


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


def test_a_bin_of_occurrences_has_their_mean() -> None:
    items = [extraction([104, 0, 0, 0], exposures=4) for _ in range(3)]
    assert summarize(items)["levels"][0]["occurrences"] is None
    counted = [
        replace(item, probe=replace(item.probe, occurrences=n)) for item, n in zip(items, (4, 4, 7), strict=True)
    ]
    [level] = summarize(counted)["levels"]
    assert level["exposures"] == 4 and level["occurrences"] == 5.0
    assert level["effective_exposures"] == pytest.approx(5.0 * (items[0].probe.epochs or 0))


def test_summarize_without_a_fixed_mask() -> None:
    summary = summarize([extraction([0, 0, 0, 0])])
    assert summary["divergence"] is None
    assert summary["levels"][0]["loss_kept"] is None and summary["levels"][0]["loss_dropped"] is None


def test_rate() -> None:
    low, high = wilson_interval(1, 4)
    expected = {"exact_matches": 1, "exact_rate": 0.25, "exact_low": low, "exact_high": high}
    assert rate("exact", [True, False, False, False]) == expected


def test_near_misses_and_probabilities() -> None:
    recited = [104, 105, 106, 107]
    items = [
        extraction(recited, log_probability=math.log(0.95), correct=[True] * 4, hits=[4, 0]),
        extraction([104, 105, 106, 0], log_probability=math.log(0.02), correct=[True, True, False, True], hits=[0, 3]),
    ]
    [level] = summarize(items)["levels"]
    # One edit in four tokens is more than 10 %; a BLEU-4 of four tokens is 1 or 0.
    assert level["approximate_rate"] == 0.5 and level["bleu_rate"] == 0.5 and level["mean_edit_distance"] == 0.125
    assert level["mean_substring"] == 3.5
    assert level["extraction_strength"] == (1.0 + 0.25) / 2 and level["exact_memorization"] == (1 + 0.75) / 2
    # 1 - 0.98^n >= 0.9 from n = 114 on.
    assert level["discoverable"] == {"1": 1, "10": 1, "100": 1, "1000": 2}
    assert level["samples"] == 2 and level["sampled_rate"] == 0.5 and level["sampled_share"] == 0.25
    assert level["expected_share"] == pytest.approx((0.95 + 0.02) / 2)


def test_unknown_exposures_are_a_level_of_their_own() -> None:
    levels = summarize([extraction([0], exposures=2), extraction([0], exposures=None)])["levels"]
    assert [level["exposures"] for level in levels] == [None, 2] and levels[0]["effective_exposures"] is None
    assert "samples" not in levels[0], "nothing was drawn"
