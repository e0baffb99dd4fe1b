"""Corpora, runs and audits."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megafish.data.canary import CanaryConfig
from megafish.data.prepare import prepare
from megafish.data.readers import ReadOptions
from megafish.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from megafish.demo import library_files
from megafish.run import read_json

TEXT_BYTES, VOCAB = 1_650_000, 2048
EXPOSURES = (0, 1, 2, 4, 8, 16, 32, 64, 128)
COUNT, TOKENS, PROMPT, SUFFIX = 8, 80, 40, 40
"""Canaries of each number of copies, and their tokens."""
VARIANTS, VARIANT_COPIES, FLIPPED = 4, 384, 0.35
"""Passages planted as near-duplicates, their copies, and the share of the tokens that can change case which do."""


@dataclass(frozen=True)
class Run:
    """One column of the tables."""

    corpus: str
    goldfish: str
    beams: bool = False


RUNS = {
    "control": Run("control", "{k: null}"),
    "plain": Run("planted", "{k: null}", beams=True),
    "k=3": Run("planted", "{k: 3}", beams=True),
    "k=4": Run("planted", "{k: 4}", beams=True),
    "k=8": Run("planted", "{k: 8}"),
    "k=32": Run("planted", "{k: 32}"),
    "k=128": Run("planted", "{k: 128}"),
    "static k=4": Run("planted", "{k: 4, scheme: static}"),
    "random k=4": Run("planted", "{k: 4, scheme: random}"),
    "inclusive k=4": Run("planted", "{k: 4, window: inclusive}"),
    "variants, plain": Run("variants", "{k: null}"),
    "variants, k=4": Run("variants", "{k: 4}"),
    "variants, k=4, casefold": Run("variants", "{k: 4, canonical: casefold}"),
}


@dataclass(frozen=True)
class Audited:
    """What one run left: summary.json, the lines of extraction.jsonl, the validation records."""

    summary: dict[str, Any]
    items: list[dict[str, Any]]
    valid: list[dict[str, Any]]
    """Of metrics.jsonl: supervised_tokens, tokens and valid_loss along the way."""
    seconds: float


def make_corpora(folder: Path, seed: int) -> dict[str, Path]:
    """Corpora of one seed: the same text without canaries (control), with them (planted), with near-duplicates of
    passages (variants)."""
    corpora = {name: folder / name for name in ("control", "planted", "variants")}
    tokenizer = folder / "tokenizer.model"
    if (folder / "done").is_file():
        return corpora
    folder.mkdir(parents=True, exist_ok=True)
    files = library_files(TEXT_BYTES, seed)
    train_tokenizer(files, tokenizer, VOCAB, options=ReadOptions(text_suffixes=(".py",)), seed=seed, overwrite=True)
    total = COUNT * len(EXPOSURES)
    # As many passages are chosen, so they are the same ones; in the control corpus none is planted.
    chosen = {
        "control": CanaryConfig(total, TOKENS, (0,), seed=seed),
        "planted": CanaryConfig(COUNT, TOKENS, EXPOSURES, seed=seed),
        "variants": None,
    }
    others = [file for file in library_files(4 * TEXT_BYTES, seed) if file not in files][:VARIANTS]
    passages = [file.read_text(encoding="utf-8", errors="replace")[200:500] for file in others]
    random = np.random.Generator(np.random.Philox(seed))
    ids = load_tokenizer(tokenizer)
    lines = [line for passage in passages for line in near_duplicates(passage, ids, random)]
    for name, texts in (("variants", lines), ("passages", passages)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for name, canaries in chosen.items():
        inputs = [*files, *([folder / "variants.jsonl"] if name == "variants" else [])]
        prepare(
            inputs,
            corpora[name],
            tokenizer,
            text_suffixes=(".py",),
            valid_fraction=0.15,
            split_seed=seed,
            canaries=canaries,
            overwrite=True,
        )
    (folder / "done").touch()
    return corpora


def near_duplicates(passage: str, tokenizer: Tokenizer, random: np.random.Generator) -> list[str]:
    """Copies in each of which other tokens have changed case, of those whose neighbours are then still the same ids."""
    ids = list(tokenizer.encode(passage))
    ends = [len(tokenizer.decode(ids[: i + 1])) for i in range(len(ids))]
    pieces = [passage[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    able = []
    for i, piece in enumerate(pieces):
        changed = list(tokenizer.encode("".join([*pieces[:i], piece.swapcase(), *pieces[i + 1 :]])))
        if len(changed) == len(ids) and sum(a != b for a, b in zip(changed, ids, strict=True)) == 1:
            able.append(i)
    copies = []
    for _ in range(VARIANT_COPIES):
        chosen = {i for i in able if random.random() < FLIPPED}
        copies.append("".join(piece.swapcase() if i in chosen else piece for i, piece in enumerate(pieces)))
    return copies


def run_all(
    folder: Path, corpora: Mapping[int, Mapping[str, Path]], names: Sequence[str], *, quick: bool
) -> dict[str, list[Audited]]:
    """Train and audit every run of every seed; control runs first, since the others are compared with them."""
    found: dict[str, list[Audited]] = {name: [] for name in names}
    work = [(seed, name) for seed in corpora for name in names]
    started, made = time.monotonic(), 0
    for number, (seed, name) in enumerate(work):
        path = folder / f"seed{seed}" / "runs" / name.replace(", ", "-").replace(" ", "-").replace("=", "")
        fresh = not (path / "audited").is_file()
        _make(path, corpora[seed], RUNS[name], seed, folder / f"seed{seed}", quick=quick)
        found[name].append(_read(path))
        made += fresh
        if fresh:
            left = (time.monotonic() - started) / made * (len(work) - number - 1)
            print(f"seed {seed}, {name}: {number + 1} of {len(work)}, about {left / 60:.0f} min left", flush=True)
    return found


def _make(path: Path, corpora: Mapping[str, Path], run: Run, seed: int, folder: Path, *, quick: bool) -> None:
    if (path / "audited").is_file():
        return
    corpus = corpora[run.corpus]
    tokens = read_json(corpora["planted"] / "manifest.json")["splits"]["train"]["tokens"] // (40 if quick else 1)
    started = time.monotonic()
    _megafish(
        "train", "tiny", "--resume", f"name={path.name}", f"run_dir={path}", f"data.train={corpus}",
        f"data.seed={seed}", f"train.seed={seed}", f"goldfish={run.goldfish}",
        # A static mask is the same for every seed.
        *([] if "static" in run.goldfish else [f"goldfish.seed={seed}"]),
        f"train={{supervised_tokens: {tokens}, global_batch_size: 4, micro_batch_size: 4}}", "optimizer.lr=4e-3",
        "schedule={min_lr_ratio: 0, warmup_fraction: 0.05}", "eval={interval: 100, sequences: 256, canaries: 0}",
        "checkpoint.interval=200", f"audit={{prompt_tokens: {PROMPT}, suffix_tokens: {SUFFIX}}}",
    )  # fmt: skip
    settings = ["audit.membership_tokens=64"]
    control = folder / "runs" / "control"
    if path != control:
        settings.append(f"audit.reference={control}")
    if run.beams:
        settings.append("audit.beams=[30]")
    if run.corpus == "variants":
        settings += [f"audit.probes={folder / 'passages.jsonl'}", f"audit.probe_count={VARIANTS}"]
    _megafish("audit", str(path), *settings)
    (path / "audited").write_text(f"{time.monotonic() - started:.1f}\n")


def _megafish(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "megafish", *words], check=True, stdout=subprocess.DEVNULL)


def _read(path: Path) -> Audited:
    folder = sorted((path / "audit").iterdir())[-1]
    items = [json.loads(line) for line in (folder / "extraction.jsonl").read_text(encoding="utf-8").split("\n") if line]
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    spent = {record["step"]: record for record in records if record["kind"] == "train"}
    valid = [
        {key: spent[r["step"]][key] for key in ("tokens", "supervised_tokens")} | {"valid_loss": r["valid_loss"]}
        for r in records
        if r["kind"] == "valid" and r["step"] in spent
    ]
    return Audited(read_json(folder / "summary.json"), items, valid, float((path / "audited").read_text()))
