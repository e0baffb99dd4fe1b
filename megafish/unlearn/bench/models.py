"""The models of the bench: trained for real, on corpora that differ in what is to be forgotten and in nothing else."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from random import Random

from rich.console import Console

from megafish.config import load_config
from megafish.data.prepare import prepare
from megafish.data.tokenizer import train_tokenizer
from megafish.run import write_atomic
from megafish.train.loop import train
from megafish.unlearn.bench.plan import GOLDFISH, GOLDFISH_K, GOLDFISH_MIN_CONTEXT, RETAIN, START, Plan
from megafish.unlearn.fiction.write import write_data

ASKED = 160
"""Rows of what is kept that are asked about; the methods are told to keep all of them."""
MODELS = {START: ("full", None), RETAIN: ("retain", None), GOLDFISH: ("full", GOLDFISH_K)}
"""(corpus, goldfish.k) of each model."""
_TRAINED = "trained.json"


def data_of(folder: Path, seed: int) -> Path:
    """Folder of a seed's sets."""
    return folder / f"seed{seed}" / "data"


def model_of(folder: Path, seed: int, name: str) -> Path:
    """Run of a trained model."""
    return folder / f"seed{seed}" / name.replace(" ", "_")


def make_data(folder: Path, plan: Plan, seed: int) -> None:
    """Sets, tokenizer and corpora of a seed, unless they are there."""
    home, sets = folder / f"seed{seed}", data_of(folder, seed)
    if (home / "corpora.done").is_file():
        return
    write_data(sets, seed=seed, authors_count=plan.authors, overwrite=True)
    kept = (sets / "authors/retain90.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    asked = sorted(Random(f"{seed}/asked").sample(range(len(kept)), min(ASKED, len(kept))))
    write_atomic(sets / "authors/asked.jsonl", "".join(kept[i] for i in asked))
    train_tokenizer([sets / "corpus/full.jsonl"], home / "tokenizer.model", plan.vocab_size, overwrite=True)
    for corpus in ("full", "retain"):
        prepare(
            [sets / f"corpus/{corpus}.jsonl"],
            home / "corpora" / corpus,
            home / "tokenizer.model",
            valid_fraction=0.0,
            overwrite=True,
            progress=False,
        )
    write_atomic(home / "corpora.done", "")


def is_trained(folder: Path, _plan: Plan, seed: int, name: str) -> bool:
    """Whether a model is there."""
    return (model_of(folder, seed, name) / _TRAINED).is_file()


def make_model(folder: Path, plan: Plan, seed: int, name: str) -> None:
    """Train a model unless it is there; one that was cut short begins anew."""
    run = model_of(folder, seed, name)
    if is_trained(folder, plan, seed, name):
        return
    shutil.rmtree(run, ignore_errors=True)
    corpus, k = MODELS[name]
    # Goldfish training sees as many supervised tokens as the others.
    steps = plan.train_steps if k is None else round(plan.train_steps * k / (k - 1))
    heads, width = max(1, plan.hidden_size // 32), plan.hidden_size
    shape = {"num_layers": plan.num_layers, "hidden_size": width, "num_heads": heads}
    shape["intermediate_size"] = width * 8 // 3 // 32 * 32
    batch = {"steps": steps, "global_batch_size": plan.batch, "micro_batch_size": plan.batch}
    config = load_config(
        "tiny",
        [
            f"name={name.replace(' ', '_')}",
            f"run_dir={run}",
            f"model={json.dumps({**shape, 'tie_embeddings': True})}",
            f"data.train={folder / f'seed{seed}' / 'corpora' / corpus}",
            f"data.sequence_length={plan.sequence_length}",
            f"data.seed={seed}",
            f"goldfish.k={'null' if k is None else k}",
            f"goldfish.min_context={'null' if k is None else GOLDFISH_MIN_CONTEXT}",
            "optimizer.lr=4e-3",
            "schedule.min_lr_ratio=0",
            "schedule.warmup_fraction=0.05",
            f"train={json.dumps({**batch, 'precision': 'fp32', 'seed': seed})}",
            "train.supervised_tokens=null",
            "eval={interval: null, sequences: 1}",
            "checkpoint.interval=null",
        ],
    )
    outcome = train(config, console=Console(quiet=True))
    if outcome.signal is not None:
        raise KeyboardInterrupt
    gc.collect()  # the engine's reference cycles hold the model and its moments
    write_atomic(run / _TRAINED, json.dumps({"steps": steps}) + "\n")
