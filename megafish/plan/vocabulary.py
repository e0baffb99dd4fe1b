"""How many token ids a run has, where there need not be a corpus yet."""

from __future__ import annotations

from megafish.config import Config
from megafish.data.corpus import run_tokenizer
from megafish.errors import InputError


def planned_vocab_size(config: Config, given: int | None = None) -> int:
    """The number given, the tokenizer's of the configuration, or else model.vocab_size. Raises InputError."""
    if given is not None:
        if config.model.vocab_size is not None and config.model.vocab_size < given:
            raise InputError(
                f"--vocab-size {given} is above model.vocab_size={config.model.vocab_size}, the embedding's rows"
            )
        return given
    if config.data.tokenizer is not None or config.data.train:
        return run_tokenizer(config.data).vocab_size
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    raise InputError(
        "the size of the vocabulary is not known: give --vocab-size, model.vocab_size=..., or a corpus (data.train=...)"
    )
