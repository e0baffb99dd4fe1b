"""A run of random weights, without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from megafish.config import Config
from megafish.data.corpus import run_tokenizer
from megafish.model.load import save_weights
from megafish.model.transformer import Transformer
from megafish.run import RunDir

SHAPE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 48,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 80,
}


def random_run(folder: Path, model: dict[str, Any], *, dtype: torch.dtype = torch.float32, **data: Any) -> RunDir:
    """A run directory whose weights, biases and norms are all random; `data`: its section of the configuration."""
    config = Config.model_validate(
        {
            "name": "r",
            "model": {**SHAPE, **model},
            "data": {"sequence_length": 64, **data},
            "train": {"steps": 1},
        }
    )
    run = RunDir(folder)
    run.save_config(config)
    vocab_size = run_tokenizer(config.data).vocab_size
    made = Transformer(config.model, vocab_size, seed=9)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(noise + (1.0 if name.endswith("norm.weight") else 0.0))
            if name in ("embedding.weight", "head.weight"):
                parameter[vocab_size:] = 0.0
    checkpoint = run.checkpoint(3)
    save_weights(made.to(dtype), checkpoint)
    (checkpoint / "state.json").write_text(json.dumps({"step": 3}))
    run.latest_file.write_text(checkpoint.name)
    return run
