"""Self-contrastive training (Guan and Huang, arXiv 2307.01542): a model learns to make up for the repetitions that an
earlier checkpoint of itself, the premature model, wrongly predicts.

The loss of a token is the cross-entropy of softmax(z1 + strength * w * z0), with the logits z1 of the model and z0 of
the frozen premature one. w is 1 where the premature model's first choice is among the last tokens and the true token is
not, and 0 elsewhere. The model is used alone afterwards.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from megafish.config import ContrastConfig
from megafish.data.corpus import run_tokenizer
from megafish.data.loader import IGNORE, Batch
from megafish.data.tokenizer import Tokenizer
from megafish.errors import InputError
from megafish.model.head import Contrast
from megafish.model.load import MANIFEST, checkpoint_of, initial_weights
from megafish.model.mesh import Mesh
from megafish.model.transformer import Transformer
from megafish.run import sha256_file

# Bytes that the premature model's logits may take at one time.
_LOGITS = 64 << 20
# Inputs before a place that are looked at together.
_COMPARED = 64


def seen_recently(ids: torch.Tensor, tokens: torch.Tensor, begins: torch.Tensor, context: int) -> torch.Tensor:
    """Which of the ids [b, S] are among the last `context` inputs of the same document, the one in their own place too.

    tokens: inputs, int64 [b, S]. begins: place in its row where the document of each input begins, int64 [b, S].
    """
    length = tokens.shape[1]
    back = torch.arange(min(context, length), device=tokens.device).flip(0)
    # The last inputs of every place [b, S, context] are a view; what comes of comparing them is not, hence in parts.
    recent = F.pad(tokens, (len(back) - 1, 0)).unfold(1, len(back), 1)
    place = torch.arange(length, device=tokens.device)[:, None]
    seen = torch.zeros_like(tokens, dtype=torch.bool)
    for some, far in zip(recent.split(_COMPARED, dim=-1), back.split(_COMPARED), strict=True):
        seen |= ((ids[..., None] == some) & (place - far >= begins[..., None])).any(dim=-1)
    return seen


class Premature:
    """The frozen model of a run, and where its wrong repetitions are to be corrected.

    sharded: its blocks are spread over the processes that share a copy of the trained model's state, as ZeRO-3 does
    it. Otherwise every process has all of it. Making one is collective, and so is every call.
    """

    def __init__(
        self,
        config: ContrastConfig,
        tokenizer: Tokenizer,
        mesh: Mesh,
        device: torch.device,
        dtype: torch.dtype,
        *,
        sharded: bool,
    ) -> None:
        assert config.premature is not None
        run, folder = checkpoint_of(config.premature)
        its = run.load_config()
        if run_tokenizer(its.data).sha256 != tokenizer.sha256:
            raise InputError(
                f"contrast.premature={config.premature}: its tokenizer is another than this run's: the two models must "
                "predict the same tokens"
            )
        self.context, self.strength = config.context, config.strength
        self.device, self.mesh = device, mesh
        self.folder: Path = folder
        self.model_config = its.model
        self.digest = sha256_file(folder / MANIFEST)
        stored = initial_weights(folder, its.model, tokenizer.vocab_size)
        with torch.device("meta"):
            model = Transformer(its.model, tokenizer.vocab_size, mesh=mesh)
        group = mesh.replicas.group or torch.distributed.group.WORLD if sharded and mesh.replicas.size > 1 else None
        devices = None if group is None else DeviceMesh.from_group(group, device.type)
        # Block after block, so that no process holds more than one of a sharded model.
        for prefix, part in [*((f"blocks.{n}.", block) for n, block in enumerate(model.blocks)), ("", model)]:
            state = {
                name: stored(prefix + name).to(device, dtype)
                for name, parameter in part.named_parameters()
                if parameter.is_meta
            }
            part.load_state_dict(state, assign=True, strict=False)
            part.requires_grad_(False)
            if devices is not None and part is not model:
                # Said, not left to torch: each block is a root of its own, and a root stays whole after a forward pass.
                fully_shard(part, mesh=devices, reshard_after_forward=True)
        model.tie()
        self.model = model.eval()

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Contrast:
        """The tokens of this process's part of the batch that are to be corrected, and by what."""
        begins = batch.begins
        # Where the true token is a repetition, the premature model's choice does not matter. Known before the device
        # has anything to do with it.
        right = seen_recently(batch.targets, batch.tokens, begins, self.context)
        open_rows = self._own((batch.targets != IGNORE) & ~batch.drop & ~right)
        rows = open_rows.flatten().nonzero().squeeze(1).to(self.device)
        tokens = batch.tokens.to(self.device)
        # All processes make the call, also one that has no such row.
        asked = rows if len(rows) else rows.new_zeros(1)
        hidden = self.model.hidden_rows(
            self._own(tokens), asked, cu_seqlens=batch.cu_seqlens.to(self.device), max_seqlen=batch.max_seqlen
        )[: len(rows)]
        choice = torch.full_like(tokens, IGNORE)
        self._own(choice).masked_scatter_(open_rows.to(self.device), self._first_choice(hidden))
        wrong = self._own(seen_recently(choice, tokens, begins.to(self.device), self.context))
        # How many there are decides the size of what is computed: the one number that the host waits for.
        return Contrast(wrong, hidden[wrong.flatten()[rows]] * self.strength, self.model.head.weight)

    def _own(self, x: torch.Tensor) -> torch.Tensor:
        """This process's part of each row, [b, S] -> [b, S / P]: a view."""
        sequence = self.mesh.sequence
        length = x.shape[1] // sequence.size
        return x.narrow(1, sequence.rank * length, length)

    def _first_choice(self, hidden: torch.Tensor) -> torch.Tensor:
        """Token with the highest logit for each hidden state: [n, D] -> int64 [n]."""
        weight = self.model.head.weight[: self.model.vocab_size]
        rows = max(1, _LOGITS // (len(weight) * weight.element_size()))
        return torch.cat([F.linear(part, weight).argmax(dim=1) for part in hidden.split(rows)] or [hidden.new_empty(0)])
