"""The peer of prepare.py as a script of its own: the library's encode in a plain pool of spawned processes.

Prints the seconds from the making of the pool to its last answer. Everything else is left out in the pool's favour: the
texts are in memory, the ids stay in the processes, and these import the library alone.

    python benchmarks/prepare_pool.py MODEL CORPUS PROCESSES
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from typing import Any

_CHUNK_CHARS = 1 << 18

library: Any = None


def load(model: str) -> None:
    global library
    if model.endswith(".json"):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already
        import tokenizers

        library = tokenizers.Tokenizer.from_file(model)
    else:
        import sentencepiece

        library = sentencepiece.SentencePieceProcessor(model_file=model)


def encode(texts: list[str]) -> int:
    """Encode in one batch; returns the number of texts."""
    if type(library).__module__.startswith("tokenizers"):
        return len(library.encode_batch(texts, add_special_tokens=False))
    return len(library.encode(texts, num_threads=1))


def chunks(texts: list[str]) -> list[list[str]]:
    made: list[list[str]] = []
    room = 0
    for text in texts:
        if room <= 0:
            made.append([])
            room = _CHUNK_CHARS
        made[-1].append(text)
        room -= len(text)
    return made


def main() -> None:
    model, corpus, processes = sys.argv[1:]
    with open(corpus, encoding="utf-8") as file:
        work = chunks([json.loads(line)["text"] for line in file])
    context = multiprocessing.get_context("spawn")
    start = time.perf_counter()
    with context.Pool(int(processes), load, (model,)) as pool:
        encoded = sum(pool.imap_unordered(encode, work))
        seconds = time.perf_counter() - start
    assert encoded == sum(map(len, work))
    print(seconds)


if __name__ == "__main__":
    main()
