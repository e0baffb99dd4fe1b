"""No n-gram of the filter is ever completed, and nothing else changes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megafish.config import ModelConfig
from megafish.data.corpus import Corpus
from megafish.decode import memfree as module
from megafish.decode.build_filter import build_filter
from megafish.decode.generate import Sampler, generate
from megafish.decode.memfree import Context, MemFree, draw_allowed, first_allowed, logits_processor
from megafish.decode.ngram_filter import NgramFilter
from megafish.huggingface.export import export
from megafish.model.load import load_run
from megafish.model.transformer import Transformer
from tests.huggingface.helpers import random_run

VOCAB, N = 12, 3
PROMPTS = [[1, 2, 3], [5], [7, 8], [4] * 20, [11, 0, 11]]


class Pairs:
    """A filter of given n-grams, without false positives. beginnings=False: any text may be the beginning of one."""

    def __init__(self, ngrams: set[tuple[int, ...]], n: int = N, beginnings: bool = True) -> None:
        self.ngrams, self.n, self.beginnings = ngrams, n, beginnings

    def begins(self, context: np.ndarray) -> np.ndarray:
        known = {ngram[:-1] for ngram in self.ngrams}
        return np.array([not self.beginnings or tuple(before) in known for before in context.tolist()], dtype=bool)

    def contains_next(self, context: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        return np.array(
            [
                [(*before, candidate) in self.ngrams for candidate in row]
                for before, row in zip(context.tolist(), candidates.tolist(), strict=True)
            ]
        ).reshape(candidates.shape)


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = ModelConfig(num_layers=1, hidden_size=32, num_heads=2, intermediate_size=48, init_std=0.4)
    return Transformer(config, VOCAB, seed=1)


NGRAMS = st.sets(st.tuples(*[st.integers(0, VOCAB - 1)] * N), max_size=1200)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ngrams=NGRAMS,
    options=st.sampled_from(
        [{}, {"temperature": 1.0}, {"temperature": 1.5, "top_k": 3}, {"temperature": 0.8, "top_p": 0.7}]
    ),
    batch_size=st.sampled_from([1, 2, 5]),
)
def test_no_ngram_of_the_filter_is_completed(
    model: Transformer, ngrams: set[tuple[int, ...]], options: dict[str, Any], batch_size: int
) -> None:
    free, slow = (MemFree(Pairs(ngrams, beginnings=known)) for known in (True, False))  # type: ignore[arg-type]
    shared: dict[str, Any] = {"max_new_tokens": 12, "batch_size": batch_size, **options}
    outputs = generate(model, None, PROMPTS, memfree=free, **shared)
    assert outputs == generate(model, None, PROMPTS, memfree=slow, **shared), "beginnings only save lookups"
    assert (free.tokens, free.rejected) == (slow.tokens, slow.rejected)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        text = prompt + output
        ends = range(max(len(prompt), N - 1), len(text))
        assert not {tuple(text[end - N + 1 : end + 1]) for end in ends} & ngrams
        if len(output) < 12:
            # It ended because nothing was allowed to follow.
            assert all((*text[-N + 1 :], token) in ngrams for token in range(VOCAB))
    assert free.tokens == sum(map(len, outputs)) + sum(len(output) < 12 for output in outputs)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}])
def test_a_row_after_which_nothing_may_follow(model: Transformer, options: dict[str, Any]) -> None:
    """It ends, and its neighbours go on in the same batch."""
    free = MemFree(Pairs({(1, token) for token in range(VOCAB)}, n=2))  # type: ignore[arg-type]
    outputs = generate(model, None, [[1], [2], [3]], max_new_tokens=9, memfree=free, **options)
    assert outputs[0] == [] and outputs[1]
    for output in outputs[1:]:
        # They end before 9 tokens only behind that token.
        assert len(output) == 9 or output[-1] == 1
        assert 1 not in output[:-1]


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.3, "top_k": 5, "seed": 4}, {"temperature": 1.0, "top_p": 0.8}]
)
def test_an_empty_filter_changes_nothing(model: Transformer, options: dict[str, Any]) -> None:
    free = MemFree(Pairs(set()))  # type: ignore[arg-type]
    with_filter = generate(model, None, PROMPTS, max_new_tokens=12, memfree=free, **options)
    assert with_filter == generate(model, None, PROMPTS, max_new_tokens=12, **options)
    assert free.rejected == 0


def test_greedy_takes_the_likeliest_allowed_token(model: Transformer) -> None:
    [plain] = generate(model, None, [[1, 2, 3]], max_new_tokens=1)
    free = MemFree(Pairs({(2, 3, plain[0])}))  # type: ignore[arg-type]
    [other] = generate(model, None, [[1, 2, 3]], max_new_tokens=1, memfree=free)
    with torch.no_grad():
        order = model(torch.tensor([[1, 2, 3]]))[0, -1, :VOCAB].argsort(descending=True).tolist()
    assert plain == order[:1] and other == order[1:2] and free.rejected == 1


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (4, None), (None, 0.6), (5, 0.6)])
def test_draws_are_from_what_is_allowed(top_k: int | None, top_p: float | None) -> None:
    """As if the blocked tokens' logits had been -inf from the start."""
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(2)) * 3
    banned = torch.rand(6, 300, generator=torch.Generator().manual_seed(3)) < 0.4
    uniform = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    sampler = Sampler(1.2, top_k, top_p)
    chosen = sampler.choose(logits, uniform, lambda ids: banned.gather(1, ids))
    assert chosen.tolist() == sampler.choose(logits.masked_fill(banned, -torch.inf), uniform).tolist()


