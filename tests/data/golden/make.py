"""Files and numbers made by megatron-core itself, for test_megatron: `python tests/data/golden/make.py`.

Made with megatron-core 0.16.1 (`pip install --no-deps megatron-core==0.16.1`).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

HERE = Path(__file__).parent
# Documents as lists of sequences: an empty document, an empty sequence, several sequences.
DOCUMENTS = [[[1, 2, 3]], [], [[4], [5, 6]], [[]], [[7, 8, 9, 10]], [[65499 % 60000, 0]], []]
SPLITS = ["969,30,1", "99,1,0", "98,2", "100", "1,1,1", "0.9,0.1,0", "7,2,1", ".5,.25,.25", "33,33,34"]
COUNTS = [1, 2, 3, 5, 7, 10, 17, 50, 99, 100, 101, 999, 1000, 1001, 12345, 1000003]


def main() -> None:
    """Write both."""
    for dtype in (np.uint16, np.int32):
        prefix = HERE / f"megatron_{np.dtype(dtype).name}"
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        for sequences in DOCUMENTS:
            for sequence in sequences:
                builder.add_item(torch.tensor(sequence, dtype=torch.int64))
            builder.end_document()
        builder.finalize(f"{prefix}.idx")
    ranges = {}
    for split in SPLITS:
        matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
        ranges[split] = {
            str(count): [
                # The two lines of BlendedMegatronDatasetBuilder._build_megatron_dataset_splits.
                None if ends is None else [round(ends[0] * float(count)), round(ends[1] * float(count))]
                for ends in matrix
            ]
            for count in COUNTS
        }
    (HERE / "megatron_splits.json").write_text(json.dumps(ranges) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
