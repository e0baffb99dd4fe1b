"""Forget and retain sets as tokens, and what each step reads of them: a function of the seed and the step alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import numpy as np
import torch

from megafish.config import Config, UnlearnConfig
from megafish.data.loader import IGNORE
from megafish.data.tokenizer import Tokenizer
from megafish.errors import InputError
from megafish.unlearn.readers import Pair, read_pairs
from megafish.unlearn.refusals import read_refusals


@dataclass(frozen=True)
class Item:
    """Tokens of a text, of which those from `start` on are the answer: what is unlearned or kept."""

    tokens: tuple[int, ...]
    start: int

    @property
    def supervised(self) -> int:
        """Tokens of the answer."""
        return len(self.tokens) - self.start


@dataclass(frozen=True)
class Sets:
    """Everything a method reads, as tokens."""

    forget: list[Item]
    retain: list[Item]
    substitutes: list[Item]
    """ReLearn's vague answers, which are learned in the place of the forget set's."""
    refused: list[list[Item]]
    """Of each question to forget: the item with each of the refusals."""

    def digest(self) -> str:
        """sha256 over all tokens."""
        digest = hashlib.sha256()
        for items in (self.forget, self.retain, self.substitutes, *self.refused):
            digest.update(f"{len(items)};".encode())
            for item in items:
                digest.update(np.array([item.start, len(item.tokens), *item.tokens], dtype=np.int64).tobytes())
        return digest.hexdigest()


def read_sets(config: Config, tokenizer: Tokenizer) -> Sets:
    """The sets that the method needs. InputError for files that do not fit, and where forget and retain overlap."""
    settings = config.unlearn
    assert settings is not None
    longest = config.data.sequence_length
    pairs = read_pairs(settings.forget, "forget")
    forget = encode(pairs, settings, tokenizer, longest, "unlearn.forget")
    retain = encode(read_pairs(settings.retain, "retain"), settings, tokenizer, longest, "unlearn.retain")
    both = {item.tokens for item in forget} & {item.tokens for item in retain}
    if both:
        example = tokenizer.decode(min(both))[:80]
        raise InputError(
            f"unlearn.forget and unlearn.retain share {len(both)} of {len(forget)} texts (such as {example!r}): what "
            "is to be kept cannot be forgotten; take them out of one of the two"
        )
    substitutes: list[Item] = []
    if settings.substitutes is not None:
        vague = read_pairs([settings.substitutes], "retain")
        substitutes = encode(vague, settings, tokenizer, longest, "unlearn.substitutes")
    refused: list[list[Item]] = []
    if settings.method in ("idk", "dpo"):
        refusals = read_refusals(settings.refusals)
        for pair in pairs:
            if pair.question is None:
                raise InputError(
                    f"method={settings.method} answers questions with a refusal, and unlearn.forget holds text without "
                    "questions: take another method"
                )
            answered = [Pair(pair.question, refusal) for refusal in refusals]
            refused.append(encode(answered, settings, tokenizer, longest, "unlearn.refusals"))
    return Sets(forget, retain, substitutes, refused)


def learned_texts(config: Config, tokenizer: Tokenizer) -> int:
    """Texts of an epoch: of the forget set, or what is learned in its place."""
    settings = config.unlearn
    assert settings is not None
    if settings.substitutes is not None:
        pairs, where = read_pairs([settings.substitutes], "retain"), "unlearn.substitutes"
    else:
        pairs, where = read_pairs(settings.forget, "forget"), "unlearn.forget"
    return len(encode(pairs, settings, tokenizer, config.data.sequence_length, where))


def encode(
    pairs: Sequence[Pair], settings: UnlearnConfig, tokenizer: Tokenizer, longest: int, where: str, first: int = 1
) -> list[Item]:
    """Tokens of pairs, each ended by the end-of-text token; text without a question in pieces of `longest` tokens.

    A text is encoded whole, as a corpus is, and the answer begins at the first token that the text before it alone
    would not have. InputError for a pair of more than `longest` tokens. first: number of the first pair, to name it.
    """
    head, _, tail = settings.template.partition("{answer}")
    texts, heads = [], []
    for pair in pairs:
        given = "" if pair.question is None else head.replace("{question}", pair.question)
        heads.append(given)
        texts.append(pair.answer if pair.question is None else given + pair.answer + tail)
    items: list[Item] = []
    encoded = zip(pairs, tokenizer.encode_batch(texts), tokenizer.encode_batch(heads), strict=True)
    for number, (pair, ids, before) in enumerate(encoded, start=first):
        tokens = (*ids.tolist(), tokenizer.eos_id)
        if pair.question is None:
            items += [Item(piece, 1) for piece in _pieces(tokens, longest)]
            continue
        if len(tokens) > longest:
            raise InputError(
                f"{where}: text {number} has {len(tokens)} tokens, more than data.sequence_length={longest}: shorten it"
            )
        shared = np.cumprod(ids[: len(before)] == before[: len(ids)]).sum() if len(before) else 0
        items.append(Item(tokens, max(1, int(shared))))
    return items


PerToken = TypeVar("PerToken", np.ndarray, torch.Tensor)


def without_end(known: PerToken) -> PerToken:
    """What is known of an answer's tokens [n], without the one that ends it, unless it is all there is."""
    return known[:-1] if len(known) > 1 else known


