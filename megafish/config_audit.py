"""The section `audit`: which passages, and what is asked of the model."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from megafish.config_sections import AbsolutePath, Section, Seed


class AuditConfig(Section):
    """What a model has memorized: extraction of passages, membership inference, losses."""

    prompt_tokens: int = Field(default=64, ge=1)
    """Tokens of a passage that are given."""
    suffix_tokens: int = Field(default=64, ge=1)
    """Tokens that must be reproduced."""
    batch_size: int = Field(default=32, ge=1)
    """Prompts continued at one time."""
    loss_sequences: int = Field(default=64, ge=1)
    """Training sequences on which the loss of dropped and kept tokens is measured."""
    probes: list[AbsolutePath] = Field(default_factory=list)
    """Further passages: corpus folders, prefixes of .bin/.idx pairs, files of text (.txt, .jsonl, .parquet)."""
    probe_count: int = Field(default=256, ge=1)
    """Passages taken from each of probes (with duplicates: from each bin)."""
    probe_choice: Literal["uniform", "duplicates"] = "uniform"
    """Passages of a corpus: at random places, or as many from each bin of repetitions (Carlini et al. 2023)."""
    prompt_lengths: list[int] = Field(default_factory=list)
    """Also with these numbers of tokens given. Empty: prompt_tokens alone."""
    offsets: list[int] = Field(default_factory=list)
    """Also with the prompt beginning this many tokens into the passage. Empty: at its start alone."""
    samples: int = Field(default=0, ge=0)
    """Continuations drawn for each passage, besides the greedy one."""
    temperature: float = Field(default=1.0, gt=0)
    """Of the drawn continuations, and of the probability of the true one."""
    top_k: int | None = Field(default=40, ge=1)
    """Tokens they are drawn from; null: all."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Probability of the likeliest tokens they are drawn from; null: 1."""
    beams: list[int] = Field(default_factory=list)
    """Also by beam search with these widths, such as [30, 100]."""
    membership: int = Field(default=256, ge=0)
    """Texts of training and of validation documents, each, for membership inference; 0: none."""
    membership_tokens: int = Field(default=128, ge=2)
    """Tokens of such a text; shorter documents are left out."""
    reference: AbsolutePath | None = None
    """Run or Hugging Face folder of a model that did not see the data, for the attack with a reference model."""
    seed: Seed = 0
    """Seed of the passages, the texts and the drawn continuations."""

    @field_validator("probes", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_lists(self) -> AuditConfig:
        for key, least in (("prompt_lengths", 1), ("offsets", 0), ("beams", 2)):
            for value in getattr(self, key):
                if value < least:
                    raise ValueError(f"{key}: {value} must be at least {least}")
        return self
