"""The loss of a language model's head, from hidden states to a number, without the logits of all tokens in memory."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megafish_kernels.torch_backend import LinearCrossEntropy, Options, reduction_dtype


class LossStats(NamedTuple):
    """Per-token facts about the predictions, detached, shaped like the targets, 0 (False) at ignored tokens."""

    lse: Tensor
    """Log-sum-exp of the logits, fp32 (float64 for float64 hidden states)."""
    entropy: Tensor | None
    """Entropy of the prediction in nats, in the dtype of lse; None with return_stats="loss"."""
    correct: Tensor | None
    """bool: the target has the highest logit, or is the first of those that share it; None with return_stats="loss"."""
    cross_entropy: Tensor
    """-log p(target) in nats, in the dtype of lse: without weight, z-loss and label smoothing."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    denominator: float | Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    backend: Literal["auto", "torch"] = "auto",
    return_stats: bool | Literal["loss"] = False,
) -> Tensor | tuple[Tensor, LossStats]:
    """Cross-entropy of softcap(logit_scale * (hidden @ weight.T + bias)) with `targets`.

    Ignored tokens are taken out before any product, so that a token that the goldfish mask drops costs the head
    nothing, forward or backward; how many are left is read by the host, which waits for a GPU's queue to come there.
    Sums and losses are fp32 (float64 for float64 hidden states), and so is the adding up of the weight's gradient over
    chunks. With bfloat16 or float16 hidden states the products' results are rounded to that type before the fp32
    arithmetic: the logits, their gradient, and each chunk's part of the weight's gradient. Deterministic on one machine
    and number of threads.

    Args:
        hidden: [..., D] float32, bfloat16, float16 or float64.
        weight: [V, D] in the same dtype. Under autocast both are cast to autocast's dtype.
        targets: [...] integers in [0, vocab_size), or `ignore_index`.
        bias: [V] in the dtype of weight.
        token_weight: [...] multiplies each token's loss; 0 leaves the token out, as `ignore_index` does. A constant: it
            gets no gradient.
        ignore_index: the target of tokens that are left out.
        denominator: what "mean" divides by: the sum of the weights of the whole global batch, a number or a 0-d tensor
            (which is not read by the host). Default: the sum of the weights of this call's kept tokens.
        reduction: "mean", "sum", or "none" for the loss of each token, 0 where ignored.
        z_loss: coefficient of lse^2, added to each token's loss before its weight (PaLM, arXiv 2204.02311, section 5).
        label_smoothing: a of (1 - a) * onehot + a / vocab_size as the target's distribution.
        softcap: logits become softcap * tanh(logits / softcap) (Gemma 2, arXiv 2408.00118, section 2).
        logit_scale: multiplies the logits, before the softcap.
        vocab_size: rows of weight that are real; the rest is padding, takes no part and gets zero gradients.
        chunk_tokens: kept tokens whose logits exist at one time. None: 16 MiB of logits or 256 tokens (512 in half
            precision), whichever is more.
        backend: "torch", plain torch on any device, is the only one there is; "auto" leaves the choice to the library.
        return_stats: True returns LossStats too; "loss" only those of its fields that cost nothing.

    Returns:
        The loss, a 0-d tensor in the dtype of the sums ([...] with "none"), or (loss, LossStats). With no kept token
        it is 0, and so are its gradients.

    Raises:
        ValueError: shapes, dtypes or options do not fit each other, or a target is out of range (checked on the CPU).
    """
    vocab = weight.shape[0] if vocab_size is None and weight.dim() == 2 else vocab_size or 0
    _check_tensors(hidden, weight, targets, bias, token_weight, vocab)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: {reduction!r} is not one of mean, sum, none")
    if denominator is not None and reduction != "mean":
        raise ValueError(f'denominator: goes with reduction "mean" alone, got {reduction!r}')
    if isinstance(denominator, Tensor) and denominator.dim() != 0:
        raise ValueError(f"denominator: expected a 0-d tensor, got shape {tuple(denominator.shape)}")
    if denominator is not None and not isinstance(denominator, Tensor) and not denominator > 0:
        raise ValueError(f"denominator: {denominator} must be above 0")
    if z_loss < 0:
        raise ValueError(f"z_loss: {z_loss} must be at least 0")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing: {label_smoothing} must be at least 0 and below 1")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap: {softcap} must be above 0")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens: {chunk_tokens} must be at least 1")
    if backend not in ("auto", "torch"):
        raise ValueError(f"backend: {backend!r} is not one of auto, torch")
    if return_stats not in (False, True, "loss"):
        raise ValueError(f'return_stats: {return_stats!r} is not one of False, True, "loss"')

    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        compute = torch.get_autocast_dtype(device_type)
        hidden, weight = hidden.to(compute), weight.to(compute)
        bias = None if bias is None else bias.to(compute)
    elif hidden.dtype != weight.dtype:
        raise ValueError(f"weight: dtype {weight.dtype} must be that of hidden, {hidden.dtype}")
    if bias is not None and bias.dtype != weight.dtype:
        raise ValueError(f"bias: dtype {bias.dtype} must be that of weight, {weight.dtype}")
    dtype = reduction_dtype(hidden.dtype)

    flat = targets.reshape(-1).long()
    keep = flat != ignore_index
    weights = None
    if token_weight is not None:
        weights = token_weight.detach().reshape(-1).to(dtype)
        keep &= weights != 0
    index: Tensor | None = keep.nonzero()[:, 0]
    assert index is not None
    if index.shape[0] == flat.shape[0]:
        index = None
    kept = flat if index is None else flat[index]
    kept_weights = weights if index is None or weights is None else weights[index]
    if device_type == "cpu" and kept.numel() and (int(kept.min()) < 0 or int(kept.max()) >= vocab):
        wrong = kept[(kept < 0) | (kept >= vocab)][0]
        raise ValueError(f"targets: id {int(wrong)} is outside the vocabulary of {vocab}")

    scale: Tensor | None = None
    if reduction == "sum":
        scale = torch.ones((), dtype=dtype)
    elif reduction == "mean":
        if denominator is None:
            total = torch.tensor(float(kept.shape[0])) if kept_weights is None else kept_weights.sum()
        else:
            total = torch.as_tensor(denominator).detach()
        scale = total.to(dtype).reciprocal()

    options = Options(
        vocab_size=vocab,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
        softcap=softcap,
        logit_scale=logit_scale,
        chunk_tokens=chunk_tokens,
        stats=return_stats is True,
    )
    rows = hidden.reshape(-1, hidden.shape[-1])
    loss, cross_entropy, lse, entropy, correct = LinearCrossEntropy.apply(
        rows, weight, bias, kept, index, kept_weights, scale, options, torch.is_grad_enabled()
    )

    def spread(values: Tensor) -> Tensor:
        """Per kept token -> shaped like the targets, 0 at ignored ones; differentiable."""
        if index is None:
            return values.reshape(targets.shape)
        return values.new_zeros(flat.shape[0]).index_copy(0, index, values).reshape(targets.shape)

    if reduction == "none":
        loss = spread(loss)
    if not return_stats:
        return loss
    return loss, LossStats(
        lse=spread(lse),
        entropy=None if entropy is None else spread(entropy),
        correct=None if correct is None else spread(correct),
        cross_entropy=spread(cross_entropy),
    )


def _check_tensors(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, token_weight: Tensor | None, vocab: int
) -> None:
    if weight.dim() != 2:
        raise ValueError(f"weight: expected [V, D], got shape {tuple(weight.shape)}")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden: expected [..., {weight.shape[1]}] as weight has it, got {tuple(hidden.shape)}")
    if not hidden.is_floating_point():
        raise ValueError(f"hidden: expected a floating-point dtype, got {hidden.dtype}")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets: expected shape {tuple(hidden.shape[:-1])}, got {tuple(targets.shape)}")
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(f"targets: expected integers, got {targets.dtype}")
    if token_weight is not None and token_weight.shape != targets.shape:
        raise ValueError(f"token_weight: expected shape {tuple(targets.shape)}, got {tuple(token_weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    if not 1 <= vocab <= weight.shape[0]:
        raise ValueError(f"vocab_size: {vocab} must be at least 1 and at most the {weight.shape[0]} rows of weight")
    for name, tensor in (("weight", weight), ("targets", targets), ("bias", bias), ("token_weight", token_weight)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name}: lies on {tensor.device}, but hidden on {hidden.device}")
