"""The model against transformers' own Llama, Mistral, Qwen2 and Qwen3, and its promises on documents, loss and
cache."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from megafish.config import LossConfig, ModelConfig, RopeScaling
from megafish.errors import InputError
from megafish.model.head import LossOutput, Teacher
from megafish.model.transformer import KVCache, Transformer
from tests.model.hf_weights import from_hf

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
        scale = float(expected.detach().abs().max())
        torch.testing.assert_close(
            got.grad, expected.data, rtol=1e-4, atol=2e-5 * scale, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_another_document_is_never_seen() -> None:
    """Changing a token changes no logit of another document, in any attention that a CPU can take."""
    ids = tokens(2, 40)
    cu_seqlens = torch.tensor([0, 7, 8, 29, 40, 80], dtype=torch.int32)
    document = torch.tensor([0] * 7 + [1] + [2] * 21 + [3] * 11 + [4] * 40).view(2, 40)
    for changes in ({}, {"sliding_window": 5}):
        model = tiny(**changes)
        with torch.no_grad():
            before = model(ids, cu_seqlens=cu_seqlens, max_seqlen=40)
            for row, place in ((0, 3), (0, 7), (0, 15), (0, 39), (1, 0)):
                changed = ids.clone()
                changed[row, place] = (changed[row, place] + 1) % 90
                after = model(changed, cu_seqlens=cu_seqlens, max_seqlen=40)
                differs = (after != before).any(-1)
                same_document = document == document[row, place]
                assert not differs[~same_document].any()
                later = torch.arange(40)[None] >= place
                assert differs[row, place], "the changed token itself must show"
                assert not differs[row][~later[0]].any(), "a token sees the past alone"


def test_packed_equals_separate() -> None:
    model = tiny()
    ids = tokens(1, 60)
    cu_seqlens = torch.tensor([0, 11, 13, 45, 60], dtype=torch.int32)
    with torch.no_grad():
        packed = model(ids, cu_seqlens=cu_seqlens)
        parts = [model(ids[:, a:b]) for a, b in pairwise(cu_seqlens.tolist())]
    torch.testing.assert_close(packed, torch.cat(parts, 1), rtol=1e-5, atol=1e-4)


def reference_loss(model: Transformer, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = model(ids)
    assert isinstance(logits, torch.Tensor)
    return F.cross_entropy(
        logits[..., : model.vocab_size].flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
    )


def test_dropped_tokens_equal_a_loss_without_them() -> None:
    """The loss and every gradient equal those of masked cross-entropy over full logits."""
    ids = tokens(2, 30)
    targets = torch.cat((ids[:, 1:], torch.full((2, 1), -100)), 1)
    drop = (torch.rand(2, 30, generator=torch.Generator().manual_seed(5)) < 0.3) & (targets != -100)
    kept = targets.masked_fill(drop, -100)
    model = tiny()
    want = reference_loss(model, ids, kept) / 37.0
    want.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(expected) == len(list(model.parameters()))
    for checkpointed in (False, True):
        model.zero_grad()
        model.activation_checkpointing = checkpointed
        out = model(ids, targets=targets, drop=drop, denominator=torch.tensor(37.0))
        assert isinstance(out, LossOutput)
        out.loss.backward()
        torch.testing.assert_close(out.loss, want, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(out.ce_sum, want.detach() * 37, rtol=1e-6, atol=1e-4)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_nothing_kept_gives_zero_loss_and_zero_gradients() -> None:
    model = tiny()
    out = model(tokens(1, 12), targets=torch.full((1, 12), -100))
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert out.ce_sum.item() == 0.0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_loss_terms_do_not_enter_the_plain_sum() -> None:
    ids = tokens(2, 20)
    targets = ids.roll(-1, 1)
    plain = tiny()(ids, targets=targets)
    terms = tiny(loss=LossConfig(z_loss=0.1, label_smoothing=0.1))(ids, targets=targets)
    torch.testing.assert_close(terms.ce_sum, plain.ce_sum)
    assert abs(terms.loss.item() - plain.loss.item()) > 0.01


def test_per_token_ignores_the_drop_and_the_padding() -> None:
    model = tiny()
    ids = tokens(2, 20)
    targets = torch.cat((ids[:, 1:], torch.full((2, 1), -100)), 1)
    drop = torch.ones(2, 20, dtype=torch.bool)
    with torch.no_grad():
        got = model(ids, targets=targets, drop=drop, per_token=True)
        want = F.cross_entropy(model(ids)[..., :90].transpose(1, 2), targets, ignore_index=-100, reduction="none")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"last_only": True, "targets": 1},
        {"per_token": True, "targets": 1, "denominator": 3.0},
        {"per_token": True},
        {"denominator": 3.0},
        {"drop": 1},
    ],
)
def test_arguments_without_an_effect_are_refused(arguments: dict[str, Any]) -> None:
    ids = tokens(1, 5)
    stand_for = {"targets": ids, "drop": torch.zeros(1, 5, dtype=torch.bool)}
    given = {name: stand_for.get(name, value) for name, value in arguments.items()}
    with pytest.raises(ValueError, match=r"targets|denominator"):
        tiny()(ids, **given)


def test_llama3_scaling_needs_a_range_to_interpolate_in() -> None:
    for low, high in ((4.0, 4.0), (5.0, 4.0)):
        with pytest.raises(ValueError, match=r"low_freq_factor=. is not below high_freq_factor=4"):
            RopeScaling(type="llama3", factor=8.0, low_freq_factor=low, high_freq_factor=high)
        RopeScaling(type="yarn", factor=8.0, low_freq_factor=low, high_freq_factor=high)


def test_weights_depend_on_seed_and_name_alone() -> None:
    first, second, other = tiny(), tiny(num_layers=3), Transformer(first_config(), 90, seed=4)
    stored = second.state_dict()
    for name, tensor in first.state_dict().items():
        if "out" not in name and "down" not in name:  # their std depends on the depth
            assert torch.equal(tensor, stored[name]), name
        if tensor.dim() > 1:
            assert not torch.equal(tensor, other.state_dict()[name]), name
    assert not torch.equal(stored["blocks.0.attention.qkv.weight"], stored["blocks.1.attention.qkv.weight"])
    assert not first.embedding.weight[90:].any()
    assert not first.head.weight[90:].any()


def first_config() -> ModelConfig:
    return tiny().config


def test_initial_std_is_scaled_with_depth() -> None:
    config = ModelConfig(num_layers=8, hidden_size=128, num_heads=4, intermediate_size=256)
    block = Transformer(config, 100).blocks[3]
    assert block.attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.03)
    for weight in (block.attention.out.weight, block.feed_forward.down.weight):
        assert weight.std().item() == pytest.approx(0.02 / 4, rel=0.03)


def test_tied_weights_are_one_parameter() -> None:
    model = tiny(tie_embeddings=True)
    assert model.head.weight is model.embedding.weight
    assert "head.weight" not in dict(model.named_parameters())


def test_vocabulary_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match=r"model\.vocab_size=64 is smaller"):
        tiny(vocab_size=64)


def test_cache_equals_the_whole_sequence() -> None:
    """Prefill of rows of unequal length, then token by token, gives the logits of a full pass."""
    for changes in ({}, {"sliding_window": 6}, {"qk_norm": True}):
        model = tiny(**changes)
        ids = tokens(2, 24)
        lengths = torch.tensor([9, 14])
        with torch.no_grad():
            full = model(ids)
            cache = KVCache(model.config, 2, 24, device=torch.device("cpu"), dtype=torch.float32)
            cache.expect(lengths)
            padded = ids[:, :14].clone()
            padded[0, 9:] = 77
            last = model(padded, cache=cache, last_only=True)
            for step in range(10):
                at = lengths + step
                want = full[torch.arange(2), at - 1]
                torch.testing.assert_close(last[:, 0], want, rtol=1e-5, atol=1e-4)
                last = model(ids.gather(1, at[:, None]), cache=cache, last_only=True)


def test_memory_of_a_cache_grows_with_its_rows() -> None:
    """By a quarter more than is needed, up to its capacity; what it holds stays."""
    model = tiny()
    ids = tokens(2, 40)
    with torch.no_grad():
        cache = KVCache(model.config, 2, 40, device=torch.device("cpu"), dtype=torch.float32)
        rooms, before = [], None
        for start, end in ((0, 20), *((place, place + 1) for place in range(20, 40))):
            model(ids[:, start:end], cache=cache)
            rooms.append(cache.keys.shape[3])
            assert before is None or torch.equal(cache.keys[:, :, :, :start], before)
            before = cache.keys[:, :, :, :end].clone()
        assert sorted(set(rooms)) == [25, 32, 40]
        rest = KVCache(model.config, 3, 40, device=torch.device("cpu"), dtype=torch.float32)
        cache.rewind(torch.tensor([7, 30]))
        rest.load(cache, torch.tensor([1, 0, 1]))
        assert rest.lengths.tolist() == [30, 7, 30] and rest.used == 30
        assert torch.equal(rest.values[:, 0, :, :30], cache.values[:, 1, :, :30])
        # Behind them stands what other texts have left; no token sees it.
        last = model(ids[[1, 0, 1], [30, 7, 30], None], cache=rest, last_only=True)[:, 0]
        for row, end in ((1, 31), (0, 8)):
            torch.testing.assert_close(last[1 - row], model(ids[row : row + 1, :end])[0, -1], rtol=1e-5, atol=1e-4)


def test_full_cache_is_refused() -> None:
    model = tiny()
    cache = KVCache(model.config, 1, 8, device=torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(ValueError, match="holds 8 tokens a row, 9 are needed"):
        model(tokens(1, 9), cache=cache)


def test_bf16_is_near_fp32() -> None:
    ids = tokens(2, 64)
    targets = ids.roll(-1, 1)
    wide, narrow = tiny(), tiny().to(torch.bfloat16)
    a, b = wide(ids, targets=targets), narrow(ids, targets=targets)
    assert b.loss.dtype == torch.float32
    torch.testing.assert_close(b.loss, a.loss, rtol=0.02, atol=0.0)
    b.loss.backward()
    a.loss.backward()
    for (name, x), (_, y) in zip(wide.named_parameters(), narrow.named_parameters(), strict=True):
        assert y.grad is not None and x.grad is not None, name
        assert F.cosine_similarity(x.grad.flatten(), y.grad.float().flatten(), dim=0) > 0.97, name


def test_bf16_rows_beside_the_kept_ones_change_nothing() -> None:
    """In bf16 the last block gets some dropped rows more, to make few row counts: they take no part in the loss."""
    config = ModelConfig(num_layers=2, hidden_size=64, num_heads=2, intermediate_size=96)
    model = Transformer(config, 128, seed=0).bfloat16()
    tokens = torch.randint(0, 128, (2, 75), generator=torch.Generator().manual_seed(0))
    drop = torch.rand(2, 75, generator=torch.Generator().manual_seed(1)) < 0.3
    losses = model(tokens, targets=tokens, per_token=True)
    out = model(tokens, targets=tokens, drop=drop)
    torch.testing.assert_close(out.ce_sum, losses[~drop].sum(), rtol=1e-3, atol=0)
    torch.testing.assert_close(out.loss, losses[~drop].mean(), rtol=1e-3, atol=0)


def test_mile_from_the_papers_formula() -> None:
    """Gradients of alpha (sigma + H)^gamma CE with alpha = 1 / the mean weight of the kept tokens, in float64."""
    sigma, gamma = 0.5, 2.0
    loss = LossConfig(mile_gamma=gamma, mile_sigma=sigma, z_loss=1e-2)
    model = tiny(loss=loss)
    ids = tokens(2, 30)
    targets = ids.roll(-1, 1)
    drop = torch.arange(60).view(2, 30) % 4 == 1
    out = model(ids, targets=targets, drop=drop)
    assert out.weight_sum is not None
    out.loss.backward()
    kept = int((~drop).sum())

    peer = tiny().double()
    logits = peer.norm(hidden_states(peer, ids)) @ peer.head.weight[:90].T
    log_p = logits.log_softmax(-1)
    weight = (sigma - (log_p.exp() * log_p).sum(-1).detach()) ** gamma
    alpha = 1 / weight[~drop].mean()
    token = -log_p.gather(-1, targets[..., None])[..., 0] + 1e-2 * logits.logsumexp(-1) ** 2
    want = (alpha * weight * token)[~drop].mean()
    want.backward()
    torch.testing.assert_close(out.weight_sum.double(), weight[~drop].sum(), rtol=1e-5, atol=0)
    scale = kept / out.weight_sum
    torch.testing.assert_close((out.loss * scale).double(), want, rtol=1e-5, atol=0)
    for (name, got), (_, wanted) in zip(model.named_parameters(), peer.named_parameters(), strict=True):
        assert got.grad is not None and wanted.grad is not None
        error = (got.grad * scale - wanted.grad).norm() / wanted.grad.norm()
        assert error < 1e-5, (name, float(error))


def hidden_states(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    """What the last block gives."""
    step = model._step((len(ids), ids.shape[1]), ids.device, None, None, None)
    x = model.embedding(ids)
    for block in model.blocks:
        x = block(x, step)
    return x


def test_patches_of_equal_tokens_are_tokens() -> None:
    """The mean of equal embeddings is the embedding: such a patch sees and predicts what one token would."""
    model = tiny()
    ids = tokens(2, 10)
    following = tokens(2, 40, seed=1)
    following[:, 7:10] = -100
    drop = torch.arange(80).view(2, 40) % 5 == 0
    out = model(ids.repeat_interleave(4, dim=1), targets=following, drop=drop, patch=4)
    kept = (following != -100) & ~drop
    log_p = model(ids)[..., :90].log_softmax(-1).repeat_interleave(4, dim=1)
    nats = -log_p.gather(-1, following.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(out.ce_sum, nats[kept].sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(out.loss, nats[kept].mean(), rtol=1e-5, atol=0)


def test_a_patch_is_the_mean_of_its_own_document() -> None:
    model = tiny()
    ids, targets = tokens(1, 16), tokens(1, 16, seed=1)
    ids[0, 4:6] = -1  # the end of another document
    table = model.embedding.weight
    want = torch.stack([table[ids[0, at : at + 4]].mean(0) for at in (0, 4, 8, 12)])
    want[1] = table[ids[0, 6:8]].mean(0)
    torch.testing.assert_close(model._patches(ids, 4)[0], want)
    cut = torch.tensor([0, 1, 4], dtype=torch.int32)
    whole = model(ids, targets=targets, patch=4, cu_seqlens=cut, max_seqlen=3).ce_sum
    apart = model(ids[:, :4], targets=targets[:, :4], patch=4).ce_sum
    apart = apart + model(ids[:, 4:], targets=targets[:, 4:], patch=4).ce_sum
    torch.testing.assert_close(whole, apart, rtol=1e-5, atol=0)


def test_patches_are_for_training() -> None:
    with pytest.raises(ValueError, match="patches are for training"):
        tiny()(tokens(1, 16), patch=4)


def test_hidden_states_on_the_way() -> None:
    model, ids = tiny(), tokens(2, 12)
    torch.testing.assert_close(model.head(model(ids, hidden_after=2)), model(ids), rtol=0, atol=0)
    one = model(ids, hidden_after=1)
    torch.testing.assert_close(
        model.norm(model.blocks[1](one, model._step((2, 12), ids.device, None, None, None))),
        model(ids, hidden_after=2),
        rtol=0,
        atol=0,
    )
    with pytest.raises(ValueError, match="blocks 1 to 2"):
        model(ids, hidden_after=3)


def test_a_teacher_is_compared_at_the_kept_targets() -> None:
    model, other, ids = tiny(), Transformer(tiny().config, 90, seed=4), tokens(2, 12)
    targets = tokens(2, 12, seed=2)
    targets[:, :5] = -100
    kept = targets != -100
    teacher = Teacher(other(ids, hidden_after=2)[kept].detach(), other.head.weight.detach())
    out = model(ids, targets=targets, per_token=True, teacher=teacher)
    log_p, log_q = (each(ids)[..., : each.vocab_size].log_softmax(-1)[kept] for each in (other, model))
    torch.testing.assert_close(out.divergence, (log_p.exp() * (log_p - log_q)).sum(-1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out.loss, model(ids, targets=targets, per_token=True), rtol=0, atol=0)
    own = model(ids, targets=targets, per_token=True, teacher=Teacher())
    assert own.divergence.abs().max() < 1e-6
