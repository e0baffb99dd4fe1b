"""Kullback-Leibler divergence between two output heads, without either's logits in memory at one time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megafish_kernels.torch_backend import reduction_dtype

# Bytes that the fp32 logits of one head may take at one time.
_LOGITS_BYTES = 64 << 20


def linear_kl_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    targets: Tensor | None = None,
    penalty: float | Tensor = 0.0,
    vocab_size: int | None = None,
    logits_bytes: int = _LOGITS_BYTES,
) -> tuple[Tensor, Tensor]:
    """KL(p || q) of each row and the entropy of p, with q = softmax(hidden @ weight.T) and the teacher's p =
    softmax(teacher_hidden @ teacher_weight.T - penalty * onehot(targets)).

    The sum of the two is the cross-entropy of q with the soft labels p. The teacher is a constant: it gets no gradient,
    and may be the detached student itself. Rows are worked through in chunks, forward and backward; the gradient of
    the weight is added up in fp32 (float64 for float64 hidden states).

    Args:
        hidden: [n, D] float32, bfloat16, float16 or float64.
        weight: [V, D] in the same dtype.
        teacher_hidden, teacher_weight: [n, D'] and [V, D'] in one dtype.
        targets: int64 [n], the tokens whose logits the penalty lowers.
        penalty: in nats, one for all rows or [n]; inf leaves those tokens out of p altogether.
        vocab_size: rows of the weights that are tokens; those behind them are never predicted.
        logits_bytes: what the fp32 logits of one head may take at one time.

    Returns (divergence, entropy): [n] each in nats, fp32 (float64 for float64 hidden states).

    Raises ValueError for shapes that do not fit, and for a penalty without targets.
    """
    vocab_size = len(weight) if vocab_size is None else vocab_size
    if hidden.ndim != 2 or teacher_hidden.ndim != 2 or len(hidden) != len(teacher_hidden):
        raise ValueError(
            f"hidden {list(hidden.shape)} and teacher_hidden {list(teacher_hidden.shape)}: both must be [n, D] with "
            "the same n"
        )
    for name, states, matrix in (("hidden", hidden, weight), ("teacher_hidden", teacher_hidden, teacher_weight)):
        if matrix.ndim != 2 or states.shape[1] != matrix.shape[1] or len(matrix) < vocab_size:
            raise ValueError(
                f"{name} {list(states.shape)} does not fit a weight {list(matrix.shape)} of at least {vocab_size} rows"
            )
    lowers = isinstance(penalty, Tensor) or penalty != 0
    if lowers and targets is None:
        raise ValueError(f"penalty={penalty}: give the targets whose logits it lowers")
    if targets is not None and targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {list(targets.shape)} for {len(hidden)} rows")
    lowered = None
    if lowers and targets is not None:
        lowered = torch.as_tensor(penalty, device=hidden.device).to(reduction_dtype(hidden.dtype)).expand(targets.shape)
    rows = max(1, logits_bytes // (4 * vocab_size))
    found: tuple[Tensor, Tensor] = _Divergence.apply(
        hidden, weight, teacher_hidden.detach(), teacher_weight.detach(), targets, lowered, vocab_size, rows
    )
    return found


class _Divergence(torch.autograd.Function):
    """The divergence's gradient with respect to the student's logits is q - p."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        targets: Tensor | None,
        penalty: Tensor | None,
        vocab_size: int,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, teacher_hidden, teacher_weight, targets, penalty)
        ctx.vocab_size, ctx.rows = vocab_size, rows
        divergence = hidden.new_empty(len(hidden), dtype=reduction_dtype(hidden.dtype))
        entropy = torch.empty_like(divergence)
        for part in _chunks(len(hidden), rows):
            log_q = _log_probs(hidden[part], weight[:vocab_size])
            log_p = _teacher(
                teacher_hidden[part], teacher_weight[:vocab_size], _part(targets, part), _part(penalty, part)
            )
            log_p = log_p.to(log_q.dtype)
            p = log_p.exp()
            # 0 log 0 = 0: a token that is left out has a log-probability of -inf.
            divergence[part] = torch.where(p > 0, p * (log_p - log_q), 0).sum(-1)
            entropy[part] = -torch.where(p > 0, p * log_p, 0).sum(-1)
        ctx.mark_non_differentiable(entropy)
        return divergence, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hidden, weight, teacher_hidden, teacher_weight, targets, penalty = ctx.saved_tensors
        upstream = grads[0]
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=reduction_dtype(hidden.dtype)) if ctx.needs_input_grad[1] else None
        size = ctx.vocab_size
        for part in _chunks(len(hidden), ctx.rows):
            d_logits = _log_probs(hidden[part], weight[:size]).exp()
            log_p = _teacher(teacher_hidden[part], teacher_weight[:size], _part(targets, part), _part(penalty, part))
            d_logits = ((d_logits - log_p.to(d_logits.dtype).exp()) * upstream[part, None]).to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[part] = d_logits @ weight[:size]
            if d_weight is not None:
                d_weight[:size] += d_logits.t() @ hidden[part]
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), *(None,) * 6


def _log_probs(hidden: Tensor, weight: Tensor) -> Tensor:
    return torch.log_softmax(F.linear(hidden, weight).to(reduction_dtype(hidden.dtype)), dim=-1)


def _teacher(hidden: Tensor, weight: Tensor, targets: Tensor | None, penalty: Tensor | None) -> Tensor:
    """Log-probabilities of the teacher, its targets' logits lowered."""
    logits = F.linear(hidden, weight).to(reduction_dtype(hidden.dtype))
    if penalty is not None and targets is not None:
        logits.scatter_add_(1, targets[:, None], -penalty[:, None].to(logits.dtype))
    return torch.log_softmax(logits, dim=-1)


def _part(tensor: Tensor | None, part: slice) -> Tensor | None:
    return None if tensor is None else tensor[part]


def _chunks(total: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, total)) for start in range(0, total, rows)]
