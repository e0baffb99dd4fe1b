"""How many "dropped" tokens of a passage are supervised after all, when it is read at random places of samples.

Where a mask is made for each sample by itself, as the published code does, the first h - 1 targets of a sample have no
whole window and are always supervised; a passage that is read N times, cut at random, leaks (facts: 1 - (1 - (h - 1) /
S)^N). megafish's samples carry the context before them. Both masks are made by the functions that training uses.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from common import table

from megafish.config import GoldfishConfig
from megafish.data.corpus import Corpus, SampleStream, SourceSpec
from megafish.data.indexed import IndexedWriter
from megafish.objective.goldfish import GoldfishMask

SETTINGS = ((2048, 13, 50), (4096, 50, 128))
"""(sequence length S, window h, copies N) of the facts' two cases: the paper's and Apertus'."""
LENGTH, K, VOCAB = 512, 4, 30_000


def leakage(folder: Path, scheme: str, length: int, h: int, copies: int, seed: int = 0) -> float:
    """Share of a passage's tokens that are dropped in some copy and supervised in another."""
    random = np.random.Generator(np.random.Philox(seed))
    passage = random.integers(1, VOCAB, LENGTH)
    # Filler of random lengths between the copies moves them over the samples; the end-of-text id is 0.
    texts = [(passage, random.integers(1, VOCAB, int(random.integers(1, 2 * length)))) for _ in range(copies)]
    place = folder / f"leakage_{scheme}_{length}"
    with IndexedWriter(place, "uint16") as writer:
        for copy, filler in texts:
            writer.append(np.append(copy, 0))
            writer.append(np.append(filler, 0))
    config = GoldfishConfig.model_validate({"k": K, "h": h, "scheme": scheme})
    mask = GoldfishMask(config)
    stream = SampleStream([SourceSpec(Corpus(place))], length, seed=0, halo=mask.halo)
    dropped, kept = np.zeros(LENGTH, dtype=bool), np.zeros(LENGTH, dtype=bool)
    starts = {int(i) for i in np.flatnonzero(_begins(stream.sources[0].corpus, passage))}
    for number in range(stream.unique_samples):
        locations = stream.locate(number, 1)
        first = int(locations.start[0])
        drop = mask([stream.read(number)])[0]
        for start in starts:
            # Entry j of the mask is token first + 1 + j of the stream.
            places = np.arange(LENGTH) + start - first - 1
            inside = (places >= 0) & (places < length)
            dropped[inside] |= drop[places[inside]]
            kept[inside] |= ~drop[places[inside]]
    return float((dropped & kept).sum() / max(dropped.sum(), 1))


def _begins(corpus: Corpus, passage: np.ndarray) -> np.ndarray:
    """Where documents that are the passage begin: bool [tokens]."""
    found = np.zeros(corpus.num_tokens, dtype=bool)
    for number in range(corpus.num_documents):
        start, end = corpus.data.bounds(number)
        if end - start == LENGTH + 1 and np.array_equal(corpus.data.tokens[start : end - 1], passage):
            found[start] = True
    return found


def leakage_table(folder: Path) -> str:
    """Measured, beside the formula."""
    rows = []
    for length, h, copies in SETTINGS:
        expected = 1 - (1 - (h - 1) / length) ** copies
        shares = {
            scheme: np.mean([leakage(folder, scheme, length, h, copies, seed) for seed in range(5)])
            for scheme in ("table", "goldfish-v1")
        }
        rows.append(
            [
                f"S = {length}, h = {h}, {copies} copies",
                f"{expected:.1%}",
                f"{shares['table']:.1%}",
                f"{shares['goldfish-v1']:.1%}",
            ]
        )
    head = ["tokens dropped in one copy, supervised in another", "formula", "mask of each sample", "megafish"]
    return table(rows, head)
