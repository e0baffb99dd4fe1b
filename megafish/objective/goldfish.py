"""The goldfish mask of a run: which targets of its samples are left out of the loss.

Turns the configuration into calls of `megafish_kernels.goldfish_drop`, where the schemes are defined.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megafish.config import GoldfishConfig
from megafish.data.corpus import Sample
from megafish.data.manifest import DEFAULT_K, NEVER_K
from megafish.data.tokenizer import Tokenizer, casefold_table, special_lut
from megafish.errors import InputError
from megafish_kernels import goldfish_drop

_Bools = npt.NDArray[np.bool_]


class GoldfishMask:
    """Decides the dropped targets of samples: `mask(samples)` -> bool [b, S], True where dropped.

    For goldfish-v1 and static a token's fate follows from its document alone, so it is the same in every sample, batch
    and epoch. random draws anew for each sample of the run. table is the published code bit for bit: it hashes
    the S targets of a row across documents, without left context, and drops special tokens like any others.

    `tokenizer` names the special tokens, which no other scheme ever drops, and gives the canonical ids; without one
    there are no special tokens. k comes from the document, else its source, else the configuration.
    """

    def __init__(self, config: GoldfishConfig, tokenizer: Tokenizer | None = None) -> None:
        self.config = config
        exempts = tokenizer is not None and config.scheme != "table"
        self._exempt = special_lut(tokenizer) if tokenizer is not None and exempts else None
        self._special_ids = sorted(tokenizer.special_ids) if tokenizer is not None and exempts else []
        self._canonical: npt.NDArray[np.int64] | None = None
        if config.canonical is not None:
            if tokenizer is None:
                raise InputError(f"goldfish.canonical={config.canonical} needs a tokenizer: set data.tokenizer")
            self._canonical = casefold_table(tokenizer)

    @property
    def halo(self) -> int:
        """Tokens of left context that samples must carry."""
        return self.config.h if self.config.scheme == "goldfish-v1" else 0

    def __call__(self, samples: Sequence[Sample]) -> _Bools:
        """Dropped targets of samples of one length: bool [b, S]; entry j is the token after input j."""
        config = self.config
        k = self._k(samples)
        # Context: the halo and the first input, whose own fate belongs to the sample before.
        context = samples[0].halo + 1
        assert samples[0].halo >= self.halo, (samples[0].halo, self.halo)
        tokens = np.stack([sample.tokens for sample in samples])
        if config.scheme == "table":
            k = k if isinstance(k, int) or k is None else k[:, context:]
            targets = tokens[:, context:]
            return goldfish_drop(targets, k=k, h=config.h, scheme="table", canonical=self._canonical)
        options: dict[str, Any] = {"k": k, "scheme": config.scheme, "exempt": self._exempt, "halo": context}
        if config.scheme == "goldfish-v1":
            options |= {"h": config.h, "seed": config.seed, "window": config.window, "min_context": config.min_context}
            options["canonical"] = self._canonical
            options["document_starts"] = np.stack([sample.document_starts for sample in samples])
            if (config.min_context or 0) > context:
                options["positions"] = np.stack([sample.positions for sample in samples])
        elif config.scheme == "static":
            options["positions"] = np.stack([sample.positions for sample in samples])
        else:
            options |= {"seed": config.seed, "nonce": np.array([sample.number for sample in samples])}
        return goldfish_drop(tokens, **options)[:, context:]

    def describe(self) -> dict[str, Any]:
        """Scheme and all parameters (JSON types): a checkpoint stores them, and a resume must find them equal."""
        config = self.config
        reach = config.h if config.window == "preceding" else config.h - 1
        hashes_documents = config.scheme == "goldfish-v1"
        return {
            "scheme": config.scheme,
            "k": config.k,
            "h": config.h if config.scheme in ("goldfish-v1", "table") else None,
            "seed": config.seed if config.scheme in ("goldfish-v1", "random") else None,
            "window": config.window if hashes_documents else None,
            "min_context": (reach if config.min_context is None else config.min_context) if hashes_documents else None,
            "canonical": config.canonical,
            "canonical_sha256": None
            if self._canonical is None
            else hashlib.sha256(self._canonical.astype("<i8").tobytes()).hexdigest(),
            "exempt": self._special_ids,
        }

    def _k(self, samples: Sequence[Sample]) -> int | npt.NDArray[np.int64] | None:
        """One k for all, or one for each token [b, n] where a document or a source has its own."""
        if all(sample.k is None for sample in samples):
            return self.config.k
        fallback = NEVER_K if self.config.k is None else self.config.k
        length = len(samples[0].tokens)
        rows = [np.full(length, DEFAULT_K) if sample.k is None else sample.k for sample in samples]
        k = np.stack(rows).astype(np.int64)
        k[k == DEFAULT_K] = fallback
        if (wrong := (k < NEVER_K) | (k == 1)).any():
            source = samples[int(np.argmax(wrong.any(axis=1)))].source
            raise InputError(
                f"source {source}: a document has k={k[wrong][0]}: it must be at least 2, 0 (never drop) or -1 (the "
                "run's k)"
            )
        return k
