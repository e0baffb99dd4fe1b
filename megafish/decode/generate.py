"""Continue prompts: greedy or sampled, in batches, with a key/value cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain

import numpy as np
import torch

from megafish.data.tokenizer import Tokenizer
from megafish.decode.memfree import Blocked, Context, MemFree, draw_allowed, first_allowed, likeliest
from megafish.decode.stepping import Stepper
from megafish.errors import InputError
from megafish.model.transformer import Transformer
from megafish.processes import ALONE, Processes, batched
from megafish.progress import Track, track


@torch.inference_mode()
def generate(
    model: Transformer,
    tokenizer: Tokenizer | None,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Sequence[str | int] | None = None,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = False,
    memfree: MemFree | None = None,
    processes: Processes = ALONE,
) -> list[list[int]]:
    """The new tokens of each prompt, in the order of the prompts.

    temperature 0 takes the most probable token; above, tokens are drawn from softmax(logits / temperature), limited
    to the top_k most probable ones and to the smallest set whose probability reaches top_p (Holtzman et al. 2020). A
    continuation ends before the tokenizer's end-of-text token, before a stop id, before the first occurrence of a
    stop string, or after max_new_tokens (one number, or one a prompt). What prompt i yields depends on (seed, i) and
    not on the batch it is in, up to rounding in the matrix products.

    tokenizer: None for no end-of-text token (stop strings need one). progress: show a bar on a terminal. memfree: a
    filter of n-grams, none of which is completed: their tokens count as impossible, before top_k and top_p. A
    continuation also ends where no token is left. processes: those that share the batches, all of which have all
    results (memfree counts those of its own).
    Raises InputError for an empty prompt, an id outside the vocabulary and values out of range.
    """
    sampler = Sampler(temperature, top_k, top_p)
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if min(limits, default=1) < 1 or batch_size < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} and batch_size={batch_size} must be at least 1")
    if len(limits) != len(prompts):
        raise InputError(f"max_new_tokens: {len(limits)} numbers for {len(prompts)} prompts")
    if seed < 0:
        raise InputError(f"seed={seed}: must be 0 or above")
    check_prompts(prompts, model.vocab_size)
    ending = Ending(tokenizer, stop or ())
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # rows of like length: little padding
    results: list[list[int]] = [[] for _ in prompts]
    stepper = Stepper(model)
    own = processes.own(batched(order, batch_size))
    with track(sum(map(len, own)), "generate", "prompt", enabled=progress) as bar:
        for rows in own:
            logits = stepper.begin([prompts[i] for i in rows], max(limits[i] for i in rows))
            generate_batch(stepper, logits, prompts, rows, limits, sampler, ending, seed, results, bar, memfree)
    processes.complete(results, chain(*own))
    return results


def generate_text(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Sequence[str | int] | None = None,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = False,
    memfree: MemFree | None = None,
) -> list[str]:
    """`generate` from text to text: what follows each prompt, without the prompt."""
    ids = [list(tokenizer.encode(prompt)) for prompt in prompts]
    outputs = generate(
        model,
        tokenizer,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop=stop,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
        memfree=memfree,
    )
    # Decoded together: a continuation on its own would lose the space before its first word with some tokenizers.
    starts = [len(tokenizer.decode(prompt)) for prompt in ids]
    return [
        tokenizer.decode(prompt + output)[start:] for prompt, output, start in zip(ids, outputs, starts, strict=True)
    ]


class Sampler:
    """Chooses the next tokens from logits."""

    def __init__(self, temperature: float, top_k: int | None, top_p: float | None) -> None:
        if not temperature >= 0:
            raise InputError(f"temperature={temperature}: must be 0 (the most probable token) or above")
        if top_k is not None and top_k < 1:
            raise InputError(f"top_k={top_k}: must be at least 1")
        if top_p is not None and not 0 < top_p <= 1:
            raise InputError(f"top_p={top_p}: must be above 0 and at most 1")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p

    def choose(self, logits: torch.Tensor, uniform: torch.Tensor, blocked: Blocked | None = None) -> torch.Tensor:
        """logits fp32 [b, V], uniform float64 [b] in [0, 1) -> ids int64 [b], by inversion of the cumulative
        distribution. blocked (above temperature 0): which candidates are impossible; -1 where all are."""
        if self.temperature == 0.0:
            assert blocked is None
            return logits.argmax(-1)
        if blocked is None:
            return self._draw(*self._allowed(logits), uniform)
        if self.top_k is None:
            return draw_allowed(logits, self.temperature, self.top_p, uniform, blocked)
        # Blocked tokens are put last: what follows never reaches them.
        values, places = first_allowed(logits, self.top_k, blocked)
        ids, cumulative, last = self._allowed(values)
        chosen = self._draw(ids, cumulative, last, uniform)
        return places.gather(1, chosen[:, None]).squeeze(1)

    @staticmethod
    def _draw(ids: torch.Tensor, cumulative: torch.Tensor, last: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        mass = cumulative.gather(1, last)
        place = torch.searchsorted(cumulative, uniform[:, None] * mass, right=True).minimum(last)
        return ids.gather(1, place).squeeze(1)

    def log_probability(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Of drawing these tokens: logits fp32 [b, V], targets int64 [b] -> float64 [b] [nats], -inf where cut off."""
        if self.temperature == 0.0:
            return torch.where(logits.argmax(-1) == targets, 0.0, -torch.inf).double()
        ids, _, last = self._allowed(logits)
        place = torch.arange(ids.shape[1], device=ids.device)
        at = (ids == targets[:, None]) & (place <= last)
        # Of the sorted logits rather than as a difference of the cumulative sums, which cancels.
        scaled = logits.double() / self.temperature
        kept = torch.where(place <= last, scaled.gather(1, ids), -torch.inf)
        found = scaled.gather(1, targets[:, None]).squeeze(1) - kept.logsumexp(-1)
        return torch.where(at.any(-1), found, -torch.inf)

    def _allowed(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(ids by falling probability [b, n], their cumulative probability float64 [b, n], place of the last one that
        may be drawn [b, 1])."""
        width = logits.shape[1] if self.top_k is None else min(self.top_k, logits.shape[1])
        values, ids = likeliest(logits, width)
        cumulative = torch.softmax(values.double() / self.temperature, dim=-1).cumsum(-1)
        if self.top_p is not None:
            # Tokens up to and including the one that reaches top_p.
            last = (cumulative < self.top_p).sum(-1, keepdim=True).clamp(max=cumulative.shape[1] - 1)
        else:
            last = torch.full_like(ids[:, :1], cumulative.shape[1] - 1)
        return ids, cumulative, last


class Ending:
    """When a continuation is over."""

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str | int]) -> None:
        self.ids = {item for item in stop if isinstance(item, int)}
        self.strings = [item for item in stop if isinstance(item, str)]
        if tokenizer is not None:
            self.ids.add(tokenizer.eos_id)
        elif self.strings:
            raise InputError(f"stop={self.strings}: stop strings need a tokenizer")
        if "" in self.strings:
            raise InputError("stop: an empty string would end every continuation at once")
        self.tokenizer = tokenizer
        # A token of text has at least one byte, so a string that has just been completed lies within this many tokens.
        self.tail = max((len(item.encode()) for item in self.strings), default=0) + 4

    def cut(self, prompt: Sequence[int], tokens: list[int]) -> int | None:
        """Length that remains if `tokens`, which follow the prompt, are over with the last one, otherwise None."""
        if tokens[-1] in self.ids:
            return len(tokens) - 1
        if not self.strings:
            return None
        assert self.tokenizer is not None
        # Decoded behind the prompt: on its own a continuation would lose the space before its first word with some
        # tokenizers, and a stop string that begins with it would not be found.
        before = list(prompt)
        tail = tokens[-self.tail :] if len(tokens) > self.tail else before[-self.tail :] + tokens
        recent = self.tokenizer.decode(tail)
        if not any(item in recent for item in self.strings):
            return None
        start = len(self.tokenizer.decode(before))
        text = self.tokenizer.decode(before + tokens)
        places = [place for item in self.strings if (place := text.find(item, start)) >= 0]
        if not places:
            return None
        remaining = len(tokens)
        while remaining and len(self.tokenizer.decode(before + tokens[:remaining])) > min(places):
            remaining -= 1
        return remaining


def generate_batch(
    stepper: Stepper,
    logits: torch.Tensor,
    prompts: Sequence[Sequence[int]],
    rows: list[int],
    limits: Sequence[int] | Mapping[int, int],
    sampler: Sampler,
    ending: Ending,
    seed: int,
    results: list[list[int]],
    bar: Track,
    memfree: MemFree | None = None,
) -> None:
    """Continue the prompts `rows`, which the stepper has read and whose next tokens have these logits, by at most
    `limits` tokens (one a prompt), each behind what `results` holds of it."""
    device, vocab_size = stepper.device, stepper.model.vocab_size
    # All random numbers of a prompt come from its own stream, drawn ahead, so that its neighbours cannot shift them.
    most = max(limits[i] for i in rows)
    uniform = torch.from_numpy(
        np.stack([np.random.Generator(np.random.Philox([seed, i])).random(most) for i in rows])
    ).to(device)
    active: list[int | None] = list(rows)  # the prompt in each row of the cache, None where it is over
    context = None if memfree is None else Context(memfree.filter, [[*prompts[i], *results[i]] for i in rows])
    for count in range(most):
        scores = logits[:, 0, :vocab_size]
        if memfree is None or context is None:
            chosen = sampler.choose(scores, uniform[:, count])
        else:
            chosen = _choose_free(memfree, context, sampler, scores, uniform[:, count], active)
            context.append(chosen)
        kept: list[int] = []
        for row, (index, token) in enumerate(zip(active, chosen.tolist(), strict=True)):
            if index is None:
                continue
            if token < 0:  # nothing is allowed to follow
                active[row] = None
                bar.advance()
                continue
            results[index].append(token)
            remaining = ending.cut(prompts[index], results[index])
            if remaining is None and count + 1 < limits[index]:
                kept.append(row)
                continue
            active[row] = None
            if remaining is not None:
                del results[index][remaining:]
            bar.advance()
        if not kept:
            return
        # To leave rows out copies the whole cache, so it waits until half of them are over.
        if 2 * len(kept) <= len(active):
            chosen, uniform = chosen[kept], uniform[kept]
            stepper.select(torch.tensor(kept, device=device))
            active = [active[row] for row in kept]
            if context is not None:
                context.select(kept)
        # A row that has just ended for want of an allowed token may still be in the batch, with -1.
        logits = stepper.step(chosen.clamp(min=0))


def _choose_free(
    memfree: MemFree,
    context: Context,
    sampler: Sampler,
    scores: torch.Tensor,
    uniform: torch.Tensor,
    active: Sequence[int | None],
) -> torch.Tensor:
    """The next tokens under a filter, -1 where none is allowed; rows that are over get any token."""
    chosen = sampler.choose(scores, uniform)
    going = torch.tensor([i is not None for i in active])
    memfree.tokens += int(going.sum())
    rows = context.open()
    rows = rows[going[rows]].to(scores.device)
    if len(rows):  # of the others none is blocked
        blocked = partial(context.blocked, rows=rows)
        rejected = blocked(scores[rows].argmax(-1, keepdim=True))[:, 0]
        memfree.rejected += int(rejected.sum())
        if sampler.temperature == 0.0:
            rows = rows[rejected]
            if len(rows):
                chosen[rows] = first_allowed(scores[rows], 1, partial(context.blocked, rows=rows))[1].squeeze(1)
        else:
            chosen[rows] = sampler.choose(scores[rows], uniform[rows], blocked)
    return chosen


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Refuse an empty prompt and ids outside the vocabulary (InputError)."""
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise InputError(f"prompt {i} is empty: give at least one token")
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= vocab_size:
            raise InputError(
                f"prompt {i} holds id {low if low < 0 else high}, the vocabulary has 0 to {vocab_size - 1}"
            )
