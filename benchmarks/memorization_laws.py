"""The three laws of Carlini et al. (2023, arXiv 2202.07646) in small: memorization against model size, copies, context.

Plain runs of four widths on the demo's corpus (Python's standard library, canaries at 0 to 160 copies), audited with
prompts of 4 to 40 tokens; share of canaries recited, fitted against the logarithm: pooled over seeds (of weights, data,
canaries and tokenizer), and of each seed. What is there already is not made again, so an interrupted call goes on.

    python benchmarks/memorization_laws.py [--folder FOLDER] [--seeds 0 1 2] [--quick] [--save]
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from common import save, table

from megafish.audit.plots import Panel, Series, draw, short_number, to_png
from megafish.audit.statistics import log_linear_fit, wilson_interval
from megafish.data.canary import CanaryConfig
from megafish.data.prepare import prepare
from megafish.data.readers import ReadOptions
from megafish.data.tokenizer import train_tokenizer
from megafish.demo import library_files
from megafish.run import read_json

WIDTHS = (64, 128, 192, 320)
EXPOSURES = (0, 4, 8, 16, 32, 64, 128)
COUNT, TOKENS, PROMPT, SUFFIX = 12, 80, 40, 24
LENGTHS, OFFSET = (4, 8, 16, 28, 40), 16
"""Prompts of the law of context begin inside the passage: a document's first tokens tell which one it is."""
IMAGES = Path(__file__).parents[1] / "docs" / "images"


