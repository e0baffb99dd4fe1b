"""An output projection that gives the loss as well, in the place of a model's `lm_head`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from megafish_kernels.loss import LossStats, linear_cross_entropy


class LinearCrossEntropyHead(nn.Linear):
    """An nn.Linear from hidden states to logits, and with targets to the loss, without the logits of all tokens.

    ZeRO-3 and FSDP hold a shard of each parameter, and gather the whole of it only around the forward (and the
    backward) of the module that owns it. A loss that takes `lm_head.weight` from outside meets the shard, so the loss
    is computed in here. Made by `from_linear`, or as an nn.Linear is; parameters, state dict, `isinstance` and
    generation are those of nn.Linear.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> LinearCrossEntropyHead:
        """A head with the very parameters of `linear`, tied ones included, to be put in its place.

        Before the model is wrapped by DDP, FSDP or DeepSpeed, whose hooks `linear` would keep.

        Raises:
            ValueError: `linear` is no nn.Linear.
        """
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
        # On the meta device no memory is taken for weights that are thrown away at once, and no random number drawn.
        head = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        head.weight, head.bias = linear.weight, linear.bias
        return head.train(linear.training)

    def forward(  # type: ignore[override]  # with targets and statistics it gives two things
        self, hidden: Tensor, targets: Tensor | None = None, **options: Any
    ) -> Tensor | tuple[Tensor, LossStats]:
        """Logits [..., V] of hidden states [..., D]; with targets [...], what `linear_cross_entropy` gives for them.

        Args:
            hidden: [..., D]; with targets in a dtype that `linear_cross_entropy` takes with the weight's.
            targets: integers [...], `ignore_index` (-100) where a token is left out.
            options: of `linear_cross_entropy`, all but the bias, which is this module's.

        Raises:
            ValueError: as `linear_cross_entropy`; or options without targets, which would have no effect.
        """
        if targets is not None:
            return linear_cross_entropy(hidden, self.weight, targets, bias=self.bias, **options)
        if options:
            raise ValueError(f"{', '.join(options)}: nothing for logits; give targets for a loss")
        return super().forward(hidden)
