"""Data loading on one core: tokens per second with and without the goldfish mask, and start-up on 10 million documents.

The peers read the same .bin/.idx and batch in the same process: megatron-core's GPTDataset (with the positions and the
loss mask of packed documents; skipped where the package is missing: `pip install --no-deps megatron-core`), and a plain
memory-mapped torch Dataset of shuffled chunks that knows neither documents nor masks. No peer has the mask.

    python benchmarks/loader.py [--save]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from megafish.config import GoldfishConfig
from megafish.data.corpus import Corpus, SampleStream, SourceSpec
from megafish.data.indexed import CODES, HEADER, MAGIC, VERSION
from megafish.data.loader import Loader
from megafish.objective.goldfish import GoldfishMask

SEQUENCE_LENGTH = 2048
MICRO_BATCH = 8
VOCABULARY = 32000
EOS = 0


def write_corpus(prefix: Path, documents: int, mean_length: int) -> None:
    """A pair of random documents that end in EOS, ids Zipf-like, written at one go (the writer is not measured)."""
    rng = np.random.default_rng(0)
    lengths = rng.geometric(1 / mean_length, documents).astype(np.int32) + 1
    ends = np.cumsum(lengths, dtype=np.int64)
    tokens = (VOCABULARY ** rng.random(int(ends[-1]), dtype=np.float32)).astype(np.uint16)
    tokens[ends - 1] = EOS
    tokens.tofile(prefix.with_suffix(".bin"))
    with open(prefix.with_suffix(".idx"), "wb") as index:
        index.write(HEADER.pack(MAGIC, VERSION, CODES[tokens.dtype], documents, documents + 1))
        index.write(lengths.tobytes())
        index.write(((ends - lengths) * tokens.itemsize).tobytes())
        index.write(np.arange(documents + 1, dtype=np.int64).tobytes())


def one_core() -> None:
    """Bind this process, and all threads that it starts, to one core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def megafish(prefix: Path, settings: dict[str, Any]) -> Iterator[Any]:
    mask = GoldfishMask(GoldfishConfig(**settings)) if settings else None
    stream = SampleStream([SourceSpec(Corpus(prefix))], SEQUENCE_LENGTH, 0, mask.halo if mask else 0)
    return (step.micro_batches[0] for step in Loader(stream, mask, MICRO_BATCH, MICRO_BATCH).steps())


