"""Beam search against transformers' on an exported model, and against brute force."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from megafish.config import ModelConfig
from megafish.decode.beam import beam_search
from megafish.decode.generate import generate
from megafish.errors import InputError
from megafish.huggingface.export import export
from megafish.model.load import load_run
from megafish.model.transformer import Transformer
from tests.huggingface.helpers import random_run

PROMPTS = [[5, 9, 100], [7], [30, 31, 32, 33, 34, 35], [290, 4]]


class Eos:
    """The part of a tokenizer that a search needs."""

    def __init__(self, eos_id: int) -> None:
        self.eos_id = eos_id


def tiny(vocab: int = 8, seed: int = 0) -> Transformer:
    config = ModelConfig.model_validate(
        {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "init_std": 0.5}
    )
    return Transformer(config, vocab, seed=seed)


@pytest.fixture(scope="module")
def pair(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("beam")
    run = random_run(folder / "run", {}, train=str(corpus))
    export(run.path, folder / "hf", progress=False)
    return load_run(run.path), transformers.AutoModelForCausalLM.from_pretrained(folder / "hf").eval()


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("beams", [1, 4, 30])
def test_equals_transformers(pair: tuple[Any, Any], beams: int, length_penalty: float) -> None:
    loaded, hf = pair
    eos = loaded.tokenizer.eos_id
    found = beam_search(
        loaded.model, loaded.tokenizer, PROMPTS, beams=beams, max_new_tokens=7, length_penalty=length_penalty,
        batch_size=3,
    )  # fmt: skip
    for prompt, texts in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt])
        theirs = hf.generate(
            ids, attention_mask=torch.ones_like(ids), num_beams=beams, num_return_sequences=beams, do_sample=False,
            max_new_tokens=7, length_penalty=length_penalty, early_stopping="never", eos_token_id=eos, pad_token_id=eos,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        own = [beam.tokens for beam in texts]
        expected = [[token for token in row if token != eos] for row in theirs.sequences[:, len(prompt) :].tolist()]
        assert own[0] == expected[0]
        if beams > 1:
            # Texts of nearly equal probability may change places by rounding.
            assert sum(text in expected for text in own) >= len(own) - 1
            assert [b.score for b in texts] == pytest.approx(theirs.sequences_scores.tolist(), abs=1e-4)


def test_a_beam_as_wide_as_the_tree_finds_the_best_texts() -> None:
    model = tiny(vocab=80)
    with torch.inference_mode():
        [found] = beam_search(model, None, [[1, 2]], beams=40, max_new_tokens=2, length_penalty=0.0)
        scores = {}
        first = model(torch.tensor([[1, 2]]))[0, -1, :80].log_softmax(-1)
        for a in first.topk(40).indices.tolist():
            second = model(torch.tensor([[1, 2, a]]))[0, -1, :80].log_softmax(-1)
            scores |= {(a, b): float(first[a] + second[b]) for b in range(80)}
    best = sorted(scores, key=lambda pair: -scores[pair])[:40]
    assert [tuple(beam.tokens) for beam in found] == best
    assert [beam.log_probability for beam in found] == pytest.approx([scores[pair] for pair in best], abs=1e-5)


def test_one_beam_is_greedy(pair: tuple[Any, Any]) -> None:
    loaded, _ = pair
    found = beam_search(loaded.model, None, PROMPTS, beams=1, max_new_tokens=9, batch_size=2)
    greedy = generate(loaded.model, None, PROMPTS, max_new_tokens=9)
    assert [texts[0].tokens for texts in found] == greedy


def test_finished_texts_stay(pair: tuple[Any, Any]) -> None:
    """Where the end is the likeliest token, the best text is empty, and its probability that of the end."""
    model = tiny(vocab=20)
    with torch.inference_mode():
        log_probs = model(torch.tensor([[3]]))[0, -1, :20].log_softmax(-1)
    end = int(log_probs.argmax())
    [found] = beam_search(model, Eos(end), [[3]], beams=2, max_new_tokens=4, length_penalty=0.0)  # type: ignore[arg-type]
    assert found[0].tokens == [] and found[0].log_probability == pytest.approx(float(log_probs[end]), abs=1e-5)
    assert all(end not in beam.tokens for beam in found)
    for a, b in itertools.pairwise(found):
        assert a.score >= b.score


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[]], {}, "prompt 0 is empty"),
        ([[9]], {}, "prompt 0 holds id 9"),
        ([[1]], {"beams": 0}, "beams=0"),
        ([[1]], {"beams": 5}, r"at most half the vocabulary \(8\)"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_wrong_input(prompts: list[list[int]], options: dict[str, int], message: str) -> None:
    values: dict[str, Any] = {"beams": 2, "max_new_tokens": 3, **options}
    with pytest.raises(InputError, match=message):
        beam_search(tiny(), None, prompts, **values)


def test_no_prompts() -> None:
    assert beam_search(tiny(), None, [], beams=2, max_new_tokens=3) == []
