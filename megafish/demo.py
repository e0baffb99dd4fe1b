"""`megafish demo`: the whole path on real text, in minutes on a CPU.

The corpus is Python's own standard library, found on the machine: real text under a licence, no download. Canaries
(passages repeated up to 160 times) stand for what a corpus repeats. The same small Llama is trained twice through the
real path, plainly and with the goldfish loss, on equally many supervised tokens; then both are asked to recite.
"""

from __future__ import annotations

import gc
import hashlib
import shutil
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megafish.audit.audit import audit_run
from megafish.audit.report import report
from megafish.config import load_config
from megafish.data.canary import CanaryConfig
from megafish.data.prepare import prepare
from megafish.data.readers import ReadOptions
from megafish.data.tokenizer import train_tokenizer
from megafish.errors import InputError
from megafish.run import RunDir, read_json
from megafish.train.loop import train

TEXT_BYTES = 1_650_000
"""Text taken from the standard library, canaries included."""
FILE_BYTES = range(1_500, 24_000)
"""Sizes of the modules taken: many of a middling length make a better validation split than a few long ones."""
VOCAB_SIZE = 2048
VALID_FRACTION = 0.15
CANARIES = CanaryConfig(count=16, tokens=80, exposures=(0, 1, 8, 32, 160))
PROMPT_TOKENS, SUFFIX_TOKENS = 40, 40
GOLDFISH_K = 4

# What a demo leaves in its folder.
_MADE = {"tokenizer.model", "tokenizer.model.tmp", "corpus", "plain", "goldfish", "report"}

# Packages whose text is tables (continued by counting on, with nothing learned by heart), is generated, or may be left
# out by a distribution.
_LEFT_OUT = {
    "encodings",
    "pydoc_data",
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "ensurepip",
    "__pycache__",
}


@dataclass(frozen=True)
class Compared:
    """One trained and audited run."""

    run: RunDir
    seconds: float
    summary: dict[str, Any]


def run_demo(output: Path, *, seed: int = 0, overwrite: bool = False) -> dict[str, Compared]:
    """Corpus, two runs, two audits, one comparison below `output`. Returns the runs by name."""
    console = Console()
    _make_room(output, overwrite)
    started = time.monotonic()
    console.rule("[bold]1/4  corpus: Python's standard library")
    corpus = make_corpus(output, seed)

    compared = {}
    for number, (name, k) in enumerate({"plain": None, "goldfish": GOLDFISH_K}.items(), start=2):
        console.rule(
            f"[bold]{number}/4  train {'plainly' if k is None else f'with the goldfish loss, k={k}'}, then audit"
        )
        compared[name] = _train_and_audit(output / name, corpus, k, seed, console)

    console.rule("[bold]4/4  what they recite")
    page = report([entry.run.path for entry in compared.values()], output / "report")
    console.print(comparison_table(compared))
    console.print(_verdict(compared))
    console.print(f"took {time.monotonic() - started:.0f} s\nnext: open {page} in a browser", highlight=False)
    return compared


