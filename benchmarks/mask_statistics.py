"""What the goldfish-v1 mask does to real text: gaps, rates, and copies that fare alike. Draws docs/images/mask.png.

The text is Python's standard library, tokenized as benchmarks/patches.py does it.

    python benchmarks/mask_statistics.py [--save]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from common import save, table
from matplotlib.figure import Figure
from patches import make_corpus

from megafish.data.indexed import IndexedDataset
from megafish_kernels import goldfish_drop

K, H, COPIES = 4, 13, 2000
IMAGE = Path(__file__).parents[1] / "docs" / "images" / "mask.png"
_Ids = npt.NDArray[np.int64]


def gaps(documents: list[_Ids]) -> _Ids:
    """Distances between neighbouring dropped tokens of a document."""
    return np.concatenate([np.diff(np.flatnonzero(goldfish_drop(document, k=K, h=H))) for document in documents])


def rates(documents: list[_Ids]) -> tuple[list[float], npt.NDArray[np.float64]]:
    """(drop rate of each document with 2,000 tokens or more, the deviations from 1/k that chance would give them)."""
    long = [document for document in documents if len(document) >= 2000]
    found = [float(np.asarray(goldfish_drop(document, k=K, h=H))[H:].mean()) for document in long]
    # A context that comes again has one decision for all of its tokens.
    views = [np.lib.stride_tricks.sliding_window_view(document[:-1], H) for document in long]
    counts = [np.unique(view, axis=0, return_counts=True)[1] for view in views]
    weights = np.array([np.sqrt((count.astype(float) ** 2).sum()) / count.sum() for count in counts])
    return found, np.sqrt((1 / K) * (1 - 1 / K)) * weights


def agreement(documents: list[_Ids]) -> npt.NDArray[np.float64]:
    """Passages of 40 tokens behind two different contexts: share of equal decisions by place in the passage."""
    rng = np.random.default_rng(0)
    stream = np.concatenate(documents)
    equal = np.zeros(40)
    for _ in range(COPIES):
        passage, one, two = (stream[at : at + 40] for at in rng.integers(0, len(stream) - 40, 3))
        masks = [np.asarray(goldfish_drop(np.concatenate((before, passage)), k=K, h=H)) for before in (one, two)]
        equal += masks[0][40:] == masks[1][40:]
    return equal / COPIES


def plot(found: _Ids, by_document: list[float], deviations: npt.NDArray[np.float64], alike: Any) -> None:
    """Three panels."""
    figure = Figure(figsize=(11, 3), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    lengths = np.arange(1, 31)
    left.bar(lengths, [(found == length).mean() for length in lengths], color="tab:blue", label="measured")
    left.plot(lengths, (1 - 1 / K) ** (lengths - 1) / K, color="tab:orange", label="independent decisions")
    left.set(xlabel="distance between dropped tokens", ylabel="share", yscale="log")
    left.legend()
    middle.hist((np.array(by_document) - 1 / K) / deviations, bins=40, density=True, color="tab:blue")
    x = np.linspace(-4, 4, 200)
    middle.plot(x, np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi), color="tab:orange")
    middle.set(xlabel="drop rate of a document [deviations]", ylabel="density")
    right.plot(np.arange(40), alike, marker=".", color="tab:blue")
    right.axvline(H, color="0.7", linestyle=":")
    right.axhline((1 - 1 / K) ** 2 + 1 / K**2, color="tab:orange")
    right.set(xlabel="place in a passage with two contexts", ylabel="equal decisions", ylim=(0.5, 1.03))
    figure.savefig(IMAGE, dpi=150)


def main() -> None:
    """The figures and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="a corpus that is there already")
    parser.add_argument("--save", action="store_true", help="write results/DATE_mask_statistics.md and the plot")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = IndexedDataset((asked.corpus or make_corpus(Path(folder), 8192)) / "train")
        documents = [np.asarray(data.document(number)).astype(np.int64) for number in range(len(data))]
    found, (by_document, deviations), alike = gaps(documents), rates(documents), agreement(documents)
    tokens = sum(map(len, documents))
    dropped = sum(int(np.asarray(goldfish_drop(document, k=K, h=H)).sum()) for document in documents)
    eligible = sum(max(0, len(document) - H) for document in documents)
    scaled = (np.array(by_document) - 1 / K) / deviations
    rows = [
        ["tokens", f"{tokens:,}"],
        ["drop rate of those with h tokens before them", f"{dropped / eligible:.4f}"],
        ["mean distance between dropped tokens", f"{found.mean():.3f}"],
        ["99.9 % of the distances are at most", f"{int(np.quantile(found, 0.999))}"],
        ["documents of 2,000 tokens or more", f"{len(by_document)}"],
        ["their drop rates, standard deviation in units of chance's", f"{scaled.std():.3f}"],
        ["equal decisions in two contexts, first token", f"{alike[0]:.3f}"],
        [f"from place {H} on", f"{alike[H:].min():.3f}"],
    ]
    text = f"goldfish-v1, k = {K}, h = {H}, seed 0.\n\n{table(rows, ['', ''])}"
    print(text)
    if asked.save:
        plot(found, by_document, deviations, alike)
        print(save("mask_statistics", text), IMAGE)


if __name__ == "__main__":
    main()
