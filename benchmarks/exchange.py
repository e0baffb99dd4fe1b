"""Memory that `megafish import` and `megafish export` take beside the size of the model.

A Llama of random weights is written by transformers in small files, imported and exported again, each in a process of
its own. Counted is anonymous memory at its highest: pages of the files themselves can be dropped at any time.

    python benchmarks/exchange.py [--layers 16] [--save]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import run_isolated, save, table

from megafish.data.readers import ReadOptions
from megafish.data.tokenizer import train_tokenizer
from megafish.demo import library_files

VOCAB, WIDTH, SHARD_GIB = 2048, 1024, 0.1


def write_model(folder: Path, layers: int) -> int:
    """A Llama in fp32 with a tokenizer, as transformers writes it. Returns its bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="100MB")
    files = library_files(500_000, seed=0)
    train_tokenizer(files, folder / "tokenizer.model", VOCAB, options=ReadOptions(text_suffixes=(".py",)))
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def peak(*arguments: str) -> tuple[int, float]:
    """(most anonymous memory [bytes], seconds) of a megafish command."""
    started, most = time.monotonic(), 0
    command = [sys.executable, "-m", "megafish", *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii").splitlines()
            except OSError:
                break
            most = max(most, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)
            time.sleep(0.005)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit code {process.returncode}")
    return most, time.monotonic() - started


def main() -> None:
    """The model, both ways, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16, help=f"of width {WIDTH}")
    parser.add_argument("--save", action="store_true", help="write results/DATE_exchange.md")
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = run_isolated(write_model, folder / "model", asked.layers).result
        ways = {
            "import": ["import", str(folder / "model"), "--to", str(folder / "run"), "--shard-gib", str(SHARD_GIB)],
            "export": ["export", str(folder / "run"), "--to", str(folder / "out"), "--shard-gib", str(SHARD_GIB)],
            "export, one file": ["export", str(folder / "run"), "--to", str(folder / "whole")],
        }
        for way, arguments in ways.items():
            memory, seconds = peak(*arguments)
            rows.append([way, f"{size / 2**20:.0f}", f"{memory / 2**20:.0f}", f"{memory / size:.2f}", f"{seconds:.1f}"])
    text = table(rows, ["", "model [MiB]", "memory [MiB]", "of the model", "seconds"])
    print(text)
    if asked.save:
        print(save("exchange", text))


if __name__ == "__main__":
    main()
