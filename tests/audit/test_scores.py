"""Scores against float64 from the whole logits, and against generation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from megafish.audit import scores as module
from megafish.audit.probes import load_canaries
from megafish.audit.scores import TokenScores, token_scores
from megafish.config import ModelConfig
from megafish.decode.generate import generate
from megafish.errors import InputError
from megafish.model.load import load_run
from megafish.model.transformer import Transformer
from tests.audit.helpers import Runs

VOCAB = 50
TEXTS = [[3, 4, 5, 6, 7, 8, 9], [1, 2], [49, 0, 49, 0, 48], list(range(20))]


@pytest.fixture(scope="module")
def model() -> Transformer:
    shape: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48}
    return Transformer(ModelConfig.model_validate({**shape, "init_std": 0.4}), VOCAB, seed=3).eval()


def logits_of(model: Transformer, text: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([text[:-1]]))[0, :, :VOCAB].double().numpy()


@pytest.mark.parametrize("batch_size", [1, 3, 10])
@pytest.mark.parametrize("logits_bytes", [1, 1 << 20])
def test_scores_are_those_of_the_whole_logits(
    model: Transformer, batch_size: int, logits_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any batch, and however few rows of logits there may be at one time."""
    monkeypatch.setattr(module, "_LOGITS_BYTES", logits_bytes)
    found = token_scores(model, TEXTS, batch_size=batch_size, moments=True)
    for text, score in zip(TEXTS, found, strict=True):
        logits = logits_of(model, text)
        log_probs = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        log_probs -= logits.max(1, keepdims=True)
        probs, targets = np.exp(log_probs), np.array(text[1:])
        np.testing.assert_allclose(score.log_prob, log_probs[np.arange(len(targets)), targets], atol=1e-5)
        assert score.correct.tolist() == (logits.argmax(1) == targets).tolist()
        mean = (probs * log_probs).sum(1)
        assert score.mean is not None and score.std is not None
        np.testing.assert_allclose(score.mean, mean, atol=1e-5)
        np.testing.assert_allclose(score.std, np.sqrt((probs * (log_probs - mean[:, None]) ** 2).sum(1)), atol=1e-4)
        assert score.sampled_log_prob is None


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, None), (0.5, None, None), (1.0, 3, None), (2.0, 5, 0.7), (1.0, None, 0.6), (0.0, None, None)],
)
def test_probability_of_drawing_a_token(
    model: Transformer, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    found = token_scores(model, TEXTS, batch_size=2, temperature=temperature, top_k=top_k, top_p=top_p)
    for text, score in zip(TEXTS, found, strict=True):
        assert score.sampled_log_prob is not None
        for row, token, got in zip(logits_of(model, text), text[1:], score.sampled_log_prob, strict=True):
            order = np.argsort(-row, kind="stable")
            if temperature == 0:
                expected = 0.0 if order[0] == token else -math.inf
            else:
                kept = order[:top_k]
                probs = np.exp((row[kept] - row[kept].max()) / temperature)
                probs /= probs.sum()
                if top_p is not None:
                    count = int(np.searchsorted(np.cumsum(probs), top_p)) + 1
                    kept, probs = kept[:count], probs[:count] / probs[:count].sum()
                place = np.flatnonzero(kept == token)
                expected = math.log(probs[place[0]]) if len(place) else -math.inf
            assert got == pytest.approx(expected, abs=1e-5)


def test_drawn_texts_come_as_often_as_their_probability_says(model: Transformer) -> None:
    """p of the two-token continuation from the scores against the share among 4,000 drawn ones."""
    drawn = generate(model, None, [[3, 4]] * 4000, max_new_tokens=2, temperature=0.7, top_k=4, batch_size=500)
    texts = sorted({tuple(text) for text in drawn})
    found = token_scores(model, [[3, 4, *text] for text in texts], batch_size=64, temperature=0.7, top_k=4)
    chances = [math.exp(float(score.sampled_log_prob[-2:].sum())) for score in found]  # type: ignore[index]
    assert sum(chances) == pytest.approx(1.0, abs=0.01), "nearly all of the 16 possible texts were drawn"
    for text, chance in zip(texts, chances, strict=True):
        share = sum(tuple(other) == text for other in drawn) / 4000
        assert abs(share - chance) < 4 * math.sqrt(chance * (1 - chance) / 4000) + 1e-3


@pytest.mark.parametrize("name", ["plain", "goldfish"])
def test_a_suffix_comes_out_where_every_token_is_correct(runs: Runs, name: str) -> None:
    loaded = load_run(getattr(runs, name))
    texts = [probe.tokens.tolist() for probe in load_canaries(runs.corpus, 1.0)]
    found = token_scores(loaded.model, texts, batch_size=5)
    outputs = generate(loaded.model, None, [text[:24] for text in texts], max_new_tokens=len(texts[0]) - 24)
    recited = [output == text[24:] for output, text in zip(outputs, texts, strict=True)]
    assert recited == [bool(score.correct[23:].all()) for score in found]
    assert any(recited) == (name == "plain")


def test_no_texts(model: Transformer) -> None:
    assert token_scores(model, [], batch_size=2) == []


@pytest.mark.parametrize(
    ("texts", "message"),
    [([[1, 2], [1]], "text 1 has 1 tokens"), ([[1, 50]], "text 0 holds an id outside"), ([[-1, 5]], "text 0 holds")],
)
def test_wrong_texts(model: Transformer, texts: list[list[int]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        token_scores(model, texts, batch_size=2)


def test_a_certain_token_has_a_scale_all_the_same() -> None:
    """Min-K++ divides by the spread of log p, which is 0 where one token has all the probability."""
    shape: dict[str, Any] = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16}
    model = Transformer(ModelConfig.model_validate(shape), 10).eval()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.weight[4] = 1e6 * torch.sign(torch.randn(16))
        model.norm.weight.fill_(1e3)
    [found] = token_scores(model, [[1, 4, 4]], batch_size=1, moments=True)
    assert isinstance(found, TokenScores) and found.std is not None and found.mean is not None
    assert np.isfinite(found.mean).all() and (found.std >= 1e-6).all()