class Chunks(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Chunk i of a memory-mapped token file, as many small trainers read it."""

    def __init__(self, prefix: Path) -> None:
        self.tokens = np.memmap(prefix.with_suffix(".bin"), dtype=np.uint16, mode="r")

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // SEQUENCE_LENGTH

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        begin = index * SEQUENCE_LENGTH
        chunk = torch.from_numpy(self.tokens[begin : begin + SEQUENCE_LENGTH + 1].astype(np.int64))
        return chunk[:-1], chunk[1:]


def plain(prefix: Path, settings: dict[str, Any]) -> Iterator[Any]:
    data = Chunks(prefix)
    while True:
        yield from DataLoader(data, batch_size=MICRO_BATCH, shuffle=True, drop_last=True)


def megatron(prefix: Path, settings: dict[str, Any]) -> Iterator[Any]:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    class Ids:
        """What GPTDataset asks of a tokenizer."""

        eod = EOS
        pad = EOS
        vocab_size = VOCABULARY
        unique_identifiers: dict[str, str] = {"class": "Ids"}  # noqa: RUF012 - the name and form that it looks for

    indexed = IndexedDataset(str(prefix))
    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=SEQUENCE_LENGTH,
        split="1,0,0",
        tokenizer=Ids(),
        path_to_cache=str(prefix.parent / "megatron-cache"),
        reset_position_ids=True,
        reset_attention_mask=False,
        eod_mask_loss=True,
        create_attention_mask=False,
        allow_ambiguous_pad_tokens=True,
    )
    documents = np.arange(len(indexed), dtype=np.int32)
    data = GPTDataset(indexed, str(prefix), documents, None, Split.train, config)
    while True:
        yield from DataLoader(data, batch_size=MICRO_BATCH, shuffle=False, drop_last=True)


READERS: dict[str, Callable[[Path, dict[str, Any]], Iterator[Any]]] = {
    "megafish": megafish,
    "megatron-core": megatron,
    "plain": plain,
}


def throughput(reader: str, prefix: Path, settings: dict[str, Any], seconds: float) -> float:
    """Input tokens per second of processor time, all threads together, after a warm-up.

    Processor time, so that other programs on the machine do not count; on a free core it is the wall time.
    """
    one_core()
    batches = READERS[reader](prefix, settings)
    for _ in range(10):
        next(batches)
    count, begin = 0, time.process_time()
    while time.process_time() - begin < seconds:
        next(batches)
        count += 1
    rate = count * MICRO_BATCH * SEQUENCE_LENGTH / (time.process_time() - begin)
    if hasattr(batches, "close"):
        batches.close()
    return rate


def startup(reader: str, prefix: Path) -> float:
    """Seconds from the name of a corpus to its first batch, imports not counted."""
    one_core()
    if reader == "megatron-core":
        import megatron.core.datasets.gpt_dataset  # noqa: F401
    begin = time.perf_counter()
    batches = READERS[reader](prefix, {"k": 4, "h": 13})
    next(batches)
    seconds = time.perf_counter() - begin
    if hasattr(batches, "close"):
        batches.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000_000, help="documents of the start-up corpus")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one measurement")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved measurements of each; the median is shown")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/DATE_loader.md")
    options = parser.parse_args()

    cases: list[tuple[str, str, dict[str, Any]]] = [
        ("megafish, no mask", "megafish", {}),
        ("megafish, goldfish k=4 h=13", "megafish", {"k": 4, "h": 13}),
        ("megafish, goldfish k=4 h=50", "megafish", {"k": 4, "h": 50}),
        ("plain torch Dataset, no mask", "plain", {}),
    ]
    starts = ["megafish"]
    if importlib.util.find_spec("megatron") is not None:
        cases.append(("megatron-core GPTDataset, no mask", "megatron-core", {}))
        starts += ["megatron-core", "megatron-core"]

    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "corpus"
        write_corpus(prefix, 100_000, 500)
        rates: dict[str, list[float]] = {name: [] for name, _, _ in cases}
        for _ in range(options.repeats):
            for name, reader, settings in cases:
                isolated = common.run_isolated(throughput, reader, prefix, settings, options.seconds)
                rates[name].append(isolated.result)
                print(f"{name}: {isolated.result / 1e6:.1f} M tokens/s", flush=True)
        best = {name: statistics.median(values) for name, values in rates.items()}
        slowest_mask = best["megafish, goldfish k=4 h=13"]
        rows = [[name, f"{best[name] / 1e6:.1f}", f"{slowest_mask / best[name]:.2f}"] for name, _, _ in cases]

        large = Path(folder) / "large"
        write_corpus(large, options.documents, 10)
        started = []
        for number, reader in enumerate(starts):
            isolated = common.run_isolated(startup, reader, large)
            label = reader if reader == "megafish" else f"{reader}, {'first time' if number == 1 else 'from its cache'}"
            memory = (isolated.peak_bytes - isolated.base_bytes) / 2**20
            started.append([label, f"{isolated.result:.2f}", f"{memory:.0f}"])

    text = "\n\n".join(
        [
            f"One core, batches of {MICRO_BATCH} x {SEQUENCE_LENGTH} tokens, 100,000 documents of 500 tokens on "
            f"average in the page cache, vocabulary {VOCABULARY}; median of {options.repeats} runs of "
            f"{options.seconds:g} s of processor time (all threads).",
            common.table(rows, ["loader", "M tokens/s", "goldfish h=13 / this"]),
            f"Start-up, from the corpus's name to the first batch, wall time, {options.documents:,} documents (mapped "
            "pages of the files count as memory):",
            common.table(started, ["loader", "s", "memory growth [MiB]"]),
        ]
    )
    print(f"\n{text}")
    if options.save:
        print(f"\nsaved {common.save('loader', text)}")


if __name__ == "__main__":
    main()
