"""The output projection and the loss in one: plain, over patches, or with another model's correction."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from megafish.config import LossConfig
from megafish.data.loader import IGNORE
from megafish.model.mesh import Axis
from megafish.model.parallel import first_id
from megafish_kernels import linear_cross_entropy, linear_kl_divergence, patch_cross_entropy
from megafish_kernels.partials import entropy_weight


class LossOutput(NamedTuple):
    """loss: fp32 scalar with gradient, [sum over kept tokens of CE and its terms, times their weight] / denominator.
    ce_sum: detached fp32 scalar, the sum of plain cross-entropy [nats] over the kept tokens; with a Contrast that of
    the corrected predictions. weight_sum: that of MiLe's weights, None without it."""

    loss: torch.Tensor
    ce_sum: torch.Tensor
    weight_sum: torch.Tensor | None = None


class TokenLosses(NamedTuple):
    """loss: fp32, plain cross-entropy of each target [nats], 0 at ignored ones. correct: bool, whether it is the most
    probable token, or the first of those that share the highest logit; False at ignored ones."""

    loss: torch.Tensor
    correct: torch.Tensor


class Contrast(NamedTuple):
    """What another model adds to the logits of some tokens."""

    mask: torch.Tensor
    """Which targets, bool [b, S]; none that is ignored."""
    hidden: torch.Tensor
    """Its final hidden states of these, in their order, times their strength: [n, D']."""
    weight: torch.Tensor
    """Its output head, [padded V', D'] for the same vocabulary."""


class Teacher(NamedTuple):
    """Predictions that those of the kept targets, or of `rows` among them, are compared with, in their order."""

    hidden: torch.Tensor | None = None
    """Its hidden states [n, D']. None: the model itself, as it is."""
    weight: torch.Tensor | None = None
    """Its output head [padded V', D']. None: the model's own, as it is."""
    penalty: float | torch.Tensor = 0.0
    """What the logits of the true tokens are lowered by [nats], one for all or [n]; inf leaves them out."""
    rows: torch.Tensor | None = None
    """Which targets, int64 indices into the flattened batch. None: all that are kept."""


class TeacherLosses(NamedTuple):
    """loss: fp32, plain cross-entropy of each target [nats], 0 at ignored ones. Of the n compared targets alone, fp32:
    divergence, KL(teacher || model) with gradient, and entropy, the teacher's; the two add up to the cross-entropy with
    the teacher's predictions as soft labels."""

    loss: torch.Tensor
    divergence: torch.Tensor
    entropy: torch.Tensor


