"""Decoding against the model's own logits; batches never change a result."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from megafish.config import ModelConfig
from megafish.data.tokenizer import Tokenizer, load_tokenizer
from megafish.decode.generate import Ending, Sampler, generate, generate_text
from megafish.errors import InputError
from megafish.model.transformer import Transformer

PROMPTS = [[1, 2, 3], [5] * 9, [7, 8], [4] * 20, [11]]


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = ModelConfig(num_layers=2, hidden_size=48, num_heads=4, num_kv_heads=2, intermediate_size=80, init_std=0.3)
    return Transformer(config, 90, seed=1)


def test_greedy_takes_the_most_probable_token(model: Transformer) -> None:
    for prompt, output in zip(PROMPTS, generate(model, None, PROMPTS, max_new_tokens=10), strict=True):
        whole = torch.tensor([prompt + output])
        with torch.no_grad():
            best = model(whole)[0, len(prompt) - 1 : -1, :90].argmax(-1)
        assert output == best.tolist()


@pytest.mark.parametrize("options", [{}, {"temperature": 1.3, "top_k": 30, "top_p": 0.95, "seed": 4}])
def test_result_does_not_depend_on_the_batch(model: Transformer, options: dict) -> None:
    together = generate(model, None, PROMPTS, max_new_tokens=12, **options)
    assert together == generate(model, None, PROMPTS, max_new_tokens=12, batch_size=1, **options)
    assert together == generate(model, None, PROMPTS, max_new_tokens=12, batch_size=2, **options)
    assert len({tuple(output) for output in together}) > 1


def test_a_limit_of_its_own_for_every_prompt(model: Transformer) -> None:
    """The longest prompt is over first, and stays in the batch."""
    prompts, limits = [[1] * 20, [2, 3], [4] * 7], [1, 15, 9]
    whole = generate(model, None, prompts, max_new_tokens=15, temperature=0.8, seed=5)
    found = generate(model, None, prompts, max_new_tokens=limits, temperature=0.8, seed=5)
    assert found == [text[:limit] for text, limit in zip(whole, limits, strict=True)]


def test_seed_decides_the_draw(model: Transformer) -> None:
    first, again, other = (
        generate(model, None, PROMPTS, max_new_tokens=12, temperature=1.5, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_training_goes_on_after_decoding() -> None:
    """What decoding leaves behind in the model must serve a backward pass."""
    config = ModelConfig(num_layers=1, hidden_size=32, num_heads=2, intermediate_size=48)
    model = Transformer(config, 90)
    generate(model, None, PROMPTS, max_new_tokens=2)
    tokens = torch.tensor([PROMPTS[3]])
    model(tokens, targets=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_stop_id_ends_one_row_and_leaves_the_others(model: Transformer) -> None:
    free = generate(model, None, PROMPTS, max_new_tokens=10)
    stop = free[0][4]
    stopped = generate(model, None, PROMPTS, max_new_tokens=10, stop=[stop])
    for output, whole in zip(stopped, free, strict=True):
        assert output == (whole[: whole.index(stop)] if stop in whole else whole)


def test_draws_follow_the_distribution() -> None:
    """Inversion of the cumulative distribution: the share of uniform numbers that give a token is its probability."""
    logits = torch.tensor([[0.1, 2.0, -1.0, 1.2, 0.3]]).repeat(40000, 1)
    uniform = (torch.arange(40000, dtype=torch.float64) + 0.5) / 40000
    temperature = 0.7
    for top_k, top_p in ((None, None), (3, None), (None, 0.8), (4, 0.9)):
        p = (logits[0].double() / temperature).softmax(0)
        order = p.argsort(descending=True)
        keep = order[:top_k]
        if top_p is not None:
            q = p[keep] / p[keep].sum()
            keep = keep[: int((q.cumsum(0) < top_p).sum()) + 1]
        want = torch.zeros(5, dtype=torch.float64)
        want[keep] = p[keep] / p[keep].sum()
        chosen = Sampler(temperature, top_k, top_p).choose(logits, uniform)
        share = torch.bincount(chosen, minlength=5).double() / 40000
        torch.testing.assert_close(share, want, rtol=0, atol=1e-4)


def test_a_uniform_number_next_to_one_stays_inside() -> None:
    logits = torch.full((1, 90), 0.0)
    uniform = torch.tensor([np.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert 0 <= int(Sampler(1.0, None, None).choose(logits, uniform)) < 90


def test_padding_of_the_vocabulary_is_never_chosen(model: Transformer) -> None:
    outputs = generate(model, None, [[i] for i in range(40)], max_new_tokens=20, temperature=50.0)
    assert max(max(output) for output in outputs) < 90


def test_text_and_stop_strings(corpus: Path) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer.model")
    config = ModelConfig(num_layers=1, hidden_size=32, num_heads=2, intermediate_size=48, init_std=0.5)
    model = Transformer(config, tokenizer.vocab_size, seed=2)
    prompts = ["def main(", "import json\n"]
    options = {"max_new_tokens": 30, "temperature": 1.0, "seed": 5}
    free = generate_text(model, tokenizer, prompts, **options)
    ids = generate(model, tokenizer, [list(tokenizer.encode(p)) for p in prompts], **options)
    for prompt, text, output in zip(prompts, free, ids, strict=True):
        assert prompt + text == tokenizer.decode([*tokenizer.encode(prompt), *output])
    stop = free[0][5:7]
    stopped = generate_text(model, tokenizer, prompts, stop=[stop], **options)
    for text, whole in zip(stopped, free, strict=True):
        place = whole.find(stop)
        assert stop not in text
        assert whole.startswith(text)
        if place >= 0:
            assert len(text) <= place


def test_a_stop_string_may_be_the_space_before_the_first_word() -> None:
    """With a tokenizer that takes the first space of a text for its own, as Llama's does."""
    words = ["</s>", "\u2581the", "\u2581cat", "s"]

    class Words:
        eos_id, vocab_size = 0, 4

        def decode(self, ids: Iterable[int]) -> str:
            return "".join(words[i] for i in ids if i).replace("\u2581", " ").removeprefix(" ")

    tokenizer = cast(Tokenizer, Words())
    assert Ending(tokenizer, [" cat"]).cut([1], [2]) == 0
    assert Ending(tokenizer, ["cat"]).cut([1, 2], [1]) is None  # what the prompt says ends nothing
    assert Ending(tokenizer, ["cats"]).cut([1, 2], [3]) is None
    assert Ending(tokenizer, ["cat"]).cut([1], [1, 1, 2]) == 2


def test_end_of_text_is_not_part_of_the_result(corpus: Path) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer.model")
    config = ModelConfig(num_layers=1, hidden_size=32, num_heads=2, intermediate_size=48)
    model = Transformer(config, tokenizer.vocab_size)
    with torch.no_grad():
        model.norm.weight.fill_(0.0)
        model.norm.weight[0] = 1.0
        model.head.weight.zero_()
    assert generate(model, None, [[5]], max_new_tokens=3) == [[0, 0, 0]]
    stopped = generate(model, tokenizer, [[5]], max_new_tokens=3, stop=[0])
    assert stopped == [[]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"stop": ["x"]}, "need a tokenizer"),
        ({"seed": -1, "temperature": 1.0}, "seed=-1"),
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[90]]}, "holds id 90, the vocabulary has 0 to 89"),
    ],
)
def test_wrong_values_are_refused(model: Transformer, changes: dict, message: str) -> None:
    options = {"max_new_tokens": 4, **changes}
    prompts = options.pop("prompts", [[1]])
    with pytest.raises(InputError, match=message):
        generate(model, None, prompts, **options)
