"""What a step of megafish's own model must give on any device, beside fp32 on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megafish.audit.continuation import score_and_continue
from megafish.config import ModelConfig
from megafish.decode.beam import beam_search
from megafish.decode.generate import generate
from megafish.decode.stepping import Stepper
from megafish.model.head import LossOutput
from megafish.model.transformer import Transformer
from megafish_kernels import goldfish_drop
from tests.gpu.checks import relative


def trained(
    device: torch.device, dtype: torch.dtype, packed: bool, window: int | None, tied: bool, steps: int = 4
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of a few steps of AdamW on one batch, and the first step's gradients by name, in fp32 on the CPU."""
    config = ModelConfig(
        num_layers=2,
        hidden_size=64,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=96,
        tie_embeddings=tied,
        sliding_window=window,
    )
    model = Transformer(config, 250, seed=1).to(device, dtype)
    model.tie()
    g = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 250, (2, 65), generator=g)
    drop = goldfish_drop(tokens, k=4, h=3)[:, 1:]
    tokens, targets, drop = (x.to(device) for x in (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), drop))
    documents: dict[str, Any] = {}
    if packed:
        documents = {"cu_seqlens": torch.tensor([0, 10, 64, 100, 101, 128], dtype=torch.int32, device=device)}
        documents["max_seqlen"] = 54
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses, first = [], {}
    for step in range(steps):
        output = model(tokens, targets=targets, drop=drop, **documents)
        assert isinstance(output, LossOutput)
        output.loss.backward()
        if not step:
            first = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
        losses.append(float(output.loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses, first


def check_model(device: torch.device, dtype: torch.dtype, packed: bool, window: int | None, tied: bool) -> None:
    """megafish's own model takes the same steps as on a CPU in fp32, as far as the dtype goes."""
    wanted, wanted_gradients = trained(torch.device("cpu"), torch.float32, packed, window, tied)
    losses, gradients = trained(device, dtype, packed, window, tied)
    assert losses[-1] < losses[0] - 0.3, "the model does not learn"
    # The first loss has the dtype's roundings alone; in AdamW's first steps the sign of a gradient is all that counts,
    # so that later ones drift.
    for step, (loss, want) in enumerate(zip(losses, wanted, strict=True)):
        assert abs(loss - want) < (2e-3 if step == 0 else 2e-2) * want, (losses, wanted)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        error = relative(gradient, wanted_gradients[name])
        assert error < 3e-2, f"gradient of {name}: {error:.2e}"


def check_decoding(device: torch.device, dtype: torch.dtype) -> None:
    """Decoding gives the logits of a forward pass over the whole text: greedy and drawn, with rows that end at
    different places, several batches, beams."""
    shape = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 96}
    config = ModelConfig(**shape, sliding_window=40, init_std=0.3)
    model = Transformer(config, 90, seed=1).to(device, dtype)
    prompts = [[1, 2, 3], [5] * 9, [7, 8], [4] * 20, [11], [3] * 70, [9] * 4]
    stepper = Stepper(model)
    with torch.inference_mode():
        for batch in (prompts[:3], prompts[3:6], prompts[4:]):
            texts = [list(prompt) for prompt in batch]
            logits = stepper.begin(batch, 12)
            for count in range(12):
                for text, row in zip(texts, logits[:, 0, :90].float(), strict=True):
                    whole = model(torch.tensor([text], device=device), last_only=True)
                    assert isinstance(whole, Tensor)
                    assert relative(row, whole[0, 0, :90].float()) < (1e-4 if dtype == torch.float32 else 5e-2)
                if count == 5:
                    kept = [2, 0]
                    stepper.select(torch.tensor(kept, device=device))
                    logits, texts = logits[kept], [texts[row] for row in kept]
                chosen = logits[:, 0, :90].argmax(-1)
                for text, token in zip(texts, chosen.tolist(), strict=True):
                    text.append(token)
                logits = stepper.step(chosen)
    if dtype != torch.float32:
        return  # what is chosen depends on roundings
    cpu = Transformer(config, 90, seed=1)
    ways: list[dict[str, Any]] = [
        {"max_new_tokens": [1, 15, 9, 2, 3, 4, 15], "batch_size": 7},
        {"max_new_tokens": 12, "batch_size": 2, "temperature": 1.3, "top_k": 30, "top_p": 0.95, "seed": 4},
    ]
    for way in ways:
        assert generate(model, None, prompts, **way) == generate(cpu, None, prompts, **way)
    written = generate(cpu, None, prompts, max_new_tokens=9)
    suffixes = [[*text[:i], *text[: 9 - i]] for i, text in enumerate(written)]  # left after i tokens or more
    assert score_and_continue(model, None, prompts, suffixes, batch_size=3)[1] == written
    beams = [beam_search(each, None, prompts, beams=5, max_new_tokens=8, batch_size=3) for each in (model, cpu)]
    assert [[beam.tokens for beam in found] for found in beams[0]] == [
        [beam.tokens for beam in found] for found in beams[1]
    ]