def test_candidates_in_order_of_their_logits_and_ids() -> None:
    """With ties, and where nearly all is blocked."""
    logits = torch.randint(0, 4, (5, 400), generator=torch.Generator().manual_seed(0)).float()
    for share in (0.0, 0.5, 0.99, 1.0):
        banned = torch.rand(5, 400, generator=torch.Generator().manual_seed(1)) < share
        values, ids = first_allowed(logits, 7, lambda found, banned=banned: banned.gather(1, found))  # type: ignore[misc]
        for row in range(5):
            free = [i for i in range(400) if not banned[row, i]]
            expected = sorted(free, key=lambda i: (-float(logits[row, i]), i))[:7]
            assert ids[row].tolist() == expected + [-1] * (7 - len(expected))
            assert values[row, : len(expected)].tolist() == [float(logits[row, i]) for i in expected]


@pytest.mark.parametrize("prefix", [1, 5, 64, 300])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.6, 0.95, 1.0])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.98, 1.0])
def test_a_draw_is_that_of_the_whole_vocabulary(
    share: float, top_p: float | None, prefix: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few candidates are looked up; with uniform numbers at both ends."""
    monkeypatch.setattr(module, "_PREFIX", prefix)
    random = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(40, 300, generator=random)
    banned = torch.rand(40, 300, generator=random) < share
    uniform = torch.rand(40, dtype=torch.float64, generator=random)
    uniform[:2] = torch.tensor([0.0, 1 - 1e-9], dtype=torch.float64)
    width = []

    def blocked(candidates: torch.Tensor) -> torch.Tensor:
        width.append(candidates.shape[1])
        return banned.gather(1, candidates)

    found = draw_allowed(logits, 0.9, top_p, uniform, blocked)
    whole = Sampler(0.9, None, top_p).choose(logits.masked_fill(banned, -torch.inf), uniform)
    none = banned.all(1)
    assert found.tolist() == torch.where(none, -1, whole).tolist()
    final = draw_allowed(logits, 0.9, top_p, torch.full((40,), 1 - 2**-53, dtype=torch.float64), blocked)
    chosen = banned.gather(1, final.clamp(min=0)[:, None])[:, 0]
    assert not (chosen & ~none).any(), "a product rounded up to the whole is no blocked token"
    width.clear()
    draw_allowed(logits, 0.9, top_p, uniform, blocked)
    if top_p == 0.05 and share < 0.9 and prefix == 64:
        assert sum(width) < 300, "the likeliest ones suffice"


def test_the_context_of_a_row() -> None:
    """Prompts shorter than n - 1 tokens block nothing until they are long enough."""
    context = Context(Pairs({(1, 2, 5), (7, 5, 5), (0, 7, 5)}), [[9, 1, 2], [7]])  # type: ignore[arg-type]
    candidates = torch.tensor([[5, 2]])
    assert context.open().tolist() == [0]
    assert context.blocked(candidates, torch.tensor([0])).tolist() == [[True, False]]
    context.append(torch.tensor([8, 5]))
    assert context.open().tolist() == [1]
    assert context.blocked(candidates.repeat(2, 1), torch.tensor([1, 0])).tolist() == [[True, False], [False, False]]
    context.select([1])
    assert context.open().tolist() == [0]
    assert context.blocked(candidates, torch.tensor([0])).tolist() == [[True, False]]


def test_a_real_filter_in_transformers_and_here(corpus: Path, tmp_path: Path) -> None:
    """A model that would write the same token for ever, and a corpus in which that is no news."""
    transformers = pytest.importorskip("transformers")
    run = random_run(tmp_path / "run", {}, train=str(corpus))
    export(run.path, tmp_path / "hf", progress=False)
    loaded = load_run(run.path, device="cpu")
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    build_filter([corpus], tmp_path / "f", n=2, false_positive_rate=0.3, progress=False)
    found = NgramFilter.open(tmp_path / "f")
    free = MemFree(found)
    prompts = [[5, 9, 100], [300, 301, 302]]
    ours = generate(loaded.model, None, prompts, max_new_tokens=15, memfree=free)
    assert free.rejected > 0
    data = Corpus(corpus).data
    known = {pair for i in range(len(data)) for pair in pairwise(data.document(i)[:-1].tolist())}
    ids = torch.tensor(prompts)
    for sampled in (False, True):
        torch.manual_seed(0)
        theirs = hf.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=sampled, max_new_tokens=15, eos_token_id=None,
            pad_token_id=0, logits_processor=[logits_processor(found)],
        )  # fmt: skip
        pairs = theirs[:, 2:].unfold(1, 2, 1).reshape(-1, 2).numpy()
        assert not (found.contains(pairs) & found.begins(pairs[:, :1])).any()
        assert not {tuple(pair) for pair in pairs.tolist()} & known
        if not sampled:
            assert theirs[:, 3:].tolist() == ours
