"""Passages scored and continued in one, against token_scores and plain generation."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megafish.audit import continuation
from megafish.audit.continuation import score_and_continue
from megafish.audit.probes import load_canaries
from megafish.audit.scores import TokenScores, token_scores
from megafish.config import ModelConfig
from megafish.decode import stepping
from megafish.decode.generate import Sampler, generate
from megafish.decode.stepping import Stepper
from megafish.errors import InputError
from megafish.model.load import load_run
from megafish.model.transformer import KVCache, Transformer
from tests.audit.helpers import Runs

VOCAB, PROMPT, SUFFIX = 50, 5, 12


@pytest.fixture(scope="module")
def model() -> Transformer:
    shape: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48}
    return Transformer(ModelConfig.model_validate({**shape, "init_std": 0.4}), VOCAB, seed=3).eval()


def same_scores(found: list[TokenScores], wanted: list[TokenScores], suffix: int) -> None:
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a.log_prob, b.log_prob[-suffix:], rtol=0, atol=2e-5)
        assert a.likeliest.tolist() == b.likeliest[-suffix:].tolist()
        assert a.correct.tolist() == b.correct[-suffix:].tolist()
        assert (a.sampled_log_prob is None) == (b.sampled_log_prob is None)
        if a.sampled_log_prob is not None and b.sampled_log_prob is not None:
            np.testing.assert_allclose(a.sampled_log_prob, b.sampled_log_prob[-suffix:], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["plain", "goldfish"])
def test_trained_runs(runs: Runs, name: str) -> None:
    """Recited, left somewhere, and never begun."""
    loaded = load_run(getattr(runs, name))
    texts = [probe.tokens[:32].tolist() for probe in load_canaries(runs.corpus, 1.0)]
    prompts, suffixes = [text[:24] for text in texts], [text[24:] for text in texts]
    wanted = token_scores(loaded.model, texts, batch_size=7, temperature=0.9, top_k=40)
    scores, found = score_and_continue(
        loaded.model, loaded.tokenizer, prompts, suffixes, batch_size=5, sampler=Sampler(0.9, 40, None)
    )
    assert found == generate(loaded.model, loaded.tokenizer, prompts, max_new_tokens=8)
    assert (suffixes[-1] in found) == (name == "plain")
    same_scores(scores, wanted, 8)


@pytest.mark.parametrize("batch_size", [1, 7, 16, 64])
@pytest.mark.parametrize("recorded", [False, True])
def test_left_after_any_number_of_tokens(
    model: Transformer, batch_size: int, recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts and suffixes of any length, of which the first tokens are what greedy decoding writes: any number of
    them, none and all. End-of-text, where it comes, ends a text at any place."""
    random = torch.Generator().manual_seed(0)

    def number(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=random))

    prompts = [torch.randint(VOCAB, (number(1, PROMPT),), generator=random).tolist() for _ in range(60)]
    lengths = [number(1, SUFFIX) for _ in prompts]
    written = generate(model, None, prompts, max_new_tokens=lengths)
    right = [number(0, length) for length in lengths]
    suffixes = [
        [*text[:known], *((token + 1) % VOCAB for token in text[known:])]
        for text, known in zip(written, right, strict=True)
    ]
    assert {0, 1} < {length - known for length, known in zip(lengths, right, strict=True)}
    if recorded:  # as on a GPU, without a graph
        make = Stepper.__init__

        def make_recording(self: Stepper, model: Transformer) -> None:
            make(self, model)
            self.recorded = True

        monkeypatch.setattr(Stepper, "__init__", make_recording)
        monkeypatch.setattr(stepping, "record", lambda step, tokens: step)
    steps: list[int] = []
    step = Stepper.step

    def count(self: Stepper, chosen: torch.Tensor) -> torch.Tensor:
        steps.append(len(chosen))
        return step(self, chosen)

    monkeypatch.setattr(Stepper, "step", count)
    scores, found = score_and_continue(model, None, prompts, suffixes, batch_size=batch_size)
    assert found == written
    texts = [[*prompt, *suffix] for prompt, suffix in zip(prompts, suffixes, strict=True)]
    for one, other, length in zip(scores, token_scores(model, texts, batch_size=16), lengths, strict=True):
        same_scores([one], [other], length)
    # Of what is known nothing is generated.
    missing = [length - known - 1 for length, known in zip(lengths, right, strict=True) if length > known + 1]
    if batch_size == 1:
        assert sorted(steps) == [1] * sum(missing)
    assert max(steps) <= batch_size
    ends = []
    for eos in {text[place] for text in written[:20] for place in (0, 3, 6) if len(text) > place}:
        tokenizer: Any = SimpleNamespace(eos_id=eos)
        expected = generate(model, tokenizer, prompts, max_new_tokens=lengths)
        assert score_and_continue(model, tokenizer, prompts, suffixes, batch_size=batch_size)[1] == expected
        ends += [len(text) for text in expected]
    assert min(ends) == 0 and any(0 < end < SUFFIX for end in ends)


def test_passages_that_are_left_share_batches(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of eight goes on: they wait until a batch is full, and its memory is theirs alone."""
    prompts = [[i % VOCAB, 3, i // VOCAB] for i in range(64)]
    written = generate(model, None, prompts, max_new_tokens=SUFFIX)
    suffixes = [text if i % 8 else [(token + 1) % VOCAB for token in text] for i, text in enumerate(written)]
    rows: list[list[int]] = []
    adopt = Stepper.adopt

    def spy(self: Stepper, caches: list[KVCache], new: int) -> None:
        rows.append([cache.keys.shape[1] for cache in caches])
        adopt(self, caches, new)

    monkeypatch.setattr(Stepper, "adopt", spy)
    assert score_and_continue(model, None, prompts, suffixes, batch_size=8)[1] == written
    assert rows == [[1] * 8]


def test_nothing_is_kept_of_what_is_recited(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[KVCache]] = []
    most = 0
    rewound, read = KVCache.__init__, continuation._Work.read

    def make(self: KVCache, *arguments: Any, **options: Any) -> None:
        rewound(self, *arguments, **options)
        alive.append(weakref.ref(self))

    def count(self: continuation._Work, numbers: list[int]) -> Any:
        nonlocal most
        most = max(most, sum(cache() is not None for cache in alive))
        return read(self, numbers)

    monkeypatch.setattr(KVCache, "__init__", make)
    monkeypatch.setattr(continuation._Work, "read", count)
    prompts = [[i % VOCAB, 3, i // VOCAB] for i in range(64)]
    written = generate(model, None, prompts, max_new_tokens=SUFFIX)
    others = [[(token + 1) % VOCAB for token in text] for text in written]
    for suffixes, kept in ((written, 0), (others, 2)):
        alive.clear()
        most = 0
        assert score_and_continue(model, None, prompts, suffixes, batch_size=8)[1] == written
        assert most <= kept, "the one that waits, and the copy that was gone on with last"


def test_nothing_to_do(model: Transformer) -> None:
    assert score_and_continue(model, None, [], [], batch_size=4) == ([], [])


@pytest.mark.parametrize(
    ("prompt", "suffix", "message"),
    [([], [1, 2], "passage 0: an empty prompt"), ([1], [], "passage 0: an empty"), ([1], [VOCAB], "holds an id")],
)
def test_wrong_passages(model: Transformer, prompt: list[int], suffix: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        score_and_continue(model, None, [prompt], [suffix], batch_size=1)
