"""Memorization metrics on token ids. Pure functions: no model, no files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

APPROXIMATE = 0.10
"""Largest normalized edit distance of an approximate match (the rule of the Gemma reports)."""
BLEU_MEMORIZED = 0.75
"""BLEU above which a text counts as approximately memorized (Ippolito et al. 2023, arXiv 2210.17546)."""


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


def longest_common_substring(reference: Sequence[int], candidate: Sequence[int]) -> int:
    """Length of the longest run of tokens that stands in both."""
    lengths = [0] * (len(candidate) + 1)
    longest = 0
    for token in reference:
        # From the right: entry j is still the previous row's when j + 1 reads it.
        for j in range(len(candidate), 0, -1):
            lengths[j] = lengths[j - 1] + 1 if token == candidate[j - 1] else 0
            longest = max(longest, lengths[j])
    return longest


def edit_distance(reference: Sequence[int], candidate: Sequence[int]) -> int:
    """Levenshtein distance: insertions, deletions and replacements of tokens."""
    from rapidfuzz.distance import Levenshtein

    return int(Levenshtein.distance(list(reference), list(candidate)))


def normalized_edit_distance(reference: Sequence[int], candidate: Sequence[int]) -> float:
    """Edit distance over the longer length, in [0, 1]; 0 for two empty texts."""
    longer = max(len(reference), len(candidate))
    return edit_distance(reference, candidate) / longer if longer else 0.0


def bleu(reference: Sequence[int], candidate: Sequence[int]) -> float:
    """BLEU-4 of one text (Papineni et al. 2002) in [0, 1], a token id taken as a word, without smoothing.

    0 where no run of four tokens is shared, so also for texts of fewer than four. Equal to sacrebleu's sentence BLEU
    with tokenize="none" and smooth_method="none".
    """
    if min(len(reference), len(candidate)) < 4:
        return 0.0
    logs = 0.0
    for n in range(1, 5):
        have, want = _ngrams(candidate, n), _ngrams(reference, n)
        shared = sum((have & want).values())
        if not shared:
            return 0.0
        logs += math.log(shared / sum(have.values()))
    brevity = min(0.0, 1 - len(reference) / len(candidate))
    return math.exp(brevity + logs / 4)


def _ngrams(tokens: Sequence[int], n: int) -> Counter[tuple[int, ...]]:
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def extraction_strength(correct: Sequence[bool] | np.ndarray) -> float:
    """Share of a text that need not be given before the rest comes out (Carlini et al. 2021; ES of OpenUnlearning).

    correct: bool [n], whether each token is the most probable one given the true text before it. 1 - k / n for the
    least k such that all tokens from k on are correct; 0 where the last one is wrong.
    """
    wrong = np.flatnonzero(~np.asarray(correct, dtype=bool))
    return 1.0 if not len(wrong) else 1 - (int(wrong[-1]) + 1) / len(correct)


def exact_memorization(correct: Sequence[bool] | np.ndarray) -> float:
    """Share of tokens that are the most probable one given the true text before them (Tirumala et al. 2022)."""
    return float(np.mean(np.asarray(correct, dtype=bool)))


def discoverable(log_probability: float, tries: int, certainty: float) -> bool:
    """(n, p)-discoverable extraction (Hayes et al. 2024, arXiv 2410.19482): does a text of this probability [nats] come
    out at least once in `tries` independent draws with probability `certainty` or more?"""
    return tries_needed(log_probability, certainty) <= tries


def tries_needed(log_probability: float, certainty: float) -> float:
    """Least whole number of draws n with 1 - (1 - p)^n >= certainty; inf where it is beyond a float."""
    if not 0 < certainty < 1:
        raise ValueError(f"certainty={certainty} must lie between 0 and 1")
    if log_probability >= 0:
        return 1.0
    p = math.exp(log_probability)
    # log(1 - p) is -p to the last bit where p is small, and p itself is 0 below e^-745.
    per_draw = -math.log1p(-p) if p > 1e-300 else 0.0
    if per_draw:
        return float(max(1, math.ceil(-math.log1p(-certainty) / per_draw - 1e-12)))
    exponent = math.log(-math.log1p(-certainty)) - log_probability
    return math.exp(exponent) if exponent < 709 else math.inf
