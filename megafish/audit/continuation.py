"""Greedy continuations of passages, of which what the scores of the true text already tell is not generated again.

Greedy decoding writes the true suffix as long as the most probable token, given the true text, is the right one; then
it writes the most probable one instead. Both are known from the forward pass that scores the passage, so generation
starts behind them: a passage that is recited takes none, and one that is left after d tokens d + 1 fewer.
"""

from __future__ import annotations

from collections.abc import Sequence

from megafish.audit.scores import TokenScores
from megafish.data.tokenizer import Tokenizer
from megafish.decode.generate import generate
from megafish.model.transformer import Transformer
from megafish.processes import ALONE, Processes


def continue_greedily(
    model: Transformer,
    tokenizer: Tokenizer | None,
    prompts: Sequence[Sequence[int]],
    suffixes: Sequence[Sequence[int]],
    scores: Sequence[TokenScores],
    *,
    batch_size: int,
    progress: bool = False,
    processes: Processes = ALONE,
) -> list[list[int]]:
    """What `generate` writes at temperature 0 behind each prompt, at most as many tokens as the suffix has.

    scores: of prompt + suffix. tokenizer: None for no end-of-text token. processes: those that share the batches. The
    texts are the same up to rounding in the matrix products.
    """
    eos = None if tokenizer is None else tokenizer.eos_id
    found = [_known(suffix, score, eos) for suffix, score in zip(suffixes, scores, strict=True)]
    left = [len(suffix) - len(known) for suffix, (known, _) in zip(suffixes, found, strict=True)]
    going = [i for i, (_, ended) in enumerate(found) if not ended and left[i]]
    outputs = generate(
        model,
        tokenizer,
        [[*prompts[i], *found[i][0]] for i in going],
        max_new_tokens=[left[i] for i in going],
        batch_size=batch_size,
        progress=progress,
        processes=processes,
    )
    for i, output in zip(going, outputs, strict=True):
        found[i][0].extend(output)
    return [known for known, _ in found]


def _known(suffix: Sequence[int], score: TokenScores, eos: int | None) -> tuple[list[int], bool]:
    """The tokens written up to and with the first wrong one, and whether the text ends there (before end-of-text)."""
    written: list[int] = []
    for true, likeliest in zip(suffix, score.likeliest[-len(suffix) :].tolist(), strict=True):
        if likeliest == eos:
            return written, True
        written.append(likeliest)
        if likeliest != true:
            break
    return written, False
