"""Continuations that start behind what is known, against plain generation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megafish.audit import continuation as module
from megafish.audit.continuation import continue_greedily
from megafish.audit.probes import load_canaries
from megafish.audit.scores import token_scores
from megafish.config import ModelConfig
from megafish.decode.generate import generate
from megafish.model.load import load_run
from megafish.model.transformer import Transformer
from tests.audit.helpers import Runs

VOCAB, PROMPT, SUFFIX = 50, 5, 12


@pytest.fixture(scope="module")
def model() -> Transformer:
    shape: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48}
    return Transformer(ModelConfig.model_validate({**shape, "init_std": 0.4}), VOCAB, seed=3).eval()


@pytest.mark.parametrize("name", ["plain", "goldfish"])
def test_trained_runs(runs: Runs, name: str) -> None:
    """Recited, left somewhere, and never begun."""
    loaded = load_run(getattr(runs, name))
    texts = [probe.tokens[:32].tolist() for probe in load_canaries(runs.corpus, 1.0)]
    prompts, suffixes = [text[:24] for text in texts], [text[24:] for text in texts]
    scores = token_scores(loaded.model, texts, batch_size=7)
    found = continue_greedily(loaded.model, loaded.tokenizer, prompts, suffixes, scores, batch_size=5)
    assert found == generate(loaded.model, loaded.tokenizer, prompts, max_new_tokens=8)
    assert (suffixes[-1] in found) == (name == "plain")


@pytest.mark.parametrize("right", [0, 1, 5, SUFFIX - 1, SUFFIX])
def test_left_after_any_number_of_tokens(model: Transformer, right: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first `right` tokens are what greedy decoding writes; end-of-text, where it comes, ends a text at any place.
    Of what is known nothing is generated."""
    random = torch.Generator().manual_seed(right)
    prompts = torch.randint(VOCAB, (40, PROMPT), generator=random).tolist()
    written = generate(model, None, prompts, max_new_tokens=SUFFIX)
    suffixes = [[*text[:right], *((token + 1) % VOCAB for token in text[right:])] for text in written]
    scores = token_scores(model, [a + b for a, b in zip(prompts, suffixes, strict=True)], batch_size=16)
    asked: list[int] = []

    def spy(*arguments: Any, max_new_tokens: list[int], **options: Any) -> list[list[int]]:
        asked.extend(max_new_tokens)
        return generate(*arguments, max_new_tokens=max_new_tokens, **options)

    monkeypatch.setattr(module, "generate", spy)
    assert continue_greedily(model, None, prompts, suffixes, scores, batch_size=16) == written
    assert asked == [SUFFIX - right - 1] * (40 if right < SUFFIX - 1 else 0)
    ends = []
    for eos in {text[place] for text in written[:5] for place in (0, 3, 6)}:
        tokenizer: Any = SimpleNamespace(eos_id=eos)
        expected = generate(model, tokenizer, prompts, max_new_tokens=SUFFIX)
        assert continue_greedily(model, tokenizer, prompts, suffixes, scores, batch_size=16) == expected
        ends += [len(text) for text in expected]
    assert min(ends) == 0 and any(0 < end < SUFFIX for end in ends)
