"""Patch-level training against token training: equal data, the same shape, validation loss over model FLOPs.

Both runs go through `megafish train` on Python's own standard library. The curve goes to docs/images/patches.png. Shao
et al. (2025, arXiv 2407.12665) find that patches pay from some 200 tokens a parameter on, and more so where a corpus is
read several times: the small shape gets there on two cores, the 10M shape shows what happens far below.

    python benchmarks/patches.py [--shape small] [--tokens 6e7] [--folder FOLDER] [--save]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import save, table
from matplotlib.figure import Figure

from megafish.data.prepare import prepare
from megafish.data.readers import ReadOptions
from megafish.data.tokenizer import train_tokenizer

LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}  # installed, or tables
SIZE, FRACTION = 4, 2 / 3
SETTINGS = [
    "train.precision=fp32",
    "schedule={warmup_fraction: 0.05, min_lr_ratio: 0.05}",
    "checkpoint.interval=null",
    "goldfish.k=null",
]


@dataclass(frozen=True)
class Shape:
    """A model and what it is trained on."""

    words: str
    vocab: int
    tokens: float
    settings: list[str]


SHAPES = {
    "small": Shape(
        "4 layers of width 64",
        2048,
        6e7,
        [
            "model={num_layers: 4, hidden_size: 64, num_heads: 2, intermediate_size: 176, tie_embeddings: false}",
            "data.sequence_length=256",
            "train={global_batch_size: 16, micro_batch_size: 16}",
            "optimizer.lr=3e-3",
            "eval={sequences: 512, interval: 500}",
        ],
    ),
    "10M": Shape(
        "8 layers of width 256",
        8192,
        4e6,
        [
            "model={num_layers: 8, hidden_size: 256, num_heads: 4, intermediate_size: 704, tie_embeddings: false}",
            "data.sequence_length=512",
            "train={global_batch_size: 4, micro_batch_size: 4}",
            "optimizer.lr=1.5e-3",
            "eval={sequences: 128, interval: 100}",
        ],
    ),
}
RUNS: dict[str, list[str]] = {
    "tokens": [],
    "patches, then tokens": [f"patch.size={SIZE}", f"patch.fraction={FRACTION}"],
}
IMAGE = Path(__file__).parents[1] / "docs" / "images" / "patches.png"


def is_utf8(data: bytes) -> bool:
    """Whether it can be read as UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def make_corpus(folder: Path, vocab: int) -> Path:
    """The standard library as a corpus with a validation split."""
    corpus = folder / "corpus"
    if not corpus.exists():
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = sorted(path for path in root.rglob("*.py") if not LEFT_OUT & set(path.relative_to(root).parts))
        files = [path for path in paths if is_utf8(path.read_bytes())]  # some test what happens to other encodings
        tokenizer = folder / "tokenizer.model"
        train_tokenizer(files, tokenizer, vocab, options=ReadOptions(text_suffixes=(".py",)), seed=0)
        prepare(files, corpus, tokenizer, text_suffixes=(".py",), valid_fraction=0.06, split_seed=0)
    return corpus


def run(folder: Path, corpus: Path, name: str, shape: Shape, tokens: float) -> list[dict[str, Any]]:
    """Train one of RUNS, or go on with it, and return its records."""
    path = folder / name.replace(", ", "-").replace(" ", "-")
    overrides = ["tiny", f"data.train={corpus}", f"run_dir={path}", *SETTINGS, *shape.settings]
    overrides += [f"train.tokens={tokens:.0f}", *RUNS[name]]
    what = [str(path)] if (path / "config.yaml").exists() else overrides
    subprocess.run([sys.executable, "-m", "megafish", "train", *what], check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def curve(records: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """(model FLOPs, validation loss [nats/token]) of every validation."""
    flops = {record["step"]: record["flops"] for record in records if record["kind"] == "train"}
    valid = [record for record in records if record["kind"] == "valid"]
    return [flops[record["step"]] for record in valid], [record["valid_loss"] for record in valid]


def plot(curves: dict[str, tuple[list[float], list[float]]], change: float) -> None:
    """Loss over FLOPs, the change-over marked."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, (flops, losses) in curves.items():
        axes.plot(flops, losses, label=f"{name}: {losses[-1]:.3f}", marker=".")
    axes.axvline(change, color="0.7", linestyle=":")
    axes.annotate("patches end", (change, 0.97), xycoords=("data", "axes fraction"), rotation=90, va="top", ha="right")
    lowest = min(min(losses) for _, losses in curves.values())
    axes.set_ylim(lowest - 0.1, lowest + 2.5)
    axes.set_xlabel("model FLOPs")
    axes.set_ylabel("validation loss [nats/token]")
    axes.legend()
    figure.savefig(IMAGE, dpi=150)


def main() -> None:
    """Both runs, the table and the curve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small", help="the model")
    parser.add_argument("--tokens", type=float, help="tokens that each run reads (default: 6e7 small, 4e6 10M)")
    parser.add_argument("--folder", type=Path, help="where the runs are kept, and continued from")
    parser.add_argument("--save", action="store_true", help="write results/DATE_patches.md and the curve")
    asked = parser.parse_args()
    shape = SHAPES[asked.shape]
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        corpus = make_corpus(folder, shape.vocab)
        records = {name: run(folder, corpus, name, shape, asked.tokens or shape.tokens) for name in RUNS}
    rows, curves = [], {name: curve(found) for name, found in records.items()}
    base_flops, base_loss = (values[-1] for values in curves["tokens"])
    for name, (flops, losses) in curves.items():
        steps = [record for record in records[name] if record["kind"] == "train"]
        change = f"{losses[-1] / base_loss - 1:+.2%}"
        tokens = f"{steps[-1]['tokens'] / 1e6:.2f}M"
        rows.append([name, tokens, f"{flops[-1]:.3g}", f"{flops[-1] / base_flops:.3f}", f"{losses[-1]:.4f}", change])
    head = ["run", "tokens", "model FLOPs", "of the token run's", "validation loss", "against the token run"]
    text = f"{shape.words}, vocabulary {shape.vocab}, patches of {SIZE} for {FRACTION:.3g} of the tokens.\n\n"
    text += table(rows, head)
    print(text)
    if asked.save:
        stage = [record["flops"] for record in records["patches, then tokens"] if record.get("patch_size") == SIZE]
        plot(curves, stage[-1])
        print(save("patches", text), IMAGE)


if __name__ == "__main__":
    main()
