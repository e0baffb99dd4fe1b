"""Beam search with a key/value cache: the continuations of highest probability that a beam of some width finds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch

from megafish.data.tokenizer import Tokenizer
from megafish.decode.generate import check_prompts
from megafish.decode.stepping import Stepper
from megafish.errors import InputError
from megafish.model.transformer import Transformer
from megafish.processes import ALONE, Processes, batched
from megafish.progress import track


class Beam(NamedTuple):
    """One continuation."""

    tokens: list[int]
    """Ids, without the one that ends the text."""
    log_probability: float
    """Of these tokens, and of the end where the text ended [nats]."""
    score: float
    """log_probability / length ** length_penalty, what the beams are sorted by."""


@torch.inference_mode()
def beam_search(
    model: Transformer,
    tokenizer: Tokenizer | None,
    prompts: Sequence[Sequence[int]],
    *,
    beams: int,
    max_new_tokens: int,
    length_penalty: float = 1.0,
    batch_size: int = 1,
    progress: bool = False,
    processes: Processes = ALONE,
) -> list[list[Beam]]:
    """The best `beams` continuations of each prompt, best first.

    The search keeps the `beams` likeliest texts that go on, and as many finished ones: those that reached the
    end-of-text token while among the likeliest, or max_new_tokens. The length of a text counts its end. It is the
    search of transformers' generate(num_beams=beams, early_stopping="never"), with the same results; it never stops
    early by a heuristic.

    batch_size: prompts searched at one time; each takes `beams` rows of the cache, so that 100 beams take the memory of
    100 prompts. tokenizer: None for no end-of-text token. processes: those that share the batches. Raises InputError
    for an empty prompt, an id outside the vocabulary and values out of range.
    """
    if beams < 1 or 2 * beams > model.vocab_size:
        raise InputError(f"beams={beams}: must be at least 1 and at most half the vocabulary ({model.vocab_size})")
    if max_new_tokens < 1 or batch_size < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} and batch_size={batch_size} must be at least 1")
    check_prompts(prompts, model.vocab_size)
    eos = None if tokenizer is None else tokenizer.eos_id
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # rows of like length: little padding
    results: list[list[Beam]] = [[] for _ in prompts]
    stepper = Stepper(model)
    own = processes.own(batched(order, batch_size))
    with track(sum(map(len, own)), f"search with {beams} beams", "prompt", enabled=progress) as bar:
        for rows in own:
            found = _search(stepper, [prompts[i] for i in rows], beams, max_new_tokens, length_penalty, eos)
            for i, texts in zip(rows, found, strict=True):
                results[i] = texts
            bar.advance(len(rows))
    processes.complete(results, chain(*own))
    return results


class _Finished:
    """The best finished texts of each prompt."""

    def __init__(self, prompts: int, beams: int, length: int, device: torch.device) -> None:
        self.scores = torch.full((prompts, beams), -torch.inf, device=device)
        self.log_probs = torch.full_like(self.scores, -torch.inf)
        self.tokens = torch.full((prompts, beams, length), -1, dtype=torch.int64, device=device)

    def add(self, scores: torch.Tensor, log_probs: torch.Tensor, tokens: torch.Tensor) -> None:
        """Texts that may have finished: scores [P, n], -inf where not; log_probs [P, n]; tokens [P, n, t]."""
        width = self.scores.shape[1]
        tokens = torch.nn.functional.pad(tokens, (0, self.tokens.shape[2] - tokens.shape[2]), value=-1)
        self.scores, best = torch.cat((self.scores, scores), 1).topk(width)
        self.log_probs = torch.cat((self.log_probs, log_probs), 1).gather(1, best)
        self.tokens = torch.cat((self.tokens, tokens), 1).gather(1, best[..., None].expand(-1, -1, tokens.shape[2]))

    def beams(self, eos: int | None) -> list[list[Beam]]:
        """As lists; places that no text has taken are left out."""
        return [
            [
                Beam([token for token in tokens if token not in (-1, eos)], log_prob, score)
                for tokens, log_prob, score in zip(*columns, strict=True)
                if score > -torch.inf
            ]
            for columns in zip(self.tokens.tolist(), self.log_probs.tolist(), self.scores.tolist(), strict=True)
        ]


def _search(
    stepper: Stepper,
    prompts: Sequence[Sequence[int]],
    beams: int,
    max_new_tokens: int,
    length_penalty: float,
    eos: int | None,
) -> list[list[Beam]]:
    device, count, vocab = stepper.device, len(prompts), stepper.model.vocab_size
    logits = stepper.begin(prompts, max_new_tokens)
    # One text a prompt at first, `beams` from the first step on.
    texts = torch.zeros(count, 1, 0, dtype=torch.int64, device=device)
    running = torch.zeros(count, 1, device=device)
    finished = _Finished(count, beams, max_new_tokens, device)
    for step in range(max_new_tokens):
        log_probs = torch.log_softmax(logits[:, 0, :vocab], dim=-1).view(count, -1, vocab) + running[..., None]
        # Twice as many, so that `beams` are left to go on if all others end.
        values, places = log_probs.flatten(1).topk(2 * beams)
        parents, chosen = places // vocab, places % vocab
        longer = texts.gather(1, parents[..., None].expand(-1, -1, texts.shape[2]))
        longer = torch.cat((longer, chosen[..., None]), dim=2)
        last = step + 1 == max_new_tokens
        ends = torch.full_like(chosen, last, dtype=torch.bool) if eos is None else (chosen == eos) | last
        ended = ends[:, :beams]
        scores = (values / (step + 1) ** length_penalty)[:, :beams].masked_fill(~ended, -torch.inf)
        finished.add(scores, values[:, :beams], longer[:, :beams])
        if last:
            break
        running, kept = values.masked_fill(ends, -torch.inf).topk(beams)
        texts = longer.gather(1, kept[..., None].expand(-1, -1, longer.shape[2]))
        rows = parents.gather(1, kept) + (torch.arange(count, device=device) * (log_probs.shape[1]))[:, None]
        stepper.select(rows.flatten())
        logits = stepper.step(texts[..., -1].flatten())
    return finished.beams(eos)