def _pieces(tokens: tuple[int, ...], longest: int) -> Iterator[tuple[int, ...]]:
    for start in range(0, len(tokens), longest):
        piece = tokens[start : start + longest]
        if len(piece) > 1:
            yield piece


class Order:
    """Which items a step reads: one random order after another, endlessly; the same on any number of processes."""

    def __init__(self, items: int, seed: int, name: str) -> None:
        self.items = items
        self._key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")
        self._epochs: dict[int, list[int]] = {}

    def take(self, start: int, count: int) -> list[int]:
        """The items at places start to start + count of the endless order."""
        first = start // self.items
        self._epochs = {number: epoch for number, epoch in self._epochs.items() if number >= first}
        return [self._epoch(place // self.items)[place % self.items] for place in range(start, start + count)]

    def _epoch(self, number: int) -> list[int]:
        if number not in self._epochs:
            generator = np.random.Generator(np.random.Philox(key=[self._key, number]))
            self._epochs[number] = generator.permutation(self.items).tolist()
        return self._epochs[number]


def draw(seed: int, name: str, place: int, choices: int, count: int = 1) -> list[int]:
    """`count` random numbers below `choices`, a function of the seed, a name and a place in the order."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")
    return np.random.Generator(np.random.Philox(key=[key, place])).integers(0, choices, count).tolist()


def steps_of(epochs: float, items: int, batch: int) -> int:
    """Optimizer steps of so many passes over the forget set."""
    return max(1, math.ceil(epochs * items / batch))


@dataclass(frozen=True)
class Pack:
    """Items one behind another in a single row: no padding, and attention never crosses from one to the next."""

    tokens: torch.Tensor
    """int64 [1, n], inputs."""
    targets: torch.Tensor
    """int64 [1, n]; -100 but at answers."""
    owner: torch.Tensor
    """int64 [n]: item of each position."""
    cu_seqlens: torch.Tensor
    """int32 [items + 1]."""
    max_seqlen: int

    @property
    def kept(self) -> torch.Tensor:
        """bool [n]: positions whose targets belong to an answer."""
        return self.targets[0] != IGNORE


def pack(items: Sequence[Item], device: torch.device) -> Pack:
    """Items (at least one) as one row of inputs and targets."""
    lengths = [len(item.tokens) - 1 for item in items]
    inputs = list(chain.from_iterable(item.tokens[:-1] for item in items))
    targets = list(chain.from_iterable([IGNORE] * (item.start - 1) + list(item.tokens[item.start :]) for item in items))
    bounds = np.cumsum([0, *lengths])
    return Pack(
        torch.tensor([inputs], device=device),
        torch.tensor([targets], device=device),
        torch.arange(len(items), device=device).repeat_interleave(torch.tensor(lengths, device=device)),
        torch.tensor(bounds, dtype=torch.int32, device=device),
        max(lengths),
    )
