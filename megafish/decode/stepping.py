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
    """Continues one batch of prompts after the other; every call to `begin` forgets the batch before.

    For a whole model without a mesh, under torch.inference_mode or no_grad throughout. On a GPU it keeps one cache and
    one graph for each number of rows it meets; they go with it.
    """

    def __init__(self, model: Transformer) -> None:
        weight = model.embedding.weight
        self.model = model
        self.device, self.dtype = weight.device, weight.dtype
        self.recorded = weight.device.type == "cuda"
        self._made: dict[int, _Recorded] = {}
        self._room = 0

    def begin(self, prompts: Sequence[Sequence[int]], new: int) -> torch.Tensor:
        """Read a batch of prompts, to each of which up to `new` tokens will be added: logits fp32 [b, 1, padded
        vocabulary] of the first."""
        lengths = [len(prompt) for prompt in prompts]
        tokens = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, : lengths[row]] = torch.as_tensor(prompt, dtype=torch.int64)
        self._room = new
        self._now = self._take(len(prompts), max(lengths) + new)
        cache = self._now.cache
        cache.expect(torch.tensor(lengths))
        return self._logits(tokens.to(self.device))

    def step(self, chosen: torch.Tensor) -> torch.Tensor:
        """Add a token to each row, int64 [b]: logits fp32 [b, 1, padded vocabulary] of the next one, which the step
        after it may overwrite."""
        self._room -= 1
        if self._room < 0:
            raise ValueError("more tokens than `begin` was asked to hold")
        now = self._now
        if self.recorded and now.warm:
            if now.replay is None:
                now.replay = record(lambda tokens: self._logits(tokens[:, None]), chosen)
            return now.replay(chosen)
        now.warm = True
        return self._logits(chosen[:, None])

    def select(self, rows: torch.Tensor) -> None:
        """Go on with these rows (int64 indices; some may be left out, and some come more than once), in this order."""
        if not self.recorded:
            self._now.cache.select(rows)
            return
        before = self._now.cache
        self._now = self._take(len(rows), before.capacity, clear=False)
        self._now.cache.load(before, rows)

    def _take(self, rows: int, capacity: int, clear: bool = True) -> _Recorded:
        """An empty cache for so many rows of so many tokens."""
        if self.recorded:
            capacity = -(-capacity // _ROUND) * _ROUND
            found = self._made.get(rows)
            if found is not None and found.cache.capacity >= capacity:
                if clear:
                    found.cache.clear()
                return found
        cache = KVCache(self.model.config, rows, capacity, device=self.device, dtype=self.dtype, whole=self.recorded)
        made = _Recorded(cache)
        if self.recorded:
            self._made[rows] = made
        return made

    def _logits(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.model(tokens, cache=self._now.cache, last_only=True)
        assert isinstance(logits, torch.Tensor)
        return logits


def record(step: Replay, tokens: torch.Tensor) -> Replay:
    """The kernels of `step` as a CUDA graph. Nothing of it may depend on what the host does between two calls, and all
    its state must lie in tensors that it changes in place. Recording it does not run it."""
    given = tokens.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step(given)

    def replay(tokens: torch.Tensor) -> torch.Tensor:
        given.copy_(tokens)
        graph.replay()
        return result

    return replay
