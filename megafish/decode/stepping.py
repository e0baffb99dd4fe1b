"""Decoding token by token: prompts go into a key/value cache, then every row gets one token after the other.

On a GPU such a step launches a dozen small kernels a layer, and the host takes far longer to launch them than the GPU
to run them. There the step is recorded as a CUDA graph, which launches them all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megafish.model.transformer import KVCache, Transformer

_ROUND = 64
"""The caches of recorded steps hold a multiple of so many tokens: batches of about the same length share one."""

Replay = Callable[[torch.Tensor], torch.Tensor]
"""tokens int64 [b] -> logits [b, 1, padded vocabulary], in a buffer that the next call writes again."""


@dataclass
class _Recorded:
    """A cache of so many rows, and what has been done to record a step of them."""

    cache: KVCache
    warm: bool = False
    """One step has run: the kernels are compiled and loaded, which a recording cannot do."""
    replay: Replay | None = None


class Stepper:
    """Continues one batch of prompts after the other; every call to `begin` or `adopt` forgets the batch before.

    For a whole model without a mesh, under torch.inference_mode or no_grad throughout. On a GPU it rounds the number of
    rows up to a power of two, the others being idle, and keeps a cache and a graph for each: together at most about
    twice the rows of the largest batch.
    """

    def __init__(self, model: Transformer) -> None:
        weight = model.embedding.weight
        self.model = model
        self.device, self.dtype = weight.device, weight.dtype
        self.recorded = weight.device.type == "cuda"
        self._made: dict[int, _Recorded] = {}
        self._now: _Recorded | None = None
        self._rows = self._room = 0

    def begin(self, prompts: Sequence[Sequence[int]], new: int) -> torch.Tensor:
        """Read a batch of prompts, to each of which up to `new` tokens will be added: logits fp32 [b, 1, padded
        vocabulary] of the first."""
        self._rows, self._room, self._now = len(prompts), new, None
        lengths = [len(prompt) for prompt in prompts]
        lengths += [1] * (self._padded(len(prompts)) - len(prompts))
        tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, : lengths[row]] = torch.as_tensor(prompt, dtype=torch.int64)
        self._now = self._take(len(lengths), max(lengths) + new)
        self._now.cache.clear()
        self._now.cache.expect(torch.tensor(lengths))
        return self._logits(self._now.cache, tokens.to(self.device))[: self._rows]

    def adopt(self, caches: Sequence[KVCache], new: int) -> None:
        """Go on from caches that were filled elsewhere, the rows of one behind those of the other, to which up to `new`
        tokens will be added; what they hold is copied."""
        self._rows, self._room, self._now = sum(len(cache.lengths) for cache in caches), new, None
        self._now = self._take(self._padded(self._rows), max(cache.used for cache in caches) + new)
        self._now.cache.clear()
        first = 0
        for cache in caches:
            self._now.cache.load(cache, torch.arange(len(cache.lengths), device=self.device), first)
            first += len(cache.lengths)

    def step(self, chosen: torch.Tensor) -> torch.Tensor:
        """Add a token to each row, int64 [b]: logits fp32 [b, 1, padded vocabulary] of the next one, which the step
        after it may overwrite."""
        now = self._now
        if now is None or self._room < 1:
            raise ValueError("more tokens than `begin` or `adopt` was asked to hold")
        self._room -= 1
        cache = now.cache
        idle = len(cache.lengths) - self._rows
        chosen = torch.nn.functional.pad(chosen, (0, idle)) if idle else chosen
        if not self.recorded or not now.warm:
            now.warm = True
            return self._logits(cache, chosen[:, None])[: self._rows]
        if now.replay is None:
            now.replay = record(lambda tokens: self._logits(cache, tokens[:, None]), chosen)
        return now.replay(chosen)[: self._rows]

    def select(self, rows: torch.Tensor) -> None:
        """Go on with these rows (int64 indices; some may be left out, and some come more than once), in this order."""
        assert self._now is not None
        before = self._now.cache
        self._rows = len(rows)
        if not self.recorded:
            before.select(rows)
            return
        idle = self._padded(len(rows)) - len(rows)
        self._now = self._take(len(rows) + idle, before.capacity)
        self._now.cache.load(before, torch.cat((rows, rows[:1].expand(idle))))

    def _padded(self, rows: int) -> int:
        return 1 << (rows - 1).bit_length() if self.recorded else rows

    def _take(self, rows: int, capacity: int) -> _Recorded:
        """A cache for so many rows of so many tokens; one that is there, unless most of it would be read in vain."""
        if not self.recorded:
            return _Recorded(self._cache(rows, capacity))
        capacity = -(-capacity // _ROUND) * _ROUND
        found = self._made.get(rows)
        if found is None or not capacity <= found.cache.capacity <= 2 * capacity:
            del found
            self._made.pop(rows, None)  # its memory is free before the new one is allocated
            self._made[rows] = _Recorded(self._cache(rows, capacity))
        return self._made[rows]

    def _cache(self, rows: int, capacity: int) -> KVCache:
        config = self.model.config
        return KVCache(config, rows, capacity, device=self.device, dtype=self.dtype, whole=self.recorded)

    def _logits(self, cache: KVCache, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.model(tokens, cache=cache, last_only=True)
        assert isinstance(logits, torch.Tensor)
        return logits


def record(step: Replay, tokens: torch.Tensor) -> Replay:
    """The kernels of `step` as a CUDA graph. Nothing of it may depend on what the host does between two calls, and all
    its state must lie in tensors that stay there and that it changes in place. Recording it does not run it."""
    given = tokens.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(given.device), torch.cuda.graph(graph, stream=torch.cuda.Stream(given.device)):
        result = step(given)

    def replay(tokens: torch.Tensor) -> torch.Tensor:
        given.copy_(tokens)
        graph.replay()
        return result

    return replay
