"""Passages scored and continued greedily, with one key/value cache for both.

A forward pass over a passage scores its suffix, given the true text, and fills a cache. It also tells the beginning of
the greedy continuation: the true suffix as long as the most probable token is the right one, then the most probable one
instead. Generation starts behind it, from that cache: a passage that is recited takes none, one that is left after d
tokens d + 1 fewer, and no prompt is read twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch

from megafish.audit.scores import TokenScores, check_texts, score_hidden
from megafish.data.tokenizer import Tokenizer
from megafish.decode.generate import Ending, Sampler, generate_batch
from megafish.decode.stepping import Stepper
from megafish.errors import InputError
from megafish.model.transformer import KVCache, Transformer
from megafish.processes import ALONE, Processes, batched
from megafish.progress import Track, track


@torch.inference_mode()
def score_and_continue(
    model: Transformer,
    tokenizer: Tokenizer | None,
    prompts: Sequence[Sequence[int]],
    suffixes: Sequence[Sequence[int]],
    *,
    batch_size: int,
    sampler: Sampler | None = None,
    progress: bool = False,
    processes: Processes = ALONE,
) -> tuple[list[TokenScores], list[list[int]]]:
    """The scores of the tokens of each suffix, given the true text before them, and what `generate` writes at
    temperature 0 behind each prompt, at most as many tokens as the suffix has.

    tokenizer: None for no end-of-text token. sampler: the scores say what it would draw too (sampled_log_prob).
    processes: those that share the batches. Scores and texts are those of `token_scores` and `generate` up to rounding
    in the matrix products. Raises InputError for an empty prompt or suffix and for ids outside the vocabulary.
    """
    for i, (prompt, suffix) in enumerate(zip(prompts, suffixes, strict=True)):
        if not prompt or not suffix:
            raise InputError(
                f"passage {i}: an empty {'suffix' if prompt else 'prompt'}: give at least one token of each"
            )
    check_texts([[*prompt, *suffix] for prompt, suffix in zip(prompts, suffixes, strict=True)], model.vocab_size)
    work = _Work(model, tokenizer, prompts, suffixes, sampler)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(suffixes[i]))
    own = processes.own(batched(order, batch_size))
    with track(sum(map(len, own)), "score and continue", "passage", enabled=progress) as bar:
        waiting: list[tuple[list[int], KVCache]] = []
        for numbers in own:
            left = work.read(numbers)
            going = [] if left is None else left[0]
            bar.advance(len(numbers) - len(going))
            # Of passages that are recited few are left: they wait until there are enough for a batch.
            if sum(len(rows) for rows, _ in waiting) + len(going) > batch_size:
                work.go_on(waiting, bar)
            if left is not None:
                waiting.append(left)
        work.go_on(waiting, bar)
    done = list(chain(*own))
    processes.complete(work.scores, done)
    processes.complete(work.outputs, done)
    return [scores for scores in work.scores if scores is not None], work.outputs


class _Work:
    """Passages, and what is known of them so far."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None,
        prompts: Sequence[Sequence[int]],
        suffixes: Sequence[Sequence[int]],
        sampler: Sampler | None,
    ) -> None:
        self.model, self.prompts, self.suffixes, self.sampler = model, prompts, suffixes, sampler
        self.ending = Ending(tokenizer, ())
        self.eos = None if tokenizer is None else tokenizer.eos_id
        self.stepper = Stepper(model)
        self.scores: list[TokenScores | None] = [None] * len(prompts)
        self.outputs: list[list[int]] = [[] for _ in prompts]

    def read(self, numbers: list[int]) -> tuple[list[int], KVCache] | None:
        """Score some passages, in one forward pass. Returns those whose continuation goes on behind what that tells,
        and a cache that holds, for each of them, all but the last token known; None where there are none."""
        device = self.stepper.device
        texts = [[*self.prompts[i], *self.suffixes[i]] for i in numbers]
        width = max(map(len, texts)) - 1
        inputs = torch.tensor([text[:-1] + [0] * (width + 1 - len(text)) for text in texts], device=device)
        # What predicts the first token of a suffix is the last of the prompt.
        spans = [(row * width + len(self.prompts[i]) - 1, len(self.suffixes[i])) for row, i in enumerate(numbers)]
        places = torch.cat([torch.arange(start, start + length) for start, length in spans])
        targets = torch.tensor([token for i in numbers for token in self.suffixes[i]], device=device)
        cache = KVCache(self.model.config, len(numbers), width, device=device, dtype=self.stepper.dtype)
        hidden = self.model.hidden_rows(inputs, places.to(device), cache=cache)
        lengths = [length for _, length in spans]
        found = score_hidden(self.model, hidden, targets, lengths, sampler=self.sampler)
        left: list[int] = []
        for row, (i, scores) in enumerate(zip(numbers, found, strict=True)):
            self.scores[i] = scores
            ended = self._write_known(i, scores)
            if not ended and len(self.outputs[i]) < len(self.suffixes[i]):
                left.append(row)
        if not left:
            return None
        if len(left) < len(numbers):
            cache.select(torch.tensor(left, device=device))
        going = [numbers[row] for row in left]
        cache.rewind(torch.tensor([len(self.prompts[i]) + len(self.outputs[i]) - 1 for i in going], device=device))
        return going, cache

    def _write_known(self, number: int, scores: TokenScores) -> bool:
        """The tokens of the continuation up to and with the first wrong one; whether it ends there, before an
        end-of-text token."""
        for true, likeliest in zip(self.suffixes[number], scores.likeliest.tolist(), strict=True):
            if likeliest == self.eos:
                return True
            self.outputs[number].append(likeliest)
            if likeliest != true:
                break
        return False

    def go_on(self, waiting: list[tuple[list[int], KVCache]], bar: Track) -> None:
        """Generate the rest of the passages that wait, of which none does then."""
        if not waiting:
            return
        numbers = list(chain.from_iterable(rows for rows, _ in waiting))
        left = {i: len(self.suffixes[i]) - len(self.outputs[i]) for i in numbers}
        self.stepper.adopt([cache for _, cache in waiting], max(left.values()))
        waiting.clear()  # they have been copied
        last = torch.tensor([self.outputs[i][-1] for i in numbers], device=self.stepper.device)
        logits = self.stepper.step(last)
        greedy = Sampler(0.0, None, None)
        generate_batch(self.stepper, logits, self.prompts, numbers, left, greedy, self.ending, 0, self.outputs, bar)