def _make_room(output: Path, overwrite: bool) -> None:
    """Remove an earlier demo, and nothing else: the folder may be one that the user named by mistake."""
    if not output.exists():
        return
    if not output.is_dir():
        raise InputError(f"{output}: not a folder: name another --output")
    entries = sorted(output.iterdir())
    foreign = [entry.name for entry in entries if entry.name not in _MADE]
    if foreign:
        raise InputError(f"{output}: holds {foreign[0]!r}, which no demo made: name another --output")
    if entries and not overwrite:
        raise InputError(f"{output}: holds a demo already: give --overwrite to start over, or another --output")
    for entry in entries:
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def library_files(budget: int, seed: int) -> list[Path]:
    """Modules of the standard library of about `budget` bytes in all, a pseudo-random choice in path order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in root.rglob("*.py") if not _LEFT_OUT.intersection(path.relative_to(root).parts)]
    if not files:
        raise InputError(f"{root}: no Python source there; the demo reads the standard library's own (python3 -m site)")
    shuffled = sorted(files, key=lambda path: hashlib.sha256(f"{seed}/{path.relative_to(root)}".encode()).digest())
    chosen, size = [], 0
    for path in shuffled:
        if size >= budget:
            break
        if path.stat().st_size in FILE_BYTES:
            chosen.append(path)
            size += path.stat().st_size
    return sorted(chosen)


def make_corpus(output: Path, seed: int) -> Path:
    files = library_files(TEXT_BYTES, seed)
    tokenizer = output / "tokenizer.model"
    output.mkdir(parents=True, exist_ok=True)
    train_tokenizer(files, tokenizer, VOCAB_SIZE, options=ReadOptions(text_suffixes=(".py",)), seed=seed)
    prepare(
        files,
        output / "corpus",
        tokenizer,
        text_suffixes=(".py",),
        valid_fraction=VALID_FRACTION,
        split_seed=seed,
        canaries=CanaryConfig(CANARIES.count, CANARIES.tokens, CANARIES.exposures, seed=seed),
    )
    return output / "corpus"


def _train_and_audit(folder: Path, corpus: Path, k: int | None, seed: int, console: Console) -> Compared:
    tokens = read_json(corpus / "manifest.json")["splits"]["train"]["tokens"]
    config = load_config(
        "tiny",
        [
            f"name={folder.name}",
            f"run_dir={folder}",
            f"data.train={corpus}",
            f"data.seed={seed}",
            f"goldfish.k={'null' if k is None else k}",
            f"goldfish.seed={seed}",
            f"train.seed={seed}",
            # As many supervised tokens as one pass of plain training has; goldfish reads k/(k-1) times as many.
            f"train.supervised_tokens={tokens}",
            "eval.sequences=512",
            # Small steps at a high rate that falls to zero: what a short run needs to learn a text by heart.
            "train.global_batch_size=4",
            "train.micro_batch_size=4",
            "optimizer.lr=4e-3",
            "schedule.min_lr_ratio=0",
            "schedule.warmup_fraction=0.05",
            "eval.interval=null",
            "checkpoint.interval=200",
            f"audit.prompt_tokens={PROMPT_TOKENS}",
            f"audit.suffix_tokens={SUFFIX_TOKENS}",
        ],
    )
    started = time.monotonic()
    outcome = train(config, console=console)
    if outcome.signal is not None:
        raise KeyboardInterrupt
    seconds = time.monotonic() - started
    gc.collect()  # the engine's reference cycles hold the model, its gradients and moments
    result = audit_run(folder, console=console)
    return Compared(outcome.run, seconds, result.summary)


def comparison_table(compared: dict[str, Compared]) -> Table:
    """Exact recitations by exposure, and what they cost, side by side."""
    table = Table(title="canaries recited word for word", title_justify="left")
    table.add_column("")
    for name in compared:
        table.add_column(name, justify="right")
    levels = [entry.summary["extraction"]["levels"] for entry in compared.values()]
    for row in zip(*levels, strict=True):
        cells = [f"{level['exact_matches']} of {level['canaries']}" for level in row]
        copies = row[0]["exposures"]
        table.add_row(f"{copies} cop{'y' if copies == 1 else 'ies'}" if copies else "never seen (control)", *cells)
    table.add_section()
    summaries = [entry.summary for entry in compared.values()]
    table.add_row("validation loss, nats/token", *(f"{s['losses']['valid']['loss']:.4f}" for s in summaries))
    table.add_row("supervised tokens", *(f"{s['supervised_tokens']:,}" for s in summaries))
    table.add_row("tokens read", *(f"{s['tokens']:,}" for s in summaries))
    table.add_row("training time", *(f"{entry.seconds:.0f} s" for entry in compared.values()))
    return table


def _verdict(compared: dict[str, Compared]) -> str:
    plain, goldfish = (entry.summary for entry in compared.values())
    most = [summary["extraction"]["levels"][-1] for summary in (plain, goldfish)]
    ratio = goldfish["losses"]["valid"]["loss"] / plain["losses"]["valid"]["loss"] - 1
    return (
        f"Of the {most[0]['canaries']} passages that stand {most[0]['exposures']} times in the corpus, plain training "
        f"recites {most[0]['exact_matches']} and goldfish training {most[1]['exact_matches']}; its validation loss "
        f"differs by {ratio:+.1%}."
    )
