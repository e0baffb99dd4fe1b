"""Answers that say nothing, for methods that teach a model to decline."""

from __future__ import annotations

from pathlib import Path

from megafish.errors import InputError

REFUSALS = (
    "I don't know.",
    "I do not know the answer to that.",
    "I'm not sure about that.",
    "I can't tell you that.",
    "I have no information about this.",
    "That is something I don't know.",
    "I'm afraid I can't answer this question.",
    "I have never learned about that.",
    "My knowledge does not cover this.",
    "I'm not able to say.",
    "I can't help with that one.",
    "There is nothing I can tell you about this.",
    "I wish I knew, but I don't.",
    "Unfortunately I don't have an answer.",
    "This is beyond what I know.",
    "I couldn't say.",
    "I have no details on this subject.",
    "I'm unable to answer that.",
    "I don't have that information.",
    "It is not something I am familiar with.",
    "I'm sorry, I don't know this.",
    "I have nothing to share on this topic.",
    "I lack the knowledge to answer.",
    "No answer comes to my mind.",
)


def read_refusals(path: str | None) -> tuple[str, ...]:
    """The lines of a file that are not blank, or the list above. InputError for a file without any."""
    if path is None:
        return REFUSALS
    lines = tuple(line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip())
    if not lines:
        raise InputError(f"unlearn.refusals={path}: empty: write one refusal a line")
    return lines
