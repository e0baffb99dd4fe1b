from __future__ import annotations

import zlib

import numpy as np
import pytest

from megafish.audit.membership import attack, membership_scores
from megafish.audit.scores import TokenScores
from megafish.errors import InputError

TEXTS = ["a text of some length, a text of some length", "another one"]
NONE = np.zeros(25, dtype=np.int64)
"""The likeliest tokens, of which no score is made."""


def scores(seed: int = 0, tokens: tuple[int, ...] = (10, 25)) -> list[TokenScores]:
    random = np.random.Generator(np.random.Philox(seed))
    return [
        TokenScores(
            -random.exponential(2, n), random.random(n) < 0.5, NONE[:n], -random.exponential(3, n), 1 + random.random(n)
        )
        for n in tokens
    ]


def test_scores_by_hand() -> None:
    """Five tokens: the lowest 20 % is one token."""
    log_prob, mean, std = np.array([-1.0, -4.0, -2.0, -3.0, 0.0]), np.full(5, -2.0), np.array([1.0, 4, 1, 0.5, 1])
    one = TokenScores(log_prob, log_prob > -1, NONE[:5], mean, std)
    reference = [TokenScores(log_prob - 1.5, log_prob > -1, NONE[:5])]
    found = membership_scores([one], [TEXTS[0]], reference)
    size = len(zlib.compress(TEXTS[0].encode()))
    assert found["loss"][0] == -2.0
    assert found["zlib"][0] == -2.0 / size
    assert found["min_k"][0] == -4.0
    # (log p - mu) / sigma: 1, -0.5, 0, -2, 2.
    assert found["min_k++"][0] == -2.0
    assert found["reference"][0] == pytest.approx(1.5), "less likely to the reference: a member"
    assert found["blind"][0] == -size / 5


def test_scores_against_plain_loops() -> None:
    given = scores()
    found = membership_scores(given, TEXTS)
    assert "reference" not in found
    for i, score in enumerate(given):
        assert score.mean is not None and score.std is not None
        lowest = sorted(float(x) for x in score.log_prob)[: max(1, len(score.log_prob) // 5)]
        standard = [(x - m) / s for x, m, s in zip(score.log_prob, score.mean, score.std, strict=True)]
        assert found["min_k"][i] == pytest.approx(sum(lowest) / len(lowest))
        lowest = sorted(standard)[: max(1, len(standard) // 5)]
        assert found["min_k++"][i] == pytest.approx(sum(lowest) / len(lowest))


def test_attack() -> None:
    random = np.random.Generator(np.random.Philox(1))
    members = {"loss": random.normal(1, 1, 150), "blind": random.normal(0, 1, 150)}
    others = {"loss": random.normal(0, 1, 120), "blind": random.normal(0, 1, 120)}
    found = attack(members, others)
    assert (found["members"], found["non_members"]) == (150, 120)
    loss, blind = found["attacks"]["loss"], found["attacks"]["blind"]
    assert loss["low"] < loss["auc"] < loss["high"] and loss["low"] > 0.6
    assert blind["low"] < 0.5 < blind["high"]
    assert 0 <= loss["tpr"]["0.01"]["tpr"] <= 1
    assert loss["tpr"]["0.001"] == {"tpr": None, "reason": "needs at least 1000 non-members, there are 120"}
    assert len(loss["roc"]["fpr"]) == len(loss["roc"]["tpr"])


@pytest.mark.parametrize(("m", "n", "message"), [(1, 5, "1 members"), (5, 0, "0 non-members")])
def test_groups_that_say_nothing(m: int, n: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        attack({"loss": np.zeros(m)}, {"loss": np.zeros(n)})
