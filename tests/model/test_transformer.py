"""The model against transformers' own Llama, Mistral, Qwen2 and Qwen3, and its promises on documents, loss and cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from megafish.config import LossConfig, ModelConfig, RopeScaling
from megafish.errors import InputError
from megafish.model.transformer import KVCache, LossOutput, Transformer
from tests.model.peers import from_hf

transformers = pytest.importorskip("transformers")

SHAPE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 48,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 80,
}
HF_SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "attn_implementation": "eager",
    "use_cache": False,
}


def tiny(**changes: Any) -> Transformer:
    loss = changes.pop("loss", LossConfig())
    config = ModelConfig(**{**SHAPE, "init_std": 0.2, **changes})
    return Transformer(config, 90, loss=loss, seed=3)


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 90, (batch, length), generator=torch.Generator().manual_seed(seed))


PEERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("Llama", {}, {}),
    "llama-tied-biased": (
        "Llama",
        {"tie_word_embeddings": True, "mlp_bias": True, "head_dim": 16},
        {"tie_embeddings": True, "mlp_bias": True, "head_dim": 16},
    ),
    "llama-linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
        {"rope_theta": 500.0, "rope_scaling": RopeScaling(type="linear", factor=4.0)},
    ),
    "llama-llama3": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        {"rope_scaling": RopeScaling(type="llama3", factor=8.0, original_max_position=32)},
    ),
    "llama-yarn": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        {"rope_scaling": RopeScaling(type="yarn", factor=4.0, original_max_position=64)},
    ),
    "mistral": ("Mistral", {"sliding_window": 7}, {"sliding_window": 7}),
    "qwen2": ("Qwen2", {}, {"qkv_bias": True, "norm_eps": 1e-6}),
    "qwen3": ("Qwen3", {"head_dim": 16}, {"qk_norm": True, "head_dim": 16, "norm_eps": 1e-6}),
}


def build_pair(name: str) -> tuple[Transformer, Any]:
    family, hf_changes, changes = PEERS[name]
    torch.manual_seed(1)
    options = {"rms_norm_eps": changes.get("norm_eps", 1e-5), **HF_SHAPE, **hf_changes}
    peer = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**options)).eval()
    with torch.no_grad():
        for parameter in peer.parameters():  # the default init leaves biases 0 and norms 1, which would hide mistakes
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if parameter.dim() == 1 else 0.0))
    model = Transformer(ModelConfig(**{**SHAPE, "vocab_size": 96, **changes}), 96)
    from_hf(model, peer.state_dict())
    return model, peer


@pytest.mark.parametrize("name", list(PEERS))
def test_logits_equal_the_peers(name: str) -> None:
    model, peer = build_pair(name)
    ids = tokens(2, 40)
    with torch.no_grad():
        want, got = peer(input_ids=ids).logits, model(ids)
    assert want.abs().max() > 1.0
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_gradients_equal_the_peers(name: str) -> None:
    model, peer = build_pair(name)
    ids = tokens(2, 24)
    targets = torch.cat((ids[:, 1:], torch.full((2, 1), -100)), dim=1)
    out = model(ids, targets=targets)
    out.loss.backward()
    logits = peer(input_ids=ids).logits
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    want.backward()
    torch.testing.assert_close(out.loss, want, rtol=1e-5, atol=1e-5)
    reference = Transformer(model.config, 96)
    from_hf(reference, {key: value.grad for key, value in peer.named_parameters()})
    for (key, got), (_, expected) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(got.grad, expected.data, rtol=1e-4, atol=2e-5 * scale, msg=lambda m, k=key: f"{k}: {m}")
