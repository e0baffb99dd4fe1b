"""How extraction depends on how much of a passage is given, where in it that begins, and how the text is decoded.

Under greedy decoding a suffix comes out word for word if and only if, given the true text, the most probable token is
the right one at each of its places. So one forward pass over a passage answers for every prompt length at once; no text
is generated. (Carlini et al. 2023, section 3.2, for lengths; Xu et al. 2025, arXiv 2505.13171, for offsets.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megafish.audit.levels import exposure_levels, mean_occurrences, rate
from megafish.audit.metrics import extraction_strength
from megafish.audit.probes import Probe
from megafish.audit.scores import TokenScores, token_scores
from megafish.config import AuditConfig
from megafish.data.tokenizer import Tokenizer
from megafish.decode.beam import beam_search
from megafish.errors import InputError
from megafish.model.transformer import Transformer
from megafish.processes import ALONE, Processes


def sweep(
    model: Transformer, probes: Sequence[Probe], settings: AuditConfig, progress: bool, processes: Processes = ALONE
) -> list[dict[str, Any]]:
    """Greedy extraction at every prompt length and offset asked for; empty where none is besides the main one.

    Passages that are too short for a cell are an InputError: the cells of a sweep are compared, so all of them have to
    be about the same passages.
    """
    prompts = sorted({settings.prompt_tokens, *settings.prompt_lengths})
    offsets = sorted({0, *settings.offsets})
    if len(prompts) == len(offsets) == 1:
        return []
    suffix, cells = settings.suffix_tokens, []
    need = offsets[-1] + prompts[-1] + suffix
    shortest = min(probes, key=lambda probe: len(probe.tokens))
    if len(shortest.tokens) < need:
        raise InputError(
            f"{shortest.corpus}: passage {shortest.id} has {len(shortest.tokens)} tokens, the sweep needs {need}: the "
            f"largest of audit.offsets ({offsets[-1]}) + of audit.prompt_tokens and audit.prompt_lengths "
            f"({prompts[-1]}) + audit.suffix_tokens ({suffix}): lower one of them"
        )
    for offset in offsets:
        texts = [probe.tokens[offset : offset + prompts[-1] + suffix].tolist() for probe in probes]
        scores = token_scores(model, texts, batch_size=settings.batch_size, progress=progress, processes=processes)
        for prompt in prompts:
            levels = _levels(probes, scores, prompt, suffix)
            cells.append({"prompt_tokens": prompt, "suffix_tokens": suffix, "offset": offset, "levels": levels})
    return cells


def _levels(probes: Sequence[Probe], scores: Sequence[TokenScores], prompt: int, suffix: int) -> list[dict[str, Any]]:
    # Entry i of the scores is token i + 1 of the text.
    correct = [score.correct[prompt - 1 : prompt - 1 + suffix] for score in scores]

    def level(numbers: list[int]) -> dict[str, Any]:
        right = [correct[i] for i in numbers]
        return {
            **rate("exact", [bool(row.all()) for row in right]),
            "mean_prefix": float(np.mean([suffix if row.all() else int(row.argmin()) for row in right])),
            "extraction_strength": float(np.mean([extraction_strength(row) for row in right])),
        }

    return by_level(probes, level)


def beams(
    model: Transformer,
    tokenizer: Tokenizer,
    probes: Sequence[Probe],
    prompts: Sequence[Sequence[int]],
    suffixes: Sequence[Sequence[int]],
    settings: AuditConfig,
    progress: bool,
    processes: Processes = ALONE,
) -> list[dict[str, Any]]:
    """Extraction by beam search: the best beam is the suffix (best), or one of the beams is (any)."""
    found = []
    for width in settings.beams:
        outputs = beam_search(
            model,
            tokenizer,
            prompts,
            beams=width,
            max_new_tokens=settings.suffix_tokens,
            batch_size=max(1, settings.batch_size // width),
            progress=progress,
            processes=processes,
        )
        texts = [[list(beam.tokens) for beam in beams] for beams in outputs]

        def level(numbers: list[int], texts: list[list[list[int]]] = texts) -> dict[str, Any]:
            best = [texts[i][0] == list(suffixes[i]) for i in numbers]
            return {**rate("best", best), **rate("any", [list(suffixes[i]) in texts[i] for i in numbers])}

        found.append({"beams": width, "levels": by_level(probes, level)})
    return found


def by_level(probes: Sequence[Probe], level: Callable[[list[int]], dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures that `level` makes of the numbers of the passages with equal exposures, ascending."""
    order = exposure_levels(probes)
    groups = [[i for i, probe in enumerate(probes) if probe.exposures == exposures] for exposures in order]
    return [
        {
            "exposures": exposures,
            "occurrences": mean_occurrences([probes[i] for i in group]),
            "canaries": len(group),
            **level(group),
        }
        for exposures, group in zip(order, groups, strict=True)
    ]