class LossHead(nn.Module):
    """Output projection and loss in one. A module of its own, so that ZeRO-3's hooks gather the weight around its
    forward."""

    def __init__(self, weight: nn.Parameter, vocab_size: int, loss: LossConfig, tensor: Axis) -> None:
        super().__init__()
        self.weight = weight
        # The weight once more in another layout, for logits (decode.packed).
        self.packed: nn.Module | None = None
        self.parallel: dict[str, Any] = {}
        if tensor.size > 1:
            self.parallel = {"group": tensor.group, "vocab_start": first_id(weight), "sequence_sharded": True}
        self.vocab_size = vocab_size
        self.loss = loss
        self.logits_bytes = None if loss.logits_mib is None else loss.logits_mib * 2**20

    def forward(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor | None = None,
        denominator: float | torch.Tensor | None = None,
        per_token: bool = False,
        contrast: Contrast | None = None,
        correct: bool = False,
        teacher: Teacher | None = None,
    ) -> torch.Tensor | LossOutput | TokenLosses | TeacherLosses:
        """hidden [..., D]; with tensor parallelism this process's [n / T, D], and no logits.

        Without targets: logits [..., padded V], the product in hidden's dtype cast up to fp32 (so bf16 hidden states
        give logits of bf16 precision). With targets [...], of all n tokens: LossOutput, or with per_token the plain
        cross-entropy fp32 [...] in nats, 0 at ignored positions, with `correct` TokenLosses, with a teacher
        TeacherLosses. With targets [..., K]: LossOutput over all of them.
        """
        if targets is None:
            assert not self.parallel
            return (self.packed(hidden) if self.packed else F.linear(hidden, self.weight)).float()
        if contrast is not None:
            return self._corrected(hidden.flatten(0, -2), targets.flatten(), denominator, contrast)
        if targets.ndim == hidden.ndim:
            return self._of_patches(hidden, targets, denominator)
        if per_token:
            losses = linear_cross_entropy(
                hidden,
                self.weight,
                targets,
                reduction="none",
                vocab_size=self.vocab_size,
                logits_bytes=self.logits_bytes,
                return_stats=correct,
                **self.parallel,
            )
            if teacher is not None:
                assert isinstance(losses, torch.Tensor)
                return TeacherLosses(losses, *self._divergence(hidden, targets, teacher))
            if isinstance(losses, torch.Tensor):
                return losses
            assert losses[1].correct is not None
            return TokenLosses(losses[0], losses[1].correct)
        total, stats = linear_cross_entropy(
            hidden,
            self.weight,
            targets,
            reduction="sum",
            entropy_weight=self.loss.entropy_weight,
            return_stats="loss",
            **self._terms,
            **self.parallel,
        )
        weight_sum = None
        if self.loss.entropy_weight is not None:
            assert stats.entropy is not None
            weight_sum = (entropy_weight(stats.entropy, *self.loss.entropy_weight) * (targets != IGNORE)).sum()
        return LossOutput(_mean(total, targets, denominator), stats.cross_entropy.sum(), weight_sum)

    def _divergence(
        self, hidden: torch.Tensor, targets: torch.Tensor, teacher: Teacher
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the compared targets: KL(teacher || model) and the teacher's entropy, fp32 [n]."""
        assert not self.parallel
        rows = (targets != IGNORE).flatten().nonzero().squeeze(1) if teacher.rows is None else teacher.rows
        kept = hidden.flatten(0, -2).index_select(0, rows)
        return linear_kl_divergence(
            kept,
            self.weight,
            kept if teacher.hidden is None else teacher.hidden,
            self.weight if teacher.weight is None else teacher.weight,
            targets=targets.flatten().index_select(0, rows),
            penalty=teacher.penalty,
            vocab_size=self.vocab_size,
            logits_bytes=self.logits_bytes or 64 << 20,
        )

    @property
    def _terms(self) -> dict[str, Any]:
        """What every loss is made with."""
        return {
            "z_loss": self.loss.z_loss,
            "label_smoothing": self.loss.label_smoothing,
            "vocab_size": self.vocab_size,
            "logits_bytes": self.logits_bytes,
        }

    def _corrected(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        denominator: float | torch.Tensor | None,
        contrast: Contrast,
    ) -> LossOutput:
        """hidden [n, D], targets and contrast.mask [n]. Two heads add up to one over concatenated hidden states."""
        assert not self.parallel
        mask = contrast.mask.flatten()
        options: dict[str, Any] = {"reduction": "sum", "return_stats": "loss", **self._terms}
        total, stats = linear_cross_entropy(hidden, self.weight, targets.masked_fill(mask, IGNORE), **options)
        nats = stats.cross_entropy.sum()
        if len(contrast.hidden):
            # As nonzero(), whose host would wait for the device although the number is known.
            rows = mask.to(torch.int8).argsort(descending=True, stable=True)[: len(contrast.hidden)]
            both = torch.cat((hidden.index_select(0, rows), contrast.hidden), dim=1)
            heads = torch.cat((self.weight[: self.vocab_size], contrast.weight[: self.vocab_size]), dim=1)
            corrected, stats = linear_cross_entropy(both, heads, targets.index_select(0, rows), **options)
            total, nats = total + corrected, nats + stats.cross_entropy.sum()
        return LossOutput(_mean(total, targets, denominator), nats)

    def _of_patches(
        self, hidden: torch.Tensor, targets: torch.Tensor, denominator: float | torch.Tensor | None
    ) -> LossOutput:
        """hidden [..., D] of patches, targets [..., K] of the tokens in the next ones."""
        assert not self.parallel
        total, cross_entropy, weight_sum = patch_cross_entropy(
            hidden,
            self.weight,
            targets,
            entropy_weight=self.loss.entropy_weight,
            **self._terms,
        )
        return LossOutput(_mean(total, targets, denominator), cross_entropy, weight_sum)


def _mean(total: torch.Tensor, targets: torch.Tensor, denominator: float | torch.Tensor | None) -> torch.Tensor:
    """A sum over the kept targets / denominator, by default their number."""
    return total / ((targets != IGNORE).sum().clamp(min=1) if denominator is None else denominator)
