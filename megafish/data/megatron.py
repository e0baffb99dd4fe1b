"""Splits of .bin/.idx pairs by ratios, as Megatron makes them."""

from __future__ import annotations

from megafish.config_megatron import SPLITS
from megafish.data.indexed import IndexedDataset
from megafish.errors import InputError


def split_range(shares: tuple[float, float, float], split: str, documents: int) -> tuple[int, int]:
    """First document of a split and the one after its last, as Megatron rounds them
    (core/datasets/blended_megatron_dataset_builder.py)."""
    ends = [0.0]
    for share in shares:  # added up one by one: another order would round otherwise
        ends.append(ends[-1] + share)
    at = SPLITS.index(split)
    return round(ends[at] * float(documents)), round(ends[at + 1] * float(documents))


def cut(data: IndexedDataset, shares: tuple[float, float, float], split: str) -> tuple[IndexedDataset, tuple[int, int]]:
    """A split's part of a pair, and its range of documents. Raises InputError for an empty one."""
    if not data.one_sequence_each:
        raise InputError(
            f"{data.idx_path}: data.split counts documents of one sequence each, and some here have another number: "
            "write it without --split-sentences, or name other validation text in data.valid"
        )
    first, last = split_range(shares, split, data.num_documents)
    part = data.part(first, last)
    if not part.num_tokens:
        raise InputError(
            f"{data.idx_path}: data.split leaves no text of {data.num_documents} documents for {split}: change the "
            "numbers, or add documents"
        )
    return part, (first, last)
