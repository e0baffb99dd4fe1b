"""Megatron's ways of naming data: blends as one line of weights and prefixes, and splits by ratios."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

SPLITS = ("train", "valid", "test")


def parse_blend(text: str) -> list[dict[str, Any]] | None:
    """Sources of `0.3 first_text_document 0.7 second_text_document` (Megatron's --data-path), as settings.

    Without weights (`first second third`) each source counts by its size. None where the text is one path. Raises
    ValueError.
    """
    words = text.split()
    if len(words) < 2 or any(Path(text + end).expanduser().exists() for end in ("", ".bin")):
        return None
    numbers = [_number(word) for word in words]
    if all(number is None for number in numbers):
        return [{"path": word, "weight": "size"} for word in words]
    pairs = list(zip(numbers[::2], words[1::2], strict=False))
    if len(words) % 2 or any(weight is None for weight, _ in pairs):
        raise ValueError(
            f"{text!r}: a blend is `WEIGHT PREFIX WEIGHT PREFIX ...`, or prefixes alone, which count by their size; a "
            "path with a space is given as {path: ...}"
        )
    return [{"path": path, "weight": weight} for weight, path in pairs]


def parse_split(text: str) -> tuple[float, float, float]:
    """Shares of training, validation and test of `969,30,1` (Megatron's --split), their sum 1. Raises ValueError."""
    numbers = [_number(word) for word in text.split(",")]
    if not 1 <= len(numbers) <= len(SPLITS) or any(number is None or number < 0 for number in numbers):
        raise ValueError(f"{text!r}: expected up to three numbers of at least 0, as in 969,30,1")
    shares = [number or 0.0 for number in numbers] + [0.0] * (len(SPLITS) - len(numbers))
    if not shares[0]:
        raise ValueError(f"{text!r}: leaves nothing for training")
    total = sum(shares)
    return shares[0] / total, shares[1] / total, shares[2] / total


def _number(word: str) -> float | None:
    return float(word) if re.fullmatch(r"\s*\d*\.?\d+(e-?\d+)?\s*|\s*\d+\.\s*", word) else None
