"""Weights survive the disk; whatever does not fit is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megafish.config import Config
from megafish.data.tokenizer import load_tokenizer
from megafish.errors import InputError
from megafish.model.load import WEIGHTS, load_run, load_weights, save_weights
from megafish.model.transformer import Transformer
from megafish.run import RunDir


def run_config(corpus: Path, tie: bool = False) -> Config:
    return Config.model_validate(
        {
            "name": "r",
            "model": {
                "num_layers": 2,
                "hidden_size": 32,
                "num_heads": 2,
                "intermediate_size": 48,
                "tie_embeddings": tie,
            },
            "data": {"train": str(corpus)},
            "train": {"steps": 1},
        }
    )


def make_run(corpus: Path, path: Path, tie: bool = False) -> tuple[RunDir, Transformer]:
    config = run_config(corpus, tie)
    run = RunDir(path)
    run.save_config(config)
    vocab_size = load_tokenizer(corpus / "tokenizer.model").vocab_size
    model = Transformer(config.model, vocab_size, seed=9)
    for step in (3, 7):
        folder = run.checkpoint(step)
        save_weights(model, folder)
        (folder / "state.json").write_text(json.dumps({"step": step}))
    run.latest_file.write_text(run.checkpoint(7).name)
    return run, model


@pytest.mark.parametrize("tie", [False, True])
def test_run_is_loaded_from_its_directory_or_a_checkpoint(corpus: Path, tmp_path: Path, tie: bool) -> None:
    run, model = make_run(corpus, tmp_path / "r", tie)
    loaded = load_run(run.path, device="cpu")
    assert loaded.step == 7
    assert load_run(run.path, step=3, device="cpu").step == 3
    assert load_run(run.checkpoint(3), device="cpu").step == 3
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded.model(ids), model(ids))
    assert (loaded.model.head.weight is loaded.model.embedding.weight) == tie
    assert ("head.weight" in load_file(run.checkpoint(7) / WEIGHTS)) != tie


def test_dtype_and_values_are_kept(corpus: Path, tmp_path: Path) -> None:
    config = run_config(corpus)
    model = Transformer(config.model, 90, seed=1).to(torch.bfloat16)
    save_weights(model.state_dict(), tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {torch.bfloat16}
    other = Transformer(config.model, 90, seed=2).to(torch.bfloat16)
    load_weights(other, tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]


def test_what_does_not_fit_is_refused(corpus: Path, tmp_path: Path) -> None:
    config = run_config(corpus)
    model = Transformer(config.model, 90)
    save_weights(model, tmp_path)
    stored = load_file(tmp_path / WEIGHTS)

    def refused(tensors: dict[str, torch.Tensor], pattern: str) -> None:
        save_file(tensors, tmp_path / WEIGHTS)
        with pytest.raises(InputError, match=pattern):
            load_weights(model, tmp_path)

    refused({k: v for k, v in stored.items() if k != "norm.weight"}, r"1 tensors missing \(norm\.weight first\)")
    refused({**stored, "extra": torch.zeros(1)}, r"1 tensors not of this model \(extra first\)")
    refused({**stored, "norm.weight": torch.zeros(31)}, r"norm\.weight has shape \[31\], the model needs \[32\]")
    (tmp_path / WEIGHTS).write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="damaged"):
        load_weights(model, tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(InputError, match="missing"):
        load_weights(model, tmp_path)


def test_missing_runs_and_steps_are_refused(corpus: Path, tmp_path: Path) -> None:
    run, _ = make_run(corpus, tmp_path / "r")
    with pytest.raises(InputError, match="not a run directory"):
        load_run(tmp_path / "none")
    with pytest.raises(InputError, match=r"no checkpoint of step 5: there are \[3, 7\]"):
        load_run(run.path, step=5)
    with pytest.raises(InputError, match="step 5 is asked for"):
        load_run(run.checkpoint(3), step=5)
    (run.checkpoint(7) / "state.json").write_text("{}")
    with pytest.raises(InputError, match="holds no step"):
        load_run(run.path)
