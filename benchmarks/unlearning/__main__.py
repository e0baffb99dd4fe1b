"""What every method of unlearning does to small models that know made-up authors, poisons, harm and a book by heart.

    python benchmarks/unlearning --folder FOLDER [--save]

runs `megafish unlearn bench` with its usual plan, which takes an hour and a half on two cores and goes on where it was
stopped. --save puts its tables into results/ and its plots of the authors into docs/images/.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

from common import save  # noqa: E402

from megafish.unlearn.bench.bench import run_bench  # noqa: E402
from megafish.unlearn.bench.plan import Plan  # noqa: E402

IMAGES = Path(__file__).parents[2] / "docs" / "images"
PLOTS = ("trade_off", "stress", "relearning")


def main() -> None:
    """The bench, then its tables where the others are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the runs are kept, and continued from")
    parser.add_argument(
        "--save", action="store_true", help="write results/DATE_unlearning.md and docs/images/unlearn_*.png"
    )
    arguments = parser.parse_args()
    report = run_bench(arguments.folder, Plan()).parent
    if arguments.save:
        for name in PLOTS:
            shutil.copy(report / f"authors_{name}.png", IMAGES / f"unlearn_{name}.png")
        print(f"next: less {save('unlearning', (report / 'results.md').read_text(encoding='utf-8'))}")


if __name__ == "__main__":
    main()
