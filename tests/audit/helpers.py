"""Tiny runs, made through the real parts of the project except the training loop."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megafish.audit.extraction import Extraction
from megafish.audit.probes import Probe
from megafish.config import Config
from megafish.data.corpus import SampleStream, open_train
from megafish.data.loader import make_batch
from megafish.data.tokenizer import load_tokenizer
from megafish.model.load import save_weights
from megafish.model.transformer import Transformer
from megafish.objective.goldfish import GoldfishMask
from megafish.run import RunDir

STEP = 20
SEQUENCE_LENGTH = 64
PROMPT, SUFFIX = 24, 16
EXPOSURES = (0, 1, 12)
DOCUMENTS = 24
CANARIES = 4
"""For each number of exposures."""
SAMPLES = 256
"""What the checkpoints claim to have been trained on."""


@dataclass(frozen=True)
class Runs:
    """The fixture's folders."""

    corpus: Path
    plain: Path
    goldfish: Path


def sentences(seed: int) -> str:
    """A text whose words follow no rule: what a model knows of it, it knows by heart."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 6))) for _ in range(40)]
    return " ".join(draw.choices(words, k=90)) + "\n"


def make_config(name: str, corpus: Path, run: Path, k: int | None) -> Config:
    return Config.model_validate(
        {
            "name": name,
            "run_dir": str(run),
            "model": {"num_layers": 1, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128, "init_std": 0.05},
            "data": {"train": [str(corpus)], "sequence_length": SEQUENCE_LENGTH},
            "goldfish": {"k": k, "h": 5},
            "train": {"steps": STEP, "micro_batch_size": 4, "global_batch_size": 8, "precision": "fp32"},
            "eval": {"sequences": 3},
            "audit": {
                "prompt_tokens": PROMPT,
                "suffix_tokens": SUFFIX,
                "batch_size": 5,
                "loss_sequences": 6,
                "membership": 4,
                "membership_tokens": 20,
            },
        }
    )


def write_run(config: Config, model: Transformer, step: int = STEP) -> Path:
    """A run directory with one checkpoint, as training leaves it."""
    run = RunDir(config.run_path)
    run.save_config(config)
    folder = run.checkpoint(step)
    save_weights(model, folder)
    spent = {"steps": step, "samples": SAMPLES, "tokens": SAMPLES * SEQUENCE_LENGTH, "supervised_tokens": 10_000}
    sources = open_train(config.data)
    mask = GoldfishMask(config.goldfish, load_tokenizer(sources[0].corpus.tokenizer_path or ""))
    data = SampleStream(sources, SEQUENCE_LENGTH, config.data.seed, mask.halo)
    state = {"step": step, "spent": spent, "mask": mask.describe(), "data": data.describe()}
    (folder / "state.json").write_text(json.dumps(state))
    run.latest_file.write_text(folder.name + "\n")
    return run.path


def learned(config: Config) -> Transformer:
    """A model trained on the run's own samples until it knows what it was supervised on."""
    torch.manual_seed(0)
    sources = open_train(config.data)
    tokenizer = load_tokenizer(sources[0].corpus.tokenizer_path or "")
    mask = GoldfishMask(config.goldfish, tokenizer)
    stream = SampleStream(sources, SEQUENCE_LENGTH, config.data.seed, mask.halo)
    model = Transformer(config.model, tokenizer.vocab_size, loss=config.loss)
    steps, rows = 170, 10
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for step in range(steps):
        batch = make_batch([stream.read(step * rows + row) for row in range(rows)], mask)
        optimizer.zero_grad()
        model(
            batch.tokens,
            targets=batch.targets,
            drop=batch.drop,
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen,
        ).loss.backward()
        optimizer.step()
        schedule.step()
    return model


def probe(exposures: int | None = 4, tokens: int = 8, number: int = 0) -> Probe:
    """A passage of the ids 100, 101, ..."""
    return Probe(number, exposures, np.arange(100, 100 + tokens), "corpus", "a.txt", epochs=2.5)


def extraction(
    generated: list[int],
    dropped: list[bool] | None = None,
    exposures: int | None = 4,
    loss: float = 1.0,
    *,
    log_probability: float = math.log(0.5),
    correct: Sequence[bool] = (True, False, True, True),
    hits: Sequence[int] = (),
) -> Extraction:
    """What a model made of 100 ... 103, whose suffix is 104 ... 107."""
    prompt, suffix = [100, 101, 102, 103], [104, 105, 106, 107]
    losses = [loss] * 4
    return Extraction(
        probe(exposures), prompt, suffix, generated, dropped, losses, list(correct), log_probability, list(hits)
    )
