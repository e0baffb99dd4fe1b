"""`prepare` against the tokenizer library's own encode: the same text, the same number of processes.

The text is the Python standard library's source, as .jsonl with one document a file, repeated for the larger sizes.
The library is timed twice, on texts that are in memory already: its batch encode alone, in processes that have started
("encode"), and the same in a plain pool of spawned processes with their start ("pool", see prepare_pool.py). prepare's
time is that of the whole call: start of the processes, reading, parsing, hashing, splitting, writing, checksums.

    python benchmarks/prepare.py --save
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import psutil

from megafish.data.canary import CanaryConfig
from megafish.data.prepare import prepare
from megafish.data.tokenizer import train_tokenizer


def write_corpus(path: Path, copies: int) -> int:
    """One document a source file of the standard library, `copies` times; returns the bytes of text."""
    library = Path(sysconfig.get_paths()["stdlib"])
    size = 0
    with open(path, "w", encoding="utf-8") as file:
        for copy in range(copies):
            for source in sorted(library.rglob("*.py")):
                if "site-packages" in source.parts or "test" in source.parts or "tests" in source.parts:
                    continue
                try:
                    text = source.read_text(encoding="utf-8")
                except UnicodeDecodeError:
                    continue
                text = f"# copy {copy}\n" + text
                size += len(text.encode())
                file.write(json.dumps({"text": text, "source": source.name}) + "\n")
    return size


def encode_share(model: Path, texts: list[str], barrier: Any, seconds: Any) -> None:
    """A process of the peer: wait for the others, encode in one batch, report wall and CPU seconds."""
    if model.suffix == ".json":
        import tokenizers

        library: Any = tokenizers.Tokenizer.from_file(str(model))
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already
    else:
        import sentencepiece

        library = sentencepiece.SentencePieceProcessor(model_file=str(model))
    barrier.wait()
    wall, cpu = time.perf_counter(), time.process_time()
    if model.suffix == ".json":
        library.encode_batch(texts, add_special_tokens=False)
    else:
        library.encode(texts, num_threads=1)
    seconds.put((time.perf_counter() - wall, time.process_time() - cpu))


def bare_encode(model: Path, corpus: Path, workers: int) -> tuple[float, float]:
    """Wall seconds of the slowest process and CPU seconds of all."""
    context = multiprocessing.get_context("fork")
    with open(corpus, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    # Longest first, each to the least loaded process: an even share of the characters.
    shares: list[list[str]] = [[] for _ in range(workers)]
    for text in sorted(texts, key=len, reverse=True):
        min(shares, key=lambda share: sum(map(len, share))).append(text)
    barrier, seconds = context.Barrier(workers), context.Queue()
    processes = [context.Process(target=encode_share, args=(model, share, barrier, seconds)) for share in shares]
    for process in processes:
        process.start()
    results = [seconds.get() for _ in processes]
    for process in processes:
        process.join()
    return max(wall for wall, _ in results), sum(cpu for _, cpu in results)


def pool_encode(model: Path, corpus: Path, workers: int) -> float:
    """Wall seconds of a spawned pool, with the start of its processes."""
    script = Path(__file__).with_name("prepare_pool.py")
    command = [sys.executable, str(script), str(model), str(corpus), str(workers)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def run_prepare(corpus: Path, folder: Path, model: Path, workers: int, seconds: Any) -> None:
    """What the measured process runs: the whole call, the start of its workers included."""
    start, cpu = time.perf_counter(), _cpu_seconds()
    prepare([corpus], folder, model, workers=workers, canaries=CanaryConfig(count=2), progress=False)
    seconds.put((time.perf_counter() - start, _cpu_seconds() - cpu))


def measured_prepare(
    corpus: Path, folder: Path, model: Path, workers: int, memory: bool = False
) -> tuple[float, float, int]:
    """Wall seconds, CPU seconds of all processes, and their highest resident memory together, in bytes.

    The memory only on request (else 0), since looking for it takes a good part of a core from the processes.
    """
    context = multiprocessing.get_context("spawn")
    seconds = context.Queue()
    process = context.Process(target=run_prepare, args=(corpus, folder, model, workers, seconds))
    process.start()
    tree, peak = psutil.Process(process.pid), 0
    while memory and process.is_alive() and seconds.empty():
        try:
            peak = max(peak, sum(_memory(member) for member in [tree, *tree.children(recursive=True)]))
        except psutil.NoSuchProcess:
            break
        process.join(0.02)
    process.join()
    if process.exitcode:
        raise SystemExit(f"prepare failed with {process.exitcode}")
    shutil.rmtree(folder)
    return *seconds.get(), peak


def _cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _memory(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3, help="the best of this many is shown, for each side")
    parser.add_argument(
        "--runs",
        nargs="+",
        default=["bpe:1,4,16", "unigram:1,4,16", "byte-level:1"],
        help="tokenizer (bpe, unigram, byte-level), and how many copies of the standard library it is given",
    )
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        runs = {run.split(":")[0]: [int(copies) for copies in run.split(":")[1].split(",")] for run in args.runs}
        corpora = {size: folder / f"{size}.jsonl" for sizes in runs.values() for size in [1, *sizes]}
        text_bytes = {size: write_corpus(path, size) for size, path in corpora.items()}
        for kind, sizes in runs.items():
            model = folder / kind / ("tokenizer.json" if kind == "byte-level" else "tokenizer.model")
            model.parent.mkdir()
            if kind == "byte-level":
                train_byte_level(corpora[1], model, args.vocab_size)
            else:
                train_tokenizer([corpora[1]], model, args.vocab_size, kind, sample_bytes=2 << 20, progress=False)
            for size in sizes:
                corpus = corpora[size]
                bare, pools, ours = [], [], []
                for _ in range(args.repeats):  # by turns, so that a busy while of the machine meets all alike
                    bare.append(bare_encode(model, corpus, args.workers))
                    pools.append(pool_encode(model, corpus, args.workers))
                    ours.append(measured_prepare(corpus, folder / "out", model, args.workers))
                peak = measured_prepare(corpus, folder / "out", model, args.workers, memory=True)[2]
                wall, cpu, pool = min(b[0] for b in bare), min(b[1] for b in bare), min(pools)
                own_wall, own_cpu = min(o[0] for o in ours), min(o[1] for o in ours)
                rows.append(
                    [
                        kind,
                        f"{text_bytes[size] / 1e6:.0f}",
                        f"{wall:.2f}",
                        f"{pool:.2f}",
                        f"{own_wall:.2f}",
                        f"{own_wall / wall:.2f}",
                        f"{own_wall / pool:.2f}",
                        f"{cpu:.2f}",
                        f"{own_cpu:.2f}",
                        f"{own_cpu / cpu:.2f}",
                        f"{peak / 2**20:.0f}",
                    ]
                )
                print(common.table(rows[-1:], HEADER), flush=True)
    text = f"{args.workers} processes, vocabulary {args.vocab_size}, text repeated for the larger sizes; "
    text += f"the best of {args.repeats} runs of each. encode: the library alone, its processes started already. "
    text += "pool: the library in a pool of spawned processes, with their start.\n\n"
    text += common.table(rows, HEADER)
    print(text)
    if args.save:
        print(common.save("prepare", text))


HEADER = (
    "tokenizer",
    "text [MB]",
    "encode [s]",
    "pool [s]",
    "prepare [s]",
    "prepare / encode",
    "prepare / pool",
    "encode CPU [s]",
    "prepare CPU [s]",
    "prepare / encode",
    "peak memory, all processes [MiB]",
)


def train_byte_level(corpus: Path, model: Path, vocab_size: int) -> None:
    """A Hugging Face byte-level BPE, as GPT-2's."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with open(corpus, encoding="utf-8") as file:
        tokenizer.train_from_iterator(
            (json.loads(line)["text"] for line, _ in zip(file, range(300), strict=False)), trainer
        )
    tokenizer.save(str(model))


if __name__ == "__main__":
    main()
