from __future__ import annotations

import numpy as np
import pytest

from megafish.data.canary import CanaryConfig, Candidate, CandidateKeeper, choose, places
from megafish.data.tokenizer import Tokenizer
from megafish.errors import InputError


def offer_documents(keeper: CandidateKeeper, digests: list[int], length: int = 40) -> None:
    for digest in digests:
        keeper.offer(digest, np.arange(300, 300 + length, dtype=np.int32), f"{digest}.txt")


def test_the_choice_of_parts_is_the_choice_of_the_whole(bpe: Tokenizer) -> None:
    config = CanaryConfig(count=2, tokens=16, exposures=(0, 1, 4))
    whole = CandidateKeeper(config, bpe)
    offer_documents(whole, list(range(100)))
    merged: list[Candidate] = []
    for part in range(7):
        keeper = CandidateKeeper(config, bpe)
        offer_documents(keeper, [*range(part, 100, 7), part])  # with a duplicate
        merged += keeper.candidates()
    assert choose(merged, config) == choose(whole.candidates(), config)
    canaries, digests = choose(merged, config)
    assert [canary.exposures for canary in canaries] == [0, 0, 1, 1, 4, 4]
    assert [canary.id for canary in canaries] == list(range(6))
    assert {canary.source for canary in canaries} == {f"{digest}.txt" for digest in digests}
    for canary in canaries:
        assert len(canary.tokens) == 16 and bpe.decode(canary.tokens) == canary.text
        assert np.diff(canary.tokens).tolist() == [1] * 15  # a run of the document's tokens


def test_the_first_of_equal_documents_is_the_source(bpe: Tokenizer) -> None:
    config = CanaryConfig(count=1, tokens=16, exposures=(1,))
    merged: list[Candidate] = []
    for source in ("first.txt", "second.txt"):
        keeper = CandidateKeeper(config, bpe)
        keeper.offer(7, np.arange(300, 340, dtype=np.int32), source)
        merged += keeper.candidates()
    assert choose(merged, config)[0][0].source == "first.txt"


def test_another_seed_chooses_others(bpe: Tokenizer) -> None:
    chosen = []
    for seed in range(2):
        config = CanaryConfig(count=5, tokens=16, exposures=(1, 2), seed=seed)
        keeper = CandidateKeeper(config, bpe)
        offer_documents(keeper, list(range(200)))
        chosen.append(choose(keeper.candidates(), config)[1])
    assert chosen[0] != chosen[1]


def test_short_and_broken_passages_are_passed_over(bpe: Tokenizer) -> None:
    config = CanaryConfig(count=1, tokens=16, exposures=(1,))
    keeper = CandidateKeeper(config, bpe)
    offer_documents(keeper, [1, 2], length=15)
    keeper.offer(3, np.full(40, bpe.encode("\N{GRINNING FACE}")[0], dtype=np.int32), "halves.txt")
    assert keeper.candidates() == []
    offer_documents(keeper, [4], length=16)
    assert [candidate.digest for candidate in keeper.candidates()] == [4]


def test_too_few_documents(bpe: Tokenizer) -> None:
    config = CanaryConfig(count=3, tokens=16, exposures=(0, 1))
    keeper = CandidateKeeper(config, bpe)
    offer_documents(keeper, [1, 2, 2, 3])
    message = "3 passages at 2 exposure levels need 6 different documents of at least 16 tokens, the corpus has 3"
    with pytest.raises(InputError, match=message):
        choose(keeper.candidates(), config)


def test_places_are_counted_spread_and_stable(bpe: Tokenizer) -> None:
    config = CanaryConfig(count=2, tokens=16, exposures=(0, 3, 200))
    keeper = CandidateKeeper(config, bpe)
    offer_documents(keeper, list(range(20)))
    canaries, _ = choose(keeper.candidates(), config)
    copies = places(canaries, 0, 1000)
    assert np.bincount([number for _, number in copies]).tolist() == [0, 0, 3, 3, 200, 200]
    where = np.array([place for place, _ in copies])
    assert (np.diff(where) >= 0).all() and where.min() >= 0 and where.max() <= 1000
    # 406 uniform draws: each quarter's count is 101.5 with a standard deviation of 8.7
    assert (abs(np.histogram(where, 4, (0, 1000))[0] - 101.5) < 4 * 8.8).all()
    assert copies == places(canaries, 0, 1000) != places(canaries, 1, 1000)
    assert {place for place, _ in places(canaries, 0, 0)} == {0}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"count": 0}, "count=0 must be at least 1"),
        ({"tokens": 1}, "tokens=1 must be at least 2"),
        ({"exposures": ()}, "exposures="),
        ({"exposures": (1, 1)}, "exposures="),
        ({"exposures": (-1,)}, "exposures="),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_wrong_settings(setting: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CanaryConfig(**setting)  # type: ignore[arg-type]
