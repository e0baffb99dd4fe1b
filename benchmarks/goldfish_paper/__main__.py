"""The goldfish paper (Hans et al. 2024, arXiv 2406.10209) in small: one command, three seeds.

Corpora of Python's standard library with canaries at 0 to 128 copies; a control run without them, a plain one, masks
of k = 3 to 128, static, random and inclusive ones, and near-duplicates with and without a canonical key. Each run
goes through `megafish train` and `megafish audit`; what is there already is not made again, so an interrupted call goes
on.

    python benchmarks/goldfish_paper --folder FOLDER [--seeds 3] [--quick] [--save]

--quick: one seed and a fortieth of the training, to see that everything works; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

from common import save  # noqa: E402
from experiments import RUNS, make_corpora, run_all  # noqa: E402
from figures import draw_figures  # noqa: E402
from leakage import leakage_table  # noqa: E402
from tables import report  # noqa: E402


def main() -> None:
    """Corpora, runs, audits, tables, plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the runs are kept, and continued from")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--save", action="store_true", help="write results/DATE_goldfish_paper.md and docs/images")
    asked = parser.parse_args()
    seeds = range(1 if asked.quick else asked.seeds)
    corpora = {seed: make_corpora(asked.folder / f"seed{seed}", seed) for seed in seeds}
    found = run_all(asked.folder, corpora, list(RUNS), quick=asked.quick)
    text = report(found) + "\n\n" + leakage_table(asked.folder)
    print(text)
    if asked.save and not asked.quick:
        print(save("goldfish_paper", text))
        for path in draw_figures(found, Path(__file__).parents[2] / "docs" / "images"):
            print(path)


if __name__ == "__main__":
    main()
