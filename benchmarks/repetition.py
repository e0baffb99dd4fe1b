"""What MiLe and self-contrastive training do to a small model: repetitions, perplexity, and recitation.

On the demo's corpus (Python's standard library with canaries), all with the goldfish mask: a first run; a second one
from its weights, plainly and self-contrastively; and one from scratch with MiLe.

rep-l: share of greedily generated tokens that are among the l before them. dist-n: distinct n-grams of all generated
ones. Perplexity by bucket: validation tokens by their number of occurrences in training, a third of them each.

    python benchmarks/repetition.py [--folder FOLDER] [--save]
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from common import save, table

from megafish.audit.audit import audit_run
from megafish.data.corpus import SampleStream, open_train, open_valid
from megafish.data.loader import IGNORE, EvalLoader
from megafish.decode.generate import generate
from megafish.demo import make_corpus
from megafish.model.load import load_run
from megafish.run import read_json

PROMPTS, PROMPT, NEW = 100, 32, 128
WINDOWS, GRAMS = (16, 32, 128), (2, 3, 4)
SHAPE = ["train={global_batch_size: 4, micro_batch_size: 4}", "schedule={min_lr_ratio: 0, warmup_fraction: 0.05}"]
SHAPE += ["eval={interval: null, sequences: 512}", "checkpoint.interval=null", "goldfish.k=4"]
SHAPE += ["audit={prompt_tokens: 40, suffix_tokens: 40}"]
SECOND_RATE = "optimizer.lr=1e-3"
STRENGTHS = (0.5, 1.0, 2.0, 4.0)  # the paper's: 4


def train(folder: Path, corpus: Path, name: str, tokens: int, *overrides: str) -> Path:
    """A run below the folder, trained or continued."""
    run = folder / name
    settings = [f"data.train={corpus}", f"run_dir={run}", f"train.supervised_tokens={tokens}", *SHAPE, *overrides]
    what = [str(run)] if (run / "config.yaml").exists() else ["tiny", *settings]
    subprocess.run([sys.executable, "-m", "megafish", "train", *what], check=True, stdout=subprocess.DEVNULL)
    return run


def repetition(texts: Sequence[Sequence[int]], window: int) -> float:
    """Share of tokens that are among the `window` before them."""
    repeated = [token in text[max(0, at - window) : at] for text in texts for at, token in enumerate(text) if at]
    return float(np.mean(repeated))


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams of all n-grams."""
    grams = [tuple(text[at : at + n]) for text in texts for at in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams)


@torch.no_grad()
def measure(run: Path) -> dict[str, float]:
    """All figures of one run."""
    loaded = load_run(run, device="cpu")
    valid = EvalLoader(SampleStream(open_valid(loaded.config.data), 256, seed=0), 512, 16)
    counts = np.zeros(loaded.tokenizer.vocab_size, dtype=np.int64)
    for source in open_train(loaded.config.data):
        for number in range(len(source.corpus.data)):
            np.add.at(counts, np.asarray(source.corpus.data.document(number)), 1)
    nats, targets, prompts = [], [], []
    for batch in valid:
        losses = loaded.model(
            batch.tokens,
            targets=batch.targets,
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen,
            per_token=True,
        )
        kept = batch.targets != IGNORE
        nats.append(losses[kept].double().numpy())
        targets.append(batch.targets[kept].numpy())
        prompts += batch.tokens[:, :PROMPT].tolist()
    loss, frequency = np.concatenate(nats), counts[np.concatenate(targets)]
    texts = generate(loaded.model, None, prompts[:PROMPTS], max_new_tokens=NEW)
    texts = [text[-NEW:] for text in texts]
    found = {f"rep-{window}": repetition(texts, window) for window in WINDOWS}
    found |= {f"dist-{n}": distinct(texts, n) for n in GRAMS}
    found["perplexity"] = math.exp(loss.mean())
    # Ties stay together: a token type belongs to one bucket.
    low, high = np.quantile(frequency, [1 / 3, 2 / 3])
    for name, chosen in (
        ("frequent", frequency > high),
        ("medium", (frequency > low) & (frequency <= high)),
        ("rare", frequency <= low),
    ):
        found[name] = math.exp(loss[chosen].mean())
    levels = audit_run(run, progress=False).summary["extraction"]["levels"]
    found["recited"] = sum(level["exact_matches"] for level in levels)
    found["of"] = sum(level["canaries"] for level in levels)
    return found


def main() -> None:
    """Runs, figures and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the runs are kept, and continued from")
    parser.add_argument("--save", action="store_true", help="write results/DATE_repetition.md")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        corpus = folder / "corpus"
        if not corpus.exists():
            make_corpus(folder, seed=0)
        tokens = read_json(corpus / "manifest.json")["splits"]["train"]["tokens"]
        first = train(folder, corpus, "first", tokens, "optimizer.lr=4e-3")
        onward = (tokens // 3, SECOND_RATE, f"train.initial_weights={first}", "data.seed=1")
        runs = {
            "plain": first,
            "MiLe, gamma 1": train(folder, corpus, "mile", tokens, "optimizer.lr=4e-3", "loss.mile_gamma=1"),
            "plain, then plain": train(folder, corpus, "second", *onward),
        }
        for strength in STRENGTHS:
            contrast = (f"contrast.premature={first}", f"contrast.strength={strength}")
            runs[f"plain, then self-contrastive, {strength:g}"] = train(
                folder, corpus, f"contrast-{strength:g}", *onward, *contrast
            )
        found = {name: measure(run) for name, run in runs.items()}
    keys = [key for key in found["plain"] if key not in ("recited", "of")]
    rows = []
    for name, figures in found.items():
        shown = (f"{figures[key]:.3g}" if key.startswith(("rep", "dist")) else f"{figures[key]:.2f}" for key in keys)
        rows.append([name, *shown, f"{figures['recited']} of {figures['of']}"])
    text = f"Preset tiny, {tokens:,} supervised tokens, a third as many in a second run; goldfish k = 4; "
    text += f"{PROMPTS} prompts of {PROMPT} validation tokens, {NEW} generated greedily.\n\n"
    text += table(rows, ["run", *keys, "recited"])
    print(text)
    if asked.save:
        print(save("repetition", text))


if __name__ == "__main__":
    main()
