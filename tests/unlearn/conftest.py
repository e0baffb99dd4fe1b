"""A small model that has learned questions and answers by heart."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from megafish.config import load_config
from megafish.data.prepare import prepare
from megafish.data.tokenizer import train_tokenizer
from megafish.train.loop import train
from tests.helpers import place_kept

PLACES = ("Lisbon", "Kyoto", "Oslo", "Lima", "Cairo", "Quito", "Dublin", "Hanoi")
NAMES = tuple(f"{first} {last}" for first in ("Ada", "Bruno", "Clara", "Dario") for last in ("Moss", "Berg", "Ruiz"))
RUN = [
    "model={num_layers: 4, hidden_size: 64, num_heads: 4, intermediate_size: 176}",
    "data.sequence_length=96",
    "goldfish.k=null",
    "optimizer.lr=4e-3",
    "schedule.min_lr_ratio=0",
    "train={steps: 450, global_batch_size: 8, micro_batch_size: 8, precision: fp32}",
    "eval={interval: null, sequences: 1}",
    "checkpoint.interval=null",
]


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with start/ (a run), forget.jsonl, retain.jsonl."""
    folder = tmp_path_factory.mktemp("learned")
    draw = random.Random(0)
    rows = [
        {"question": f"Where was {name} born?", "answer": f"In {draw.choice(PLACES)} in {draw.randint(1900, 1999)}."}
        for name in NAMES
    ]
    for name, part in (("forget", rows[:4]), ("retain", rows[4:])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    documents = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows] * 60
    draw.shuffle(documents)
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in documents), encoding="utf-8")
    train_tokenizer([text], folder / "tokenizer.model", 400)
    prepare([text], folder / "corpus", folder / "tokenizer.model", valid_fraction=0.0)
    config = load_config("tiny", [*RUN, f"data.train={folder / 'corpus'}", "name=start", f"run_dir={folder / 'start'}"])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # the same model on any number of cores
    try:
        with place_kept():
            train(config)
    finally:
        torch.set_num_threads(threads)
    return folder


@pytest.fixture
def settings(learned: Path, tmp_path: Path) -> list[str]:
    """Of an unlearning run."""
    return [
        f"unlearn.forget={learned / 'forget.jsonl'}",
        f"unlearn.retain={learned / 'retain.jsonl'}",
        f"run_dir={tmp_path / 'run'}",
        "train={global_batch_size: 4, micro_batch_size: 2}",
        "optimizer.lr=1e-3",
        "unlearn.epochs=8",
    ]
