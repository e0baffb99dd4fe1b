"""MemFree decoding: the filter's size, errors and speed, what it costs in decoding, and what leaks all the same.

1. A filter of random n-grams: size beside theory, lookups of members and of others, time to build, lookups a second
   beside rbloom where it is installed (pip install rbloom).
2. Tokens per second of a run with and without the filter, in turns.
3. The warning of Ippolito et al. (2023): with the filter nothing comes out word for word, but how much nearly (BLEU
   above 0.75), and how much for prompts in another style, whose continuations the filter does not know?

    python benchmarks/memfree.py [--run runs/demo/plain] [--ngrams 1e7] [--save]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import save, table

from megafish.audit.metrics import BLEU_MEMORIZED, bleu
from megafish.audit.probes import load_canaries
from megafish.data.indexed import IndexedWriter
from megafish.data.tokenizer import Tokenizer
from megafish.decode.build_filter import build_filter
from megafish.decode.generate import generate
from megafish.decode.memfree import MemFree
from megafish.decode.ngram_filter import NgramFilter, theory
from megafish.decode.packed import for_decoding
from megafish.demo import run_demo
from megafish.model.load import LoadedRun, load_run

N, RATE, LOOKUPS = 10, 0.01, 1_000_000
PROMPT, SUFFIX = 40, 40
STYLES: dict[str, Callable[[str], str]] = {
    "as trained": lambda text: text,
    "upper case": str.upper,
    "lower case": str.lower,
    "doubled spaces": lambda text: text.replace(" ", "  "),
    "tabs for spaces": lambda text: text.replace("    ", "\t"),
}


def filter_of_random_ngrams(folder: Path, ngrams: int, tokenizer: Tokenizer) -> str:
    """Part 1, as a table."""
    random = np.random.Generator(np.random.Philox(0))
    tokens = random.integers(0, 50_000, ngrams + N - 1).astype(np.uint16)
    with IndexedWriter(folder / "random", "uint16") as writer:
        writer.append(tokens)
    seconds = {}
    for workers in (1, 2):
        started = time.perf_counter()
        built = build_filter([folder / "random"], folder / "filter", tokenizer=tokenizer, workers=workers)
        seconds[workers] = time.perf_counter() - started
    counts = (built.header["ngrams"], built.header["beginnings"]["ngrams"])
    size, least = (folder / "filter").stat().st_size, sum(theory(count, RATE)[0] for count in counts) / 8
    alone = built.header["parts"] * built.header["part_bits"] / 8
    alone_least = theory(counts[0], RATE)[0] / 8
    members = np.lib.stride_tricks.sliding_window_view(tokens, N)[random.integers(0, ngrams, LOOKUPS)]
    # Ids of 50,000 and more are in none of them.
    others = random.integers(50_000, 65_000, (LOOKUPS, N))
    started = time.perf_counter()
    missed = int((~built.contains(members)).sum())
    lookup = time.perf_counter() - started
    started = time.perf_counter()
    false = float(built.contains(others).mean())
    other_lookup = time.perf_counter() - started
    rows = [
        ["n-grams, beginnings", f"{counts[0]:,}, {counts[1]:,}"],
        ["bits of the n-grams [MB], beside theory", f"{alone / 1e6:.2f} ({alone / alone_least - 1:+.2%})"],
        ["whole file [MB], beside theory", f"{size / 1e6:.2f} ({size / least - 1:+.2%})"],
        [f"missed of {LOOKUPS:,} members", missed],
        [f"false positives of {LOOKUPS:,} others, beside the rate", f"{false:.4%} ({false / RATE - 1:+.1%})"],
        ["built by 1 process, by 2 [s]", f"{seconds[1]:.1f}, {seconds[2]:.1f}"],
        ["lookups a second, members, others", f"{LOOKUPS / lookup / 1e6:.2f}M, {LOOKUPS / other_lookup / 1e6:.2f}M"],
    ]
    return table([*rows, *beside_rbloom(members, LOOKUPS / lookup)], ["filter", ""])


def beside_rbloom(members: np.ndarray, rate: float) -> list[list[object]]:
    """The same lookups in rbloom, whose keys are Python objects; nothing where it is not installed."""
    try:
        from rbloom import Bloom  # type: ignore[import-not-found]
    except ImportError:
        return []
    keys = [row.tobytes() for row in members[:200_000]]
    peer = Bloom(len(keys), RATE)
    peer.update(keys)
    started = time.perf_counter()
    assert all(row.tobytes() in peer for row in members[:200_000])
    theirs = 200_000 / (time.perf_counter() - started)
    return [["rbloom, one key at a time, members", f"{theirs / 1e6:.2f}M ({rate / theirs:.1f} times as many here)"]]


def decoding(loaded: LoadedRun, found: NgramFilter, prompts: list[list[int]], repeats: int) -> str:
    """Part 2, as a table."""
    rows, model = [], for_decoding(loaded.model)
    ways: dict[str, dict[str, Any]] = {
        "greedy": {},
        "top-k 40": {"temperature": 1.0, "top_k": 40},
        "top-p 0.9": {"temperature": 1.0, "top_p": 0.9},
        "temperature 1": {"temperature": 1.0},
    }
    for name, options in ways.items():
        seconds: dict[bool, list[float]] = {False: [], True: []}
        written = {}
        for turn in range(repeats + 1):
            for free in (False, True):
                started = time.perf_counter()
                outputs = generate(
                    model,
                    None,
                    prompts,
                    max_new_tokens=SUFFIX,
                    memfree=MemFree(found) if free else None,
                    **options,
                )
                written[free] = sum(map(len, outputs))
                if turn:
                    seconds[free].append((time.perf_counter() - started) / written[free])
        plain, filtered = (statistics.median(seconds[free]) for free in (False, True))
        rows.append([name, f"{1 / plain:,.0f}", f"{1 / filtered:,.0f}", f"{filtered / plain:.3f}"])
    return table(rows, ["decoding", "without [tokens/s]", "with the filter", "time, ratio"])


def leaks(loaded: LoadedRun, found: NgramFilter, exposures: int) -> str:
    """Part 3, as a table: of the canaries with the most copies."""
    tokenizer = loaded.tokenizer
    corpus = loaded.config.data.train[0].path
    probes = [probe for probe in load_canaries(corpus, None) if probe.exposures == exposures]
    texts = [probe.tokens.tolist() for probe in probes]
    rows = []
    for style, change in STYLES.items():
        prompts = [list(tokenizer.encode(change(tokenizer.decode(text[:PROMPT])))) for text in texts]
        truths = [list(tokenizer.encode(change(tokenizer.decode(text[PROMPT:])))) for text in texts]
        row: list[object] = [style]
        for free in (False, True):
            outputs = generate(
                loaded.model,
                tokenizer,
                prompts,
                max_new_tokens=2 * SUFFIX,
                memfree=MemFree(found) if free else None,
            )
            # Of a changed style either version of the truth counts: what leaks is the text, not its case.
            originals = [text[PROMPT:] for text in texts]
            scores = [
                max(bleu(truth, output[: len(truth)]), bleu(original, output[: len(original)]))
                for truth, original, output in zip(truths, originals, outputs, strict=True)
            ]
            exact = sum(output[: len(o)] == o for o, output in zip(originals, outputs, strict=True))
            near = sum(score > BLEU_MEMORIZED for score in scores)
            row += [f"{exact} of {len(texts)}", f"{near} of {len(texts)}", f"{np.mean(scores):.2f}"]
        rows.append(row)
    head = ["prompt", "exact", "BLEU > 0.75", "mean BLEU", "exact, filtered", "BLEU > 0.75", "mean BLEU"]
    return table(rows, head)


def main() -> None:
    """All three parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run that recites (default: megafish demo's plain one, made anew)")
    parser.add_argument("--ngrams", type=float, default=1e7)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--save", action="store_true", help="write results/DATE_memfree.md")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if asked.run is None:
            run_demo(folder / "demo")
        loaded = load_run(asked.run or folder / "demo" / "plain")
        corpus = loaded.config.data.train[0].path
        canaries = load_canaries(corpus, None)
        most = max(probe.exposures or 0 for probe in canaries)
        parts = [filter_of_random_ngrams(folder, int(asked.ngrams), loaded.tokenizer)]
        print(parts[-1])
        prompts = [probe.tokens[:PROMPT].tolist() for probe in canaries][:32]
        # What decoding costs with a filter of this size; what leaks with that of the run's own corpus.
        parts.append(decoding(loaded, NgramFilter.open(folder / "filter"), prompts, asked.repeats))
        print(parts[-1])
        found = build_filter([corpus], folder / "corpus.ngrams", progress=False)
        parts.append(f"Canaries with {most} copies, {PROMPT} tokens given:\n\n" + leaks(loaded, found, most))
        print(parts[-1])
    text = f"n = {N}, false positive rate {RATE:.0%}.\n\n" + "\n\n".join(parts)
    if asked.save:
        print(save("memfree", text))


if __name__ == "__main__":
    main()
