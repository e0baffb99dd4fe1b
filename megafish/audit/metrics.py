"""Memorization metrics on token ids. Pure functions: no model, no files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any


def longest_common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading tokens that `a` and `b` share."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def rouge_l(reference: Sequence[int], candidate: Sequence[int]) -> float:
    """ROUGE-L F1 (Lin 2004) in [0, 1] by the rouge-score package, one token id = one word, no stemming.

    Ids rather than words make the score independent of the language and of how text is split into words; it is the
    longest common SUBSEQUENCE, so a recitation with a few tokens replaced still scores high.
    """
    if not reference or not candidate:
        return 0.0
    score = _scorer().score(" ".join(map(str, reference)), " ".join(map(str, candidate)))
    return float(score["rougeL"].fmeasure)


class _Ids:
    """Splits a line of ids; the package's own tokenizer would lower-case and stem words."""

    def tokenize(self, text: str) -> list[str]:
        return text.split()


@lru_cache(maxsize=1)
def _scorer() -> Any:
    # rouge_score pulls in nltk, which takes a second to import: only an extraction pays for it.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Ids())


def wilson_interval(successes: int, trials: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927), 95 % by default. Zero trials: (0, 1), nothing is known.

    Unlike the normal interval it stays inside [0, 1] and is not of zero width at 0 or n successes: "none of 20 canaries
    was recited" is reported as an upper bound of 16 %.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes={successes} must lie between 0 and trials={trials}")
    if trials == 0:
        return 0.0, 1.0
    p = successes / trials
    scale = 1 + z * z / trials
    centre = (p + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    # At 0 and n successes the ends are exactly 0 and 1; rounding would leave a tiny remainder.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return low, high


def shared_spans(reference: Sequence[int], candidate: Sequence[int], shortest: int = 5) -> list[tuple[int, int]]:
    """Runs of `candidate` that occur verbatim in `reference`, as sorted, disjoint (start, end) in `candidate`.

    Greedy from the left: at each place the longest run that occurs anywhere in `reference`, taken if it has at least
    `shortest` tokens. A recitation that goes on after a slip is found this way; the longest common prefix misses it.
    """
    starts: dict[int, list[int]] = {}
    for j, token in enumerate(reference):
        starts.setdefault(token, []).append(j)
    spans: list[tuple[int, int]] = []
    i = 0
    while i < len(candidate):
        longest = max(
            (longest_common_prefix(candidate[i:], reference[j:]) for j in starts.get(candidate[i], [])), default=0
        )
        if longest >= shortest:
            spans.append((i, i + longest))
        i += longest if longest >= shortest else 1
    return spans
