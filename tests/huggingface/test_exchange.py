"""Out to transformers and back: the same logits there, the same bits here; what cannot be done is said in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megafish.data.tokenizer import load_tokenizer
from megafish.errors import InputError
from megafish.huggingface.export import export
from megafish.huggingface.importer import import_model
from megafish.model.load import load_run
from megafish.run import read_json
from megafish.train.checkpoint import verify_checkpoint
from tests.huggingface.helpers import random_run

transformers = pytest.importorskip("transformers")

# The presets' shapes in small, and every option that Hugging Face has a model for.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny and 7b": ("Llama", {"num_kv_heads": None}),
    "125m and 350m, tied": ("Llama", {"num_kv_heads": None, "tie_embeddings": True}),
    "1b, grouped queries": ("Llama", {"num_kv_heads": 1}),
    "8b, llama3 frequencies": (
        "Llama",
        {
            "rope_theta": 500000.0,
            "rope_scaling": {"type": "llama3", "factor": 8.0, "original_max_position": 32},
        },
    ),
    "linear frequencies": ("Llama", {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 4.0}}),
    "yarn": ("Llama", {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position": 64}}),
    "biased feed-forward": ("Llama", {"mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 9, "head_dim": 16}),
    "qwen2": ("Qwen2", {"qkv_bias": True, "tie_embeddings": True}),
    "qwen2 with a window": ("Qwen2", {"qkv_bias": True, "sliding_window": 9}),
    "qwen3": ("Qwen3", {"qk_norm": True, "head_dim": 16, "norm_eps": 1e-6}),
    "qwen3 with a window": ("Qwen3", {"qk_norm": True, "sliding_window": 9, "vocab_size": 640}),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_in_transformers_and_the_way_back(name: str, corpus: Path, tmp_path: Path) -> None:
    architecture, model = MODELS[name]
    run = random_run(tmp_path / "run", model, train=str(corpus))
    done = export(run.path, tmp_path / "hf", progress=False)
    assert done.architecture == f"{architecture}ForCausalLM" and done.tokenizer.note is None
    ours = load_run(run.path, device="cpu")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert type(peer).__name__ == done.architecture
    vocab_size = ours.tokenizer.vocab_size
    ids = torch.randint(0, vocab_size, (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want, got = ours.model(ids)[..., :vocab_size], peer(input_ids=ids).logits
    assert want.abs().max() > 1.0
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))

    back = import_model(tmp_path / "hf", tmp_path / "back", progress=False).run
    verify_checkpoint(back.checkpoint(0))
    # The vocabulary's size is that of the tokenizer again, and rows of padding are zero: here they were as well.
    found = load_file(back.checkpoint(0) / "model.safetensors")
    stored = load_file(run.checkpoint(3) / "model.safetensors")
    assert found.keys() == stored.keys()
    for key, tensor in stored.items():
        same = tensor[: len(found[key])]
        assert torch.equal(found[key], same) and not tensor[len(same) :].any(), key
    again = load_run(back.path, device="cpu")
    with torch.no_grad():
        assert torch.equal(again.model(ids)[..., :vocab_size], ours.model(ids)[..., :vocab_size])
    export(back.path, tmp_path / "hf2", progress=False)
    for file in sorted((tmp_path / "hf").glob("*.json")):
        first, second = (read_json(folder / file.name) for folder in (tmp_path / "hf", tmp_path / "hf2"))
        if file.name == "config.json":
            # How it was initialized is no part of a model that is there.
            first, second = ({k: v for k, v in s.items() if k != "initializer_range"} for s in (first, second))
        assert first == second, file.name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parts_and_dtypes(dtype: torch.dtype, corpus: Path, tmp_path: Path) -> None:
    run = random_run(tmp_path / "run", {}, train=str(corpus))
    done = export(run.path, tmp_path / "hf", dtype=dtype, shard_bytes=20_000, progress=False)
    index = read_json(tmp_path / "hf" / "model.safetensors.index.json")
    assert done.files == len(set(index["weight_map"].values())) > 3
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert peer.dtype == dtype
    stored = load_file(run.checkpoint(3) / "model.safetensors")
    assert torch.equal(peer.lm_head.weight.detach(), stored["head.weight"][: peer.config.vocab_size].to(dtype))
    back = import_model(tmp_path / "hf", tmp_path / "back", shard_bytes=20_000, progress=False).run
    loaded = load_run(back.path, device="cpu")
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, stored[name].to(dtype)), name


def test_a_model_that_transformers_wrote(corpus: Path, tmp_path: Path) -> None:
    """Its own config.json (whichever form this version writes), an embedding with rows that no token has."""
    vocab_size = load_tokenizer(corpus / "tokenizer.model").vocab_size
    config = transformers.Qwen2Config(
        vocab_size=vocab_size + 13,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_theta=5000.0,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    peer = transformers.Qwen2ForCausalLM(config).eval()
    peer.save_pretrained(tmp_path / "hf")
    shutil.copy(corpus / "tokenizer.model", tmp_path / "hf")
    done = import_model(tmp_path / "hf", tmp_path / "run", progress=False)
    assert done.model_type == "qwen2" and done.padding == 13
    loaded = load_run(tmp_path / "run", device="cpu")
    assert loaded.model.padded_vocab_size == vocab_size + 13
    ids = torch.arange(40)[None]
    with torch.no_grad():
        want = peer(input_ids=ids).logits
        torch.testing.assert_close(loaded.model(ids), want, rtol=1e-5, atol=1e-5)


def broken(folder: Path, change: str) -> None:
    """Break an exported folder in one way."""
    config = read_json(folder / "config.json")
    weights = folder / "model.safetensors"
    if change == "architecture":
        config |= {"model_type": "gpt2"}
    elif change == "bias":
        config |= {"attention_bias": True}
    elif change == "rope":
        config |= {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}
    elif change == "layers":
        config |= {"num_hidden_layers": 3}
    elif change == "width":
        config |= {"intermediate_size": 96}
    elif change == "size":
        del config["hidden_size"]
    elif change == "rows":
        config |= {"vocab_size": 100}
    elif change == "extra":
        save_file({**load_file(weights), "model.layers.0.self_attn.q_proj.bias": torch.zeros(48)}, weights)
    elif change == "no weights":
        weights.rename(folder / "pytorch_model.bin")
    elif change == "cut":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif change == "tokenizer":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.model").unlink()
    elif change == "config":
        (folder / "config.json").write_text("{")
        return
    elif change == "part":
        shutil.rmtree(folder)
        return
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("architecture", "model_type='gpt2' is not supported: there are llama, mistral, qwen2, qwen3"),
        ("bias", "attention_bias=True is not supported"),
        ("rope", "rope_type='longrope' is not supported"),
        ("layers", "no tensor model.layers.2.input_layernorm.weight"),
        ("width", "has shape [80, 48], config.json makes it [96, 48]"),
        ("size", "hidden_size=None: expected a whole number"),
        ("rows", "the tokenizer has 512 ids and the embedding 100 rows"),
        ("extra", "tensor model.layers.0.self_attn.q_proj.bias has no place"),
        ("no weights", "model.safetensors: missing: only safetensors are read"),
        ("cut", "the file is damaged"),
        ("tokenizer", "neither tokenizer.json nor tokenizer.model"),
        ("config", "not valid JSON"),
        ("part", "no such folder"),
    ],
)
def test_what_cannot_be_imported_is_named(change: str, said: str, corpus: Path, tmp_path: Path) -> None:
    run = random_run(tmp_path / "run", {}, train=str(corpus))
    export(run.path, tmp_path / "hf", progress=False)
    broken(tmp_path / "hf", change)
    with pytest.raises(InputError) as caught:
        import_model(tmp_path / "hf", tmp_path / "back", progress=False)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "back").exists() and not (tmp_path / "back.partial").exists()


def test_a_missing_part_is_named(corpus: Path, tmp_path: Path) -> None:
    run = random_run(tmp_path / "run", {}, train=str(corpus))
    export(run.path, tmp_path / "hf", shard_bytes=20_000, progress=False)
    gone = sorted((tmp_path / "hf").glob("model-*.safetensors"))[2]
    gone.unlink()
    with pytest.raises(InputError, match=f"{gone.name}: missing"):
        import_model(tmp_path / "hf", tmp_path / "back", progress=False)


def test_what_cannot_be_exported_is_named(corpus: Path, tmp_path: Path) -> None:
    run = random_run(tmp_path / "run", {"qk_norm": True, "qkv_bias": True}, train=str(corpus))
    with pytest.raises(InputError, match=r"model.qk_norm=true with model.qkv_bias=true: Hugging Face has no such"):
        export(run.path, tmp_path / "hf", progress=False)
    run = random_run(tmp_path / "other", {}, train=str(corpus))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match="not an empty folder"):
        export(run.path, tmp_path / "full", progress=False)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]
