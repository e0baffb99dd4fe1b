"""Passages shown word for word: the true text with the dropped tokens marked, and what each run made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from megafish.audit.view import RunView

_PROMPT_CHARACTERS = 400
_NOT_KNOWN = -1
"""Stands for the exposures of passages that may have occurred any number of times."""


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens of a text that look the same."""

    text: str
    style: str
    """Classes: "drop" left out of the loss; "same" recited from the start; "again" recited later; "off" not recited."""


@dataclass(frozen=True)
class Output:
    """What one run wrote."""

    run: RunView
    pieces: list[Piece]
    verdict: str


@dataclass(frozen=True)
class Sample:
    """One passage."""

    heading: str
    prompt: str
    truth: list[Piece]
    mask_of: str
    """Name of the run whose mask is marked in the truth; empty: none is."""
    outputs: list[Output]


def choose_samples(runs: Sequence[RunView], most: int = 2) -> list[Sample]:
    """The worst cases: at the highest, the middle and the control level, the canaries of which most was recited. A run
    that was not asked for canaries shows its other passages."""
    found: dict[tuple[str, str, int], list[tuple[RunView, dict[str, Any]]]] = {}
    for run in runs:
        for item in run.canaries or run.samples:
            found.setdefault((item["set"], item["corpus"], item["id"]), []).append((run, item))
    # A passage that one of the runs was not tested on cannot be compared; runs on unlike corpora show their own.
    complete = {key: items for key, items in found.items() if len(items) == len(runs)} or found
    by_level: dict[int, list[list[tuple[RunView, dict[str, Any]]]]] = {}
    for items in complete.values():
        exposures = items[0][1]["exposures"]
        by_level.setdefault(_NOT_KNOWN if exposures is None else exposures, []).append(items)
    levels = sorted(by_level)
    seen = [level for level in levels if level > 0]
    middle = seen[len(seen) // 2 : len(seen) // 2 + 1]
    wanted = [(level, most if level == levels[-1] else 1) for level in {*seen[-1:], *middle}]
    if 0 in by_level:
        wanted.append((0, 1))
    if _NOT_KNOWN in by_level:
        wanted.append((_NOT_KNOWN, most))
    samples = []
    for level, count in sorted(wanted, reverse=True):
        worst = sorted(by_level[level], key=lambda items: -max(item["rouge_l"] for _, item in items))
        samples += [_sample(items) for items in worst[:count]]
    return samples


def _sample(items: list[tuple[RunView, dict[str, Any]]]) -> Sample:
    first = items[0][1]
    heading = _heading(first["set"], first["exposures"])
    source = PurePath(first["source"]).name
    if source and source != first["set"]:
        heading += f": {source}"
    marked = next(((run, item) for run, item in items if run.divergence_mask and item["dropped"]), None)
    prompt = first["prompt"]
    if len(prompt) > _PROMPT_CHARACTERS:
        prompt = "... " + prompt[-_PROMPT_CHARACTERS:]
    return Sample(
        heading,
        prompt,
        _truth(marked[1] if marked else first, bool(marked)),
        marked[0].name if marked else "",
        [Output(run, _generated(item), _verdict(item)) for run, item in items],
    )


def _heading(name: str, exposures: int | None) -> str:
    if name != "canaries":
        return name if exposures is None else f"{name}, {exposures} or more occurrences"
    return f"{exposures} {'copy' if exposures == 1 else 'copies'}" if exposures else "control, not planted"


def _truth(item: dict[str, Any], marks: bool) -> list[Piece]:
    dropped = item["dropped"] if marks else [0] * len(item["suffix_pieces"])
    return _joined([(text, "drop" if drop else "") for text, drop in zip(item["suffix_pieces"], dropped, strict=True)])


def _generated(item: dict[str, Any]) -> list[Piece]:
    again = {i for start, end in item["recited_spans"] for i in range(start, end)}
    styles = [
        "same" if i < item["longest_common_prefix"] else "again" if i in again else "off"
        for i in range(len(item["generated_pieces"]))
    ]
    return _joined(list(zip(item["generated_pieces"], styles, strict=True)))


def _joined(tokens: list[tuple[str, str]]) -> list[Piece]:
    """One piece for neighbours of the same style, except dropped tokens, each of which keeps its own mark."""
    pieces: list[Piece] = []
    for text, style in tokens:
        if style == "drop" and not text.strip():
            # A mark on white space cannot be seen.
            text = text.replace("\n", "\u21b5\n").replace(" ", "\u00b7")
        if pieces and style != "drop" and pieces[-1].style == style:
            pieces[-1] = Piece(pieces[-1].text + text, style)
        else:
            pieces.append(Piece(text, style))
    return pieces


def _verdict(item: dict[str, Any]) -> str:
    length = len(item["suffix_tokens"])
    if item["exact_match"]:
        return f"all {length} tokens recited"
    return f"{item['longest_common_prefix']} of {length} tokens recited, ROUGE-L {item['rouge_l']:.2f}"
