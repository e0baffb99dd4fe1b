"""Samples that a run leaves out: those of steps that were refused, kept in RUN/quarantine.jsonl.

The samples of a run are numbered 0, 1, 2, ... (data/order.py). A run reads the numbers that are not in quarantine, in
order, so that leaving samples out is a property of the sequence and not of the steps: any number of processes and any
batch size reads the same one. A position in it is the number before which everything is read or left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megafish.errors import InputError
from megafish.run import write_atomic

Ints = npt.NDArray[np.int64]


class Quarantine:
    """Ranges [first, first + count) of sample numbers, merged where they touch. Immutable."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        merged: list[list[int]] = []
        for first, end in sorted((first, first + count) for first, count in ranges):
            if merged and first <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([first, end])
        self.ranges = [(first, end - first) for first, end in merged]
        self._bounds = np.array(merged, dtype=np.int64).reshape(-1, 2)

    @classmethod
    def read(cls, path: Path) -> Quarantine:
        """The list at `path`, empty where there is none. InputError names the line that is damaged."""
        return cls((entry["first_sample"], entry["samples"]) for entry in read_entries(path))

    def __len__(self) -> int:
        """How many samples are left out."""
        return sum(count for _, count in self.ranges)

    def with_range(self, first: int, count: int) -> Quarantine:
        """These ranges and one more."""
        return Quarantine([*self.ranges, (first, count)])

    def numbers(self, position: int, count: int) -> Ints:
        """The next `count` sample numbers from `position` on that are not left out: int64 [count], ascending."""
        found = np.arange(position, position + count, dtype=np.int64)
        # Every range that begins at or before a number pushes it, and all after it, on by the range's length.
        for first, end in self._bounds:
            start = max(int(first), position)
            if end > start:
                found[found >= start] += end - start
        return found


def number_ranges(numbers: Ints) -> list[list[int]]:
    """Ascending sample numbers as [first, how many] of each stretch without a gap."""
    stretches = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    return [[int(stretch[0]), len(stretch)] for stretch in stretches]


def append_entry(path: Path, entry: dict[str, Any]) -> None:
    """Add a line to quarantine.jsonl, so that a kill leaves it whole: with the line or without."""
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    write_atomic(path, before + json.dumps(entry) + "\n")


def read_entries(path: Path) -> list[dict[str, Any]]:
    """Lines of quarantine.jsonl as written; [] where there is no file."""
    if not path.is_file():
        return []
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            first, count = entry["first_sample"], entry["samples"]
            valid = type(first) is int and type(count) is int and first >= 0 and count > 0
        except (ValueError, KeyError, TypeError):
            valid = False
        if not valid:
            raise InputError(
                f"{path}: line {number}: expected a JSON object with first_sample (0 or more) and samples (1 or more): "
                "mend the line, or remove it to have its samples read"
            )
        entries.append(entry)
    return entries
