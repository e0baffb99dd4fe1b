"""A Llama-family decoder made for pretraining: fused projections, packed documents, a loss that skips what is not
supervised."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megafish.config import LossConfig, ModelConfig
from megafish.data.loader import IGNORE
from megafish.data.patches import ABSENT
from megafish.errors import InputError
from megafish.model.attention import Cached, Layout, attend, attend_cached, cached, layout
from megafish.model.flops import padded_vocab_size
from megafish.model.head import Contrast, LossHead, LossOutput, Teacher, TeacherLosses, TokenLosses
from megafish.model.mesh import Axis, Mesh
from megafish.model.parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    heads_to_tokens,
    sum_replicated_gradients,
    tokens_to_heads,
)
from megafish.model.rope import RotaryTable
from megafish.model.shard import mark
from megafish_kernels import rms_norm, rotary, rotary_qkv, swiglu
from megafish_kernels.torch_backend import padded_rows


class Initializer:
    """Weights as a function of (seed, parameter name) alone: the same for any mesh, ZeRO stage and device.

    With `stored` they are what that gives for the name, whole and in fp32.

    With tensor parallelism a parameter is made whole and cut along dimension `cut`, each of its fused `parts` apart;
    without `cut` every process holds it whole.
    """

    def __init__(self, seed: int, tensor: Axis, stored: Callable[[str], torch.Tensor] | None = None) -> None:
        self.seed = seed
        self.tensor = tensor
        self.stored = stored

    def normal(
        self,
        name: str,
        shape: tuple[int, ...],
        std: float,
        *,
        cut: int | None = None,
        parts: Sequence[int] | None = None,
        real_rows: int | None = None,
    ) -> nn.Parameter:
        """Parameter with independent normal entries of this std, fp32; rows from real_rows on are zero."""
        if torch.get_default_device().type == "meta":
            return self._own(torch.empty(shape, dtype=torch.float32), cut, parts)
        if self.stored is not None:
            return self._own(self.stored(name), cut, parts)
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
        values = generator.standard_normal(shape, dtype=np.float32)
        values *= std
        if real_rows is not None:
            values[real_rows:] = 0.0
        return self._own(torch.from_numpy(values).to(torch.get_default_device()), cut, parts)

    def constant(
        self,
        name: str,
        shape: tuple[int, ...],
        value: float,
        *,
        cut: int | None = None,
        parts: Sequence[int] | None = None,
    ) -> nn.Parameter:
        """Parameter filled with one value, fp32."""
        if self.stored is not None and torch.get_default_device().type != "meta":
            return self._own(self.stored(name), cut, parts)
        return self._own(torch.full(shape, value, dtype=torch.float32), cut, parts)

    def _own(self, full: torch.Tensor, cut: int | None, parts: Sequence[int] | None) -> nn.Parameter:
        shard = None if cut is None else self.tensor.cut(full.shape, cut, parts)
        return nn.Parameter(full) if shard is None else mark(nn.Parameter(shard.take(full)), shard)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019). With a residual it is added
    to x first, and the sum is returned too: (the normalized sum, the sum)."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return rms_norm(x, self.weight, self.eps, residual=residual)


class KVCache:
    """Keys and values of `batch` rows of up to `capacity` tokens, each row with its own length.

    A forward pass with n new tokens a row appends them after each row's length. Rows may be padded on the right: call
    `expect(counts)` before, and only counts[i] of row i's n tokens are counted (the rest is overwritten later).

    In a pass of one token attention reads all the memory there is, whatever is filled of it, because products of slices
    would copy them first; so memory grows with the rows, by a quarter at a time.

    whole: all memory is there from the start and nothing is counted on the host, so that all passes of one token do the
    same on the device (for CUDA graphs). Passes of several tokens are for an empty cache then, and whoever calls takes
    care not to fill it too far.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        whole: bool = False,
    ) -> None:
        # Tokens behind heads: what attention reads of a head lies together.
        room = capacity if whole else 0
        shape = (config.num_layers, batch, config.resolved_kv_heads, room, config.resolved_head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.counts: torch.Tensor | None = None
        self.capacity = capacity
        self.whole = whole
        self.used = 0
        # cos and sin of all its positions: a graph reads them where they were when it was recorded.
        self.rotary: tuple[torch.Tensor, torch.Tensor] | None = None

    def clear(self) -> None:
        """Forget all rows."""
        self.lengths.zero_()
        self.used = 0

    def expect(self, counts: torch.Tensor) -> None:
        """Number of real tokens (at least 1) of each row in the next forward pass, int64 [batch]."""
        self.counts = counts.to(self.lengths)

    def positions(self, new: int) -> torch.Tensor:
        """Positions of the next `new` tokens of each row, int64 [batch, new], for which there is room then."""
        if not self.whole:
            self._hold(self.used + new)
        return self.lengths[:, None] + torch.arange(new, device=self.lengths.device)

    def _hold(self, tokens: int) -> None:
        """Have memory for so many tokens a row."""
        if tokens > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens a row, {tokens} are needed")
        missing = tokens - self.keys.shape[3]
        if missing > 0:
            added = min(missing + tokens // 4, missing + self.capacity - tokens)
            self.keys, self.values = (
                torch.nn.functional.pad(each, (0, 0, 0, added)) for each in (self.keys, self.values)
            )

    def seen(self, new: int) -> int:
        """Tokens of a row that attention reads in a pass of `new` ones."""
        return self.keys.shape[3] if new == 1 else self.used + new

    def append(
        self, layer: int, key: torch.Tensor, value: torch.Tensor, where: Cached
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store key and value [batch, n, H_kv, head_dim]; return what attention reads, [batch, H_kv, L, head_dim]."""
        self.keys[layer][where.rows, :, where.positions] = key
        self.values[layer][where.rows, :, where.positions] = value
        length = where.mask.shape[-1]
        return self.keys[layer, :, :, :length], self.values[layer, :, :, :length]

    def advance(self, new: int) -> torch.Tensor:
        """Count the tokens just stored; returns the index of each row's last real one among them, int64 [batch]."""
        counts = self.counts if self.counts is not None else torch.full_like(self.lengths, new)
        self.lengths += counts
        self.counts = None
        if not self.whole:
            self.used += new
        return counts - 1

    def rewind(self, lengths: torch.Tensor) -> None:
        """Forget what is behind the first `lengths` tokens of each row, int64 [batch]."""
        self.lengths.copy_(lengths)
        self.used = int(lengths.max())

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows (int64 indices), in this order. Not with `whole`, whose tensors stay the same ones."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.lengths = self.lengths[rows]
        self.used = int(self.lengths.max())

    def load(self, other: KVCache, rows: torch.Tensor, at: int = 0) -> None:
        """Make the rows from `at` on copies of these rows (int64 indices) of another cache, whose tokens must fit in,
        or of this one itself."""
        here = slice(at, at + len(rows))
        filled = other.capacity if other.whole else other.used
        if not self.whole:
            self._hold(filled)
            self.used = max(self.used, filled)
        self.keys[:, here, :, :filled] = other.keys[:, rows, :, :filled]
        self.values[:, here, :, :filled] = other.values[:, rows, :, :filled]
        self.lengths[here] = other.lengths[rows]


class Step(NamedTuple):
    """What every block of one forward pass shares."""

    shape: tuple[int, int]
    cos: torch.Tensor
    sin: torch.Tensor
    where: Layout | Cached
    cache: KVCache | None = None


class Attention(nn.Module):
    """Grouped-query self-attention with one projection for queries, keys and values.

    A process of the tensor axis has whole heads: an equal share of the query heads, and of the key and value heads.
    """

    def __init__(self, config: ModelConfig, layer: int, init: Initializer, sequence: Axis) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.resolved_head_dim
        self.sequence = sequence
        degree = init.tensor.size
        self.heads, self.kv_heads = config.num_heads // degree, config.resolved_kv_heads // degree
        name, width = f"blocks.{layer}.attention", config.hidden_size
        inner, kv_inner = config.num_heads * self.head_dim, config.resolved_kv_heads * self.head_dim
        parts = (inner, kv_inner, kv_inner)
        rows = sum(parts)
        self.qkv = ColumnParallelLinear(
            init.normal(f"{name}.qkv.weight", (rows, width), config.init_std, cut=0, parts=parts),
            init.constant(f"{name}.qkv.bias", (rows,), 0.0, cut=0, parts=parts) if config.qkv_bias else None,
            init.tensor,
        )
        self.out = RowParallelLinear(
            init.normal(f"{name}.out.weight", (width, inner), _residual_std(config), cut=1), None, init.tensor
        )
        if config.qk_norm:
            norms = [
                RMSNorm(init.constant(f"{name}.{which}_norm.weight", (self.head_dim,), 1.0), config.norm_eps)
                for which in ("q", "k")
            ]
            self.q_norm: RMSNorm | None = norms[0]
            self.k_norm: RMSNorm | None = norms[1]
        else:
            self.q_norm = self.k_norm = None

    def forward(self, x: torch.Tensor, step: Step, rows: torch.Tensor | None = None) -> torch.Tensor:
        """x [b, S, D] -> [b, S, D], or [n, D] for the given flat rows only. With tensor parallelism [b S / T, D] ->
        [b S / T, D]."""
        heads = self.qkv(x).view(*step.shape, self.heads + 2 * self.kv_heads, self.head_dim)
        # Neither the projection nor a norm needs its output again.
        if self.q_norm is None or self.k_norm is None:
            query, key, value = rotary_qkv(heads, step.cos, step.sin, self.heads, self.kv_heads, overwrite=True)
        else:
            query, key, value = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=-2)
            query, key = rotary(self.q_norm(query), self.k_norm(key), step.cos, step.sin, overwrite=True)
        if isinstance(step.where, Cached):
            assert step.cache is not None
            key, value = step.cache.append(self.layer, key, value, step.where)
            mixed = attend_cached(query, key, value, step.where.mask)
        else:
            mixed = attend(*tokens_to_heads(query, key, value, self.sequence), step.where)
            mixed = heads_to_tokens(mixed, self.sequence)
        mixed = mixed.flatten(-2)
        if rows is not None:
            mixed = mixed.flatten(0, 1).index_select(0, rows)
        return self.out(mixed)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020) with one projection for gate and up."""

    def __init__(self, config: ModelConfig, layer: int, init: Initializer) -> None:
        super().__init__()
        name, width, inner = f"blocks.{layer}.feed_forward", config.hidden_size, config.intermediate_size
        rows, parts = 2 * inner, (inner, inner)
        self.gate_up = ColumnParallelLinear(
            init.normal(f"{name}.gate_up.weight", (rows, width), config.init_std, cut=0, parts=parts),
            init.constant(f"{name}.gate_up.bias", (rows,), 0.0, cut=0, parts=parts) if config.mlp_bias else None,
            init.tensor,
        )
        self.down = RowParallelLinear(
            init.normal(f"{name}.down.weight", (width, inner), _residual_std(config), cut=1),
            init.constant(f"{name}.down.bias", (width,), 0.0) if config.mlp_bias else None,
            init.tensor,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(swiglu(self.gate_up(x), overwrite=True))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ModelConfig, layer: int, init: Initializer, sequence: Axis) -> None:
        super().__init__()
        name, shape = f"blocks.{layer}", (config.hidden_size,)
        self.attention_norm = RMSNorm(init.constant(f"{name}.attention_norm.weight", shape, 1.0), config.norm_eps)
        self.attention = Attention(config, layer, init, sequence)
        self.feed_forward_norm = RMSNorm(init.constant(f"{name}.feed_forward_norm.weight", shape, 1.0), config.norm_eps)
        self.feed_forward = FeedForward(config, layer, init)

    def forward(self, x: torch.Tensor, step: Step, rows: torch.Tensor | None = None) -> torch.Tensor:
        """x [b, S, D] -> [b, S, D], with tensor parallelism [b S / T, D] -> [b S / T, D]. With `rows` (int64 indices
        into the flattened batch; not with tensor parallelism), only those rows come out, as [n, D]: what follows the
        attention is not computed for the others."""
        mixed = self.attention(self.attention_norm(x), step, rows)
        if rows is not None:
            x = x.flatten(0, 1).index_select(0, rows)
        normed, x = self.feed_forward_norm(mixed, x)
        return x + self.feed_forward(normed)


class Transformer(nn.Module):
    """Decoder-only language model of the shape `config`.

    vocab_size: real vocabulary (the tokenizer's); the embedding has config.vocab_size rows, or vocab_size rounded up
    to a multiple of 64. Padding rows are zero and take no part in the loss. The weights depend on (seed, parameter
    name) only.

    weights: gives the values of a parameter by its name, whole and in fp32, instead of the seed (load.initial_weights).
    mesh: the processes that the model is spread over; each holds its shards of the parameters (`megafish.model.shard`)
    and takes its part of the sequences. All of them must make the same calls.

    Raises InputError if config.vocab_size is smaller than vocab_size, or does not divide among the mesh.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        *,
        loss: LossConfig | None = None,
        seed: int = 0,
        weights: Callable[[str], torch.Tensor] | None = None,
        activation_checkpointing: bool = False,
        mesh: Mesh = Mesh(),  # noqa: B008 - immutable
    ) -> None:
        super().__init__()
        self.config = config
        self.mesh = mesh
        self.vocab_size = vocab_size
        self.padded_vocab_size = padded_vocab_size(config, vocab_size)
        if self.padded_vocab_size < vocab_size:
            raise InputError(
                f"model.vocab_size={config.vocab_size} is smaller than the tokenizer's vocabulary of {vocab_size}: "
                "raise it or set it to null"
            )
        if self.padded_vocab_size % mesh.tensor.size:
            raise InputError(
                f"the embedding's {self.padded_vocab_size} rows are not a multiple of engine.tensor_parallel="
                f"{mesh.tensor.size}: set model.vocab_size to one that is at least {vocab_size}"
            )
        self.activation_checkpointing = activation_checkpointing
        init = Initializer(seed, mesh.tensor, weights)
        shape = (self.padded_vocab_size, config.hidden_size)
        self.embedding = VocabParallelEmbedding(
            init.normal("embedding.weight", shape, config.init_std, cut=0, real_rows=vocab_size), mesh.tensor
        )
        self.blocks = nn.ModuleList(Block(config, layer, init, mesh.sequence) for layer in range(config.num_layers))
        self.norm = RMSNorm(init.constant("norm.weight", (config.hidden_size,), 1.0), config.norm_eps)
        head_weight = (
            self.embedding.weight
            if config.tie_embeddings
            else init.normal("head.weight", shape, config.init_std, cut=0, real_rows=vocab_size)
        )
        self.head = LossHead(head_weight, vocab_size, loss if loss is not None else LossConfig(), mesh.tensor)
        sum_replicated_gradients(self.parameters(), mesh.tensor)
        self._rotary = RotaryTable(config)

    def tie(self) -> None:
        """Share the embedding with the head again after its tensor was replaced (no effect unless the model ties
        them)."""
        if self.config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        tokens: torch.Tensor,
        *,
        targets: torch.Tensor | None = None,
        drop: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        denominator: float | torch.Tensor | None = None,
        per_token: bool = False,
        cache: KVCache | None = None,
        last_only: bool = False,
        patch: int | None = None,
        contrast: Contrast | None = None,
        correct: bool = False,
        teacher: Teacher | None = None,
        hidden_after: int | None = None,
    ) -> torch.Tensor | LossOutput | TokenLosses | TeacherLosses:
        """Loss, per-token loss or logits of tokens int64 [b, S].

        targets: int64 [b, S], -100 where nothing is supervised. drop: bool [b, S], True where the target is left out
        of the loss (per_token gives its cross-entropy all the same). cu_seqlens: int32 [documents + 1], offsets of the
        documents in the flattened batch, which attention never crosses (None: a row is a document); max_seqlen: the
        longest of them.
        denominator: what the summed loss is divided by (default: the number of kept tokens).

        patch: tokens of a patch; tokens, targets, drop and cu_seqlens are those of data.patches. A patch's embedding is
        the mean of those of its tokens (arXiv 2407.12665), and it predicts all tokens of the next one.

        contrast: what a premature model adds to the logits of the tokens that it names (objective.contrast).

        teacher: what the predictions are compared with (head.Teacher), with per_token; the result is TeacherLosses.
        hidden_after: stop after so many blocks and return the hidden states [b, S, D]; after all of them, as the head
        takes them. Neither with a mesh.

        With sequence parallelism tokens, targets and drop are this process's part of each row, S / P consecutive tokens
        in the order of ranks; cu_seqlens and max_seqlen are of the whole rows. Losses and denominator's default are of
        this part. With tensor parallelism b S must be a multiple of its degree. A model on such a mesh gives no logits.

        Returns LossOutput; with per_token the plain cross-entropy fp32 [b, S] (nats, 0 at ignored targets), with
        `correct` too TokenLosses of it and of whether each target is the most probable token, bool [b, S]; without
        targets the logits fp32 [b, S, padded vocabulary] (products in the weights' dtype, cast up), [b, 1, ...] with
        last_only. With a cache the tokens follow what it holds. Raises ValueError for arguments that would have no
        effect together.
        """
        if targets is None and (per_token or drop is not None or denominator is not None):
            raise ValueError("drop, denominator and per_token belong to a loss: give targets")
        if targets is not None and last_only:
            raise ValueError("last_only asks for logits: leave targets out")
        if correct and not per_token:
            raise ValueError("correct is told of each token: give per_token")
        if per_token and denominator is not None:
            raise ValueError("per_token losses are not summed: leave denominator out")
        if teacher is not None and (not per_token or correct):
            raise ValueError("a teacher is compared with token by token: give per_token, and not correct")
        if hidden_after is not None and (targets is not None or cache is not None or last_only):
            raise ValueError("hidden_after asks for hidden states: leave targets, cache and last_only out")
        if hidden_after is not None and not 1 <= hidden_after <= len(self.blocks):
            raise ValueError(f"hidden_after={hidden_after}: the model has blocks 1 to {len(self.blocks)}")
        if patch is not None and (targets is None or per_token or cache is not None or self.mesh.tensor.size > 1):
            raise ValueError("patches are for training: give targets, and neither per_token, cache nor a tensor mesh")
        if contrast is not None and (targets is None or per_token or patch is not None or self.mesh.tensor.size > 1):
            raise ValueError("a contrast is for training: give targets, and neither per_token, patch nor a tensor mesh")
        tensor = self.mesh.tensor
        spread = tensor.size > 1 or self.mesh.sequence.size > 1
        if spread and targets is None:
            raise ValueError("logits come from a whole model: load the weights into one without a mesh")
        if tokens.numel() % tensor.size:
            raise ValueError(f"{tokens.numel()} tokens do not divide among {tensor.size} tensor-parallel processes")
        step = self._step((len(tokens), tokens.shape[1] // (patch or 1)), tokens.device, cu_seqlens, max_seqlen, cache)
        rows: torch.Tensor | None = None
        if targets is not None and not per_token:
            if drop is not None:
                targets = targets.masked_fill(drop, IGNORE)
            # With the kept rows known, what comes after the last attention is computed for them alone. On a CPU only:
            # on CUDA nonzero() waits for the device, here before any block is launched. linear_cross_entropy waits as
            # well, but behind the blocks, so that their launches are hidden. Nor with tensor parallelism, where the
            # kept rows would have to be shared out anew.
            targets = targets if patch is None else targets.view(*step.shape, patch)
            if tokens.device.type == "cpu" and tensor.size == 1:
                kept = targets != IGNORE
                kept = kept.flatten() if patch is None else kept.flatten(0, 1).any(dim=1)
                rows = _round_up(kept.nonzero().squeeze(1), kept.numel(), self.norm.weight.dtype)
                targets = targets.flatten(0, 1).index_select(0, rows)
                if contrast is not None:
                    contrast = contrast._replace(mask=contrast.mask.flatten().index_select(0, rows))
        x = self.embedding(tokens) if patch is None else self._patches(tokens, patch)
        last = len(self.blocks) - 1
        for layer, block in enumerate(self.blocks[:hidden_after]):
            wanted = rows if layer == last else None
            if self.activation_checkpointing and torch.is_grad_enabled():
                # A block draws no random numbers, so their state need not be saved for the recomputation.
                x = checkpoint(block, x, step, wanted, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, step, wanted)
        if hidden_after is not None:
            return self.norm(x) if hidden_after == len(self.blocks) else x
        if cache is not None:
            ends = cache.advance(tokens.shape[1])
        if last_only:
            x = x[torch.arange(len(x), device=x.device), ends][:, None] if cache is not None else x[:, -1:]
        if tensor.size == 1:
            return self.head(self.norm(x), targets, denominator, per_token, contrast, correct, teacher)
        assert targets is not None
        out = self.head(self.norm(x), targets.flatten(), denominator, per_token, correct=correct)
        if isinstance(out, TokenLosses):
            return TokenLosses(*(each.view_as(targets) for each in out))
        return out.view_as(targets) if per_token else out

    def hidden_rows(
        self,
        tokens: torch.Tensor,
        rows: torch.Tensor,
        *,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """Final hidden states, as the head takes them, of the given flat rows: [n, D]. Not with tensor parallelism."""
        step = self._step((len(tokens), tokens.shape[1]), tokens.device, cu_seqlens, max_seqlen, cache)
        x = self.embedding(tokens)
        for block in self.blocks[:-1]:
            x = block(x, step)
        x = self.blocks[-1](x, step, rows)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.norm(x)

    def _patches(self, tokens: torch.Tensor, size: int) -> torch.Tensor:
        """Mean embedding of the tokens in each patch: [b, S] -> [b, S / size, D]."""
        present = (tokens != ABSENT).view(len(tokens), -1, size, 1)
        embedded = self.embedding(tokens.clamp(min=0)).view(*present.shape[:3], -1)
        return torch.where(present, embedded, 0).sum(dim=2) / present.sum(dim=2)

    def _step(
        self,
        shape: tuple[int, int],
        device: torch.device,
        cu_seqlens: torch.Tensor | None,
        max_seqlen: int | None,
        cache: KVCache | None,
    ) -> Step:
        batch, length = shape
        if cache is not None:
            if cu_seqlens is not None:
                raise ValueError("cu_seqlens cannot be used with a cache: a row of a cache is one document")
            positions = cache.positions(length)
            if cache.rotary is None:
                cache.rotary = self._rotary.get(cache.capacity, device)
            cos, sin = (table[positions][:, :, None] for table in cache.rotary)
            window, dtype = self.config.sliding_window, self.norm.weight.dtype
            return Step((batch, length), cos, sin, cached(positions, cache.seen(length), window, dtype), cache)
        # Places in the row serve as positions: rotary attention depends on differences alone, and no query sees a key
        # of another document, so counting anew in every document would give the same.
        sequence = self.mesh.sequence
        whole, start = length * sequence.size, length * sequence.rank
        cos, sin = (table[start : start + length, None] for table in self._rotary.get(whole, device))
        where = layout(
            batch,
            whole,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            window=self.config.sliding_window,
            head_dim=self.config.resolved_head_dim,
            device=device,
            dtype=self.norm.weight.dtype,
        )
        return Step((batch, length), cos, sin, where)


def _round_up(rows: torch.Tensor, total: int, dtype: torch.dtype) -> torch.Tensor:
    """Kept rows, in bfloat16 with some of the others behind them, up to the next multiple of 64: see padded_rows of
    megafish_kernels for the reason. What is computed for the others is left out again by their ignored targets."""
    missing = padded_rows(len(rows), dtype) - len(rows)
    if missing == 0 or not 0 < len(rows) < total:
        return rows
    others = torch.ones(total, dtype=torch.bool).index_fill_(0, rows, False).nonzero().squeeze(1)
    return torch.cat((rows, others[:missing]))


def _residual_std(config: ModelConfig) -> float:
    """Initial std of a projection into the residual stream."""
    return config.init_std / math.sqrt(2 * config.num_layers) if config.depth_scaled_init else config.init_std