def make_corpus(folder: Path, seed: int) -> Path:
    """The demo's text with canaries at more numbers of copies."""
    corpus, tokenizer = folder / "corpus", folder / "tokenizer.model"
    if not (corpus / "manifest.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        files = library_files(1_650_000, seed)
        train_tokenizer(files, tokenizer, 2048, options=ReadOptions(text_suffixes=(".py",)), seed=seed, overwrite=True)
        canaries = CanaryConfig(COUNT, TOKENS, EXPOSURES, seed=seed)
        prepare(files, corpus, tokenizer, text_suffixes=(".py",), valid_fraction=0.1, canaries=canaries, overwrite=True)
    return corpus


def run(folder: Path, corpus: Path, width: int, seed: int, *, quick: bool) -> dict[str, Any]:
    """The audit of one model."""
    path = folder / f"width{width}"
    done = path / "audited"
    tokens = read_json(corpus / "manifest.json")["splits"]["train"]["tokens"] // (40 if quick else 1)
    if not done.is_file():
        started = time.monotonic()
        shape = f"{{hidden_size: {width}, num_heads: {width // 32}, intermediate_size: {width * 8 // 3 // 32 * 32}}}"
        megafish(
            "train", "tiny", "--resume", f"run_dir={path}", f"data.train={corpus}", "goldfish.k=null",
            f"model={shape}", f"train={{supervised_tokens: {tokens}, global_batch_size: 4, micro_batch_size: 4}}",
            f"train.seed={seed}", f"data.seed={seed}", "optimizer.lr=4e-3", "checkpoint.interval=200",
            "schedule={min_lr_ratio: 0, warmup_fraction: 0.05}", "eval={interval: null, canaries: 0}",
        )  # fmt: skip
        megafish(
            "audit", str(path), f"audit.prompt_tokens={PROMPT}", f"audit.suffix_tokens={SUFFIX}", "audit.membership=0",
            f"audit.prompt_lengths={list(LENGTHS)}", f"audit.offsets=[{OFFSET}]",
        )  # fmt: skip
        done.touch()
        print(f"width {width}: {time.monotonic() - started:.0f} s", flush=True)
    return read_json(sorted((path / "audit").iterdir())[-1] / "summary.json")


def megafish(*words: str) -> None:
    """Run a command quietly."""
    subprocess.run([sys.executable, "-m", "megafish", *words], check=True, stdout=subprocess.DEVNULL)


class Point(NamedTuple):
    """A share of canaries."""

    x: float
    hits: int
    total: int

    @property
    def rate(self) -> float:
        """The share."""
        return self.hits / self.total


def points(summaries: dict[int, dict[str, Any]]) -> dict[str, list[Point]]:
    """The points of each law of one seed's models, pooled over what it is not about (control passages aside)."""

    def pooled(x: float, levels: list[dict[str, Any]]) -> Point:
        planted = [level for level in levels if level["exposures"]]
        return Point(x, *(sum(level[key] for level in planted) for key in ("exact_matches", "canaries")))

    largest = summaries[max(summaries)]
    levels = largest["extraction"]["levels"]
    inside = [cell for cell in largest["sweep"] if cell["offset"] == OFFSET]
    return {
        "parameters": [pooled(s["model"]["parameters"], s["extraction"]["levels"]) for s in summaries.values()],
        "copies": [pooled(level["exposures"], [level]) for level in levels if level["exposures"]],
        "tokens given": [pooled(cell["prompt_tokens"], cell["levels"]) for cell in inside],
    }


def law(against: str, seeds: list[list[Point]]) -> tuple[list[object], Panel]:
    """The row of the table, and the plot with the fitted line. seeds: the points of each, at the same places."""
    found = [Point(at[0].x, sum(a.hits for a in at), sum(a.total for a in at)) for at in zip(*seeds, strict=True)]
    x, y = [point.x for point in found], [point.rate for point in found]
    intervals = [wilson_interval(point.hits, point.total) for point in found]
    low, high = [a for a, _ in intervals], [b for _, b in intervals]
    series = [Series(x, y, "", False, 0, low, high)]
    row: list[object] = [against, "no change", ""]
    if len(set(y)) > 1:
        fit = log_linear_fit(x, y)
        slope = f"{100 * fit.slope:+.1f} points ({100 * fit.low:+.1f} to {100 * fit.high:+.1f})"
        row = [against, slope, f"{fit.r_squared:.3f} ({', '.join(map(r_squared, seeds))})"]
        series.append(Series(x, [fit.intercept + fit.slope * math.log10(a) for a in x], "", False, 0, fit=True))
    row.append(", ".join(f"{short_number(point.x)}: {point.hits}/{point.total}" for point in found))
    name = f"laws_{against.replace(' ', '_')}"
    panel = Panel(
        name, f"Recited, by {against}", against, "canaries [%]", series, log="x", percent=True, zero=True, top=1.0
    )  # fmt: skip
    return row, panel


def r_squared(found: list[Point]) -> str:
    """Of one seed's points."""
    y = [point.rate for point in found]
    return f"{log_linear_fit([point.x for point in found], y).r_squared:.3f}" if len(set(y)) > 1 else "no change"


def main() -> None:
    """Runs, table, plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the runs are kept, and continued from (default: nowhere)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="a fortieth of the training; the figures mean nothing")
    parser.add_argument("--save", action="store_true", help="write results/DATE_memorization_laws.md and the plots")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = []
        for seed in asked.seeds:
            folder = (asked.folder or Path(temporary)) / f"seed{seed}"
            corpus = make_corpus(folder, seed)
            found.append(points({width: run(folder, corpus, width, seed, quick=asked.quick) for width in WIDTHS}))
    rows, panels = zip(*(law(against, [each[against] for each in found]) for against in found[0]), strict=True)
    text = (
        f"Share of canaries recited ({PROMPT} tokens given, {SUFFIX} asked for) of {COUNT} a seed for each of "
        f"{', '.join(map(str, EXPOSURES[1:]))} copies, seeds {', '.join(map(str, asked.seeds))}; copies and tokens "
        f"given: the largest model; tokens given: beginning {OFFSET} tokens into the passage.\n\n"
    )
    text += table(rows, ["against", "for ten times as much (95 %)", "R^2 (of each seed)", "recited"])
    print(text)
    if asked.save and not asked.quick:
        print(save("memorization_laws", text))
        for panel in panels:
            (IMAGES / f"{panel.name}.png").write_bytes(to_png(draw(panel, "light")))


if __name__ == "__main__":
    main()
