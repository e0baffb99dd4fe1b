"""What a model thinks of given texts: one forward pass, no text is generated.

The logits of a few rows at a time are made, scored and dropped: at most 64 MiB of them exist (fp32), whatever the
number of tokens and the size of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from megafish.decode.generate import Sampler
from megafish.errors import InputError
from megafish.model.transformer import Transformer
from megafish.processes import ALONE, Processes, batched
from megafish.progress import track

_LOGITS_BYTES = 64 << 20
_SMALLEST_STD = 1e-6
"""Below this a distribution is one token, and its log-probability has no scale (Min-K++ divides by it)."""


@dataclass(frozen=True)
class TokenScores:
    """Of tokens 1 to n - 1 of a text, each given the true tokens before it. All fields [n - 1]."""

    log_prob: np.ndarray
    """float64, log-probability [nats]."""
    correct: np.ndarray
    """bool, is it the most probable token?"""
    likeliest: np.ndarray
    """int64, the most probable token (of equal ones the first, as in greedy decoding)."""
    mean: np.ndarray | None = None
    """float64, expectation of the log-probability over the vocabulary, sum_v p_v log p_v."""
    std: np.ndarray | None = None
    """float64, standard deviation of the log-probability over the vocabulary, at least 1e-6."""
    sampled_log_prob: np.ndarray | None = None
    """float64, log-probability of drawing it with a temperature, top-k and top-p; -inf where it is cut off."""


@torch.inference_mode()
def token_scores(
    model: Transformer,
    sequences: Sequence[Sequence[int]],
    *,
    batch_size: int,
    moments: bool = False,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    progress: bool = False,
    processes: Processes = ALONE,
) -> list[TokenScores]:
    """Scores of texts of any length of at least 2, each read as a document of its own.

    batch_size: texts in one forward pass; they are packed, not padded. moments: mean and std too. temperature (with
    top_k and top_p, as decode.generate draws): sampled_log_prob too. processes: those that share the batches. Raises
    InputError for a text of fewer than 2 tokens and for ids outside the vocabulary.
    """
    sampler = None if temperature is None else Sampler(temperature, top_k, top_p)
    check_texts(sequences, model.vocab_size)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    found: list[TokenScores | None] = [None] * len(sequences)
    own = processes.own(batched(order, batch_size))
    with track(sum(map(len, own)), "score texts", "text", enabled=progress) as bar:
        for numbers in own:
            for number, scores in zip(
                numbers, _score([sequences[i] for i in numbers], model, moments, sampler), strict=True
            ):
                found[number] = scores
            bar.advance(len(numbers))
    processes.complete(found, chain(*own))
    return [scores for scores in found if scores is not None]


def check_texts(sequences: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Refuse texts that cannot be scored (InputError)."""
    for number, sequence in enumerate(sequences):
        if len(sequence) < 2:
            raise InputError(f"text {number} has {len(sequence)} tokens: a score needs at least 2")
        if min(sequence) < 0 or max(sequence) >= vocab_size:
            raise InputError(f"text {number} holds an id outside the vocabulary of {vocab_size}")


def _score(
    texts: Sequence[Sequence[int]], model: Transformer, moments: bool, sampler: Sampler | None
) -> list[TokenScores]:
    """The scores of the texts of one forward pass."""
    weight = model.head.weight
    lengths = [len(text) - 1 for text in texts]
    inputs = torch.tensor([token for text in texts for token in text[:-1]], device=weight.device)
    targets = torch.tensor([token for text in texts for token in text[1:]], device=weight.device)
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=weight.device)
    rows = torch.arange(len(inputs), device=weight.device)
    hidden = model.hidden_rows(inputs[None], rows, cu_seqlens=bounds, max_seqlen=max(lengths))
    return score_hidden(model, hidden, targets, lengths, moments=moments, sampler=sampler)


def score_hidden(
    model: Transformer,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    lengths: Sequence[int],
    *,
    moments: bool = False,
    sampler: Sampler | None = None,
) -> list[TokenScores]:
    """The scores of texts of so many tokens each, one behind the other: targets int64 [n], hidden [n, D] the final
    hidden states that predict them."""
    chunk = max(1, _LOGITS_BYTES // (4 * len(model.head.weight)))
    parts = [
        _score_rows(hidden[i : i + chunk], targets[i : i + chunk], model, moments, sampler)
        for i in range(0, len(targets), chunk)
    ]
    columns = {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}
    ends = np.cumsum(lengths)
    cut = {name: np.split(values, ends[:-1]) for name, values in columns.items()}
    return [TokenScores(**{name: values[i] for name, values in cut.items()}) for i in range(len(lengths))]


def _score_rows(
    hidden: torch.Tensor, targets: torch.Tensor, model: Transformer, moments: bool, sampler: Sampler | None
) -> dict[str, torch.Tensor]:
    """Fields of TokenScores of some rows: hidden [n, D], targets [n]."""
    logits = model.head(hidden)[:, : model.vocab_size]
    log_probs = torch.log_softmax(logits, dim=-1)
    likeliest = logits.argmax(-1)
    found = {
        "log_prob": log_probs.gather(1, targets[:, None]).squeeze(1).double(),
        "correct": likeliest == targets,
        "likeliest": likeliest,
    }
    if moments:
        probs = log_probs.exp()
        # 0 log 0 = 0: a logit of -inf has no part in a mean.
        mean = torch.where(probs > 0, probs * log_probs, 0).sum(-1, keepdim=True)
        spread = torch.where(probs > 0, probs * (log_probs - mean).square(), 0).sum(-1)
        found["mean"] = mean.squeeze(1).double()
        found["std"] = spread.double().sqrt().clamp(min=_SMALLEST_STD)
    if sampler is not None:
        found["sampled_log_prob"] = sampler.log_probability(logits, targets)
    return found
