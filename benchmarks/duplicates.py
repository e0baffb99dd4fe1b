"""Counting what a corpus repeats: the suffix array beside a plain count of every n-gram.

The corpus is the Python source installed here, the standard library and site-packages, as much as is asked for. A peer
is collections.Counter over the n-grams of each document (of the bytes of their ids, which is the leanest key), as one
writes it in a notebook. Both give the number of distinct n-grams that occur at least twice, which must agree; each runs
in a process of its own, whose peak memory is asked. The suffix array is kept, so that a later question costs only the
count.

    python benchmarks/duplicates.py [--length 50] [--megabytes 5 40] [--save]
"""

from __future__ import annotations

import argparse
import sysconfig
import tempfile
import time
from collections import Counter
from pathlib import Path

from common import run_isolated, save, table

from megafish.data.duplicates import Duplicates
from megafish.data.indexed import IndexedDataset, IndexedWriter
from megafish.data.readers import ReadOptions
from megafish.data.tokenizer import load_tokenizer, train_tokenizer
from megafish.demo import library_files

VOCAB = 8192
Answer = tuple[int, list[float]]
"""(distinct n-grams that occur at least twice, seconds of the parts)."""


def write_corpus(prefix: Path, tokenizer: Path, megabytes: int) -> int:
    """The first files in the order of their paths, up to `megabytes` of text; returns the tokens."""
    ids = load_tokenizer(tokenizer)
    left = megabytes * 10**6
    with IndexedWriter(prefix, "uint16") as writer:
        for place in ("stdlib", "purelib"):
            for file in sorted(Path(sysconfig.get_paths()[place]).rglob("*.py")):
                text = file.read_text(encoding="utf-8", errors="replace")
                if left <= 0:
                    break
                left -= len(text)
                writer.append(ids.encode(text))
    return IndexedDataset(prefix).num_tokens


def by_suffixes(prefix: Path, length: int) -> Answer:
    """Seconds: to sort the corpus, to count."""
    started = time.perf_counter()
    found = Duplicates.of(prefix, progress=False)
    opened = time.perf_counter()
    repeated = sum(len(part) for part in found.groups(length, minimum=2))
    return repeated, [opened - started, time.perf_counter() - opened]


def by_counter(prefix: Path, length: int) -> Answer:
    """Seconds: to count."""
    started = time.perf_counter()
    data = IndexedDataset(prefix)
    counts: Counter[bytes] = Counter()
    for number in range(data.num_documents):
        begin, end = data.bounds(number)
        text = data.tokens[begin:end].tobytes()
        counts.update(text[i : i + 2 * length] for i in range(0, len(text) - 2 * length + 1, 2))
    return sum(count > 1 for count in counts.values()), [time.perf_counter() - started]


def main() -> None:
    """Every size, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=50)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[5, 40])
    parser.add_argument("--save", action="store_true", help="write results/DATE_duplicates.md")
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        tokenizer = Path(name) / "tokenizer.model"
        options = ReadOptions(text_suffixes=(".py",))
        train_tokenizer(library_files(2_000_000, seed=0), tokenizer, VOCAB, options=options)
        for megabytes in asked.megabytes:
            prefix = Path(name) / f"corpus{megabytes}"
            tokens = write_corpus(prefix, tokenizer, megabytes)
            ours, peer = (run_isolated(way, prefix, asked.length) for way in (by_suffixes, by_counter))
            (repeated, (sort, count)), (expected, (plain,)) = ours.result, peer.result
            assert repeated == expected, (repeated, expected)
            memory, theirs = ((run.peak_bytes - run.base_bytes) / 2**20 for run in (ours, peer))
            rows.append(
                [
                    f"{tokens / 1e6:.1f}M",
                    f"{repeated:,}",
                    f"{plain:.1f}",
                    f"{sort:.1f} + {count:.1f}",
                    f"{plain / (sort + count):.1f}, {plain / count:.1f}",
                    f"{theirs:,.0f}",
                    f"{memory:,.0f}",
                    f"{theirs / memory:.1f}",
                ]
            )
            print(table(rows[-1:], HEAD), flush=True)
    text = f"n-grams of {asked.length} tokens; peak memory beyond that of the started process, mapped files among it."
    text += f"\n\n{table(rows, HEAD)}"
    print(text)
    if asked.save:
        print(save("duplicates", text))


HEAD = [
    "tokens", "repeated n-grams", "Counter [s]", "suffix array [s]: sort + count",
    "times as fast: first, later question", "Counter [MiB]", "suffix array [MiB]", "ratio",
]  # fmt: skip

if __name__ == "__main__":
    main()
