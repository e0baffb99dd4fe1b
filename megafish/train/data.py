"""What a run reads, opened and checked together: tokenizer, corpora, mask, and the loaders of this process."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from megafish.config import Config
from megafish.data.corpus import SampleStream, SourceSpec, open_train, open_valid, run_tokenizer
from megafish.data.loader import IGNORE, Batch, EvalLoader, Loader, ReadOrder, StepBatch
from megafish.data.quarantine import Quarantine
from megafish.data.tokenizer import Tokenizer
from megafish.errors import InputError
from megafish.objective.goldfish import GoldfishMask
from megafish.train.engine import Processes


class Corpora(NamedTuple):
    """What a run reads, the same for every process."""

    train: list[SourceSpec]
    valid: list[SourceSpec]
    tokenizer: Tokenizer
    mask: GoldfishMask
    stream: SampleStream

    def identity(self) -> dict[str, Any]:
        """Mask and samples, as a checkpoint stores them and a resume compares them (JSON types)."""
        return {"mask": self.mask.describe(), "data": self.stream.describe()}


@dataclass(frozen=True)
class TrainingData:
    """The data of one run, as one process sees it."""

    config: Config
    processes: Processes
    corpora: Corpora
    loader: Loader
    valid: EvalLoader | None
    """None where no corpus has validation text."""
    seen: EvalLoader | None
    """The first training sequences, masked: on them the loss of dropped and kept tokens is compared."""

    @property
    def batch_samples(self) -> int:
        """Sequences of a step, over all processes."""
        return self.config.train.global_batch_size

    @property
    def batch_tokens(self) -> int:
        """Input tokens of a step, over all processes."""
        return self.batch_samples * self.config.data.sequence_length

    @cached_property
    def token_bytes(self) -> torch.Tensor:
        """UTF-8 bytes that each token stands for, int64 [vocabulary]."""
        return torch.from_numpy(np.ascontiguousarray(self.tokenizer.token_bytes))

    @property
    def tokenizer(self) -> Tokenizer:
        """The run's."""
        return self.corpora.tokenizer

    def identity(self) -> dict[str, Any]:
        """What of the data a continuation must share with the run it continues."""
        return self.corpora.identity()

    def check_order(self, order: ReadOrder) -> None:
        """Compute the hash of a checkpoint's last global batch anew; InputError where the order is not that run's."""
        data_hash = self.loader.data_hash(order.ranges)
        if ReadOrder(order.before).plus(data_hash, order.ranges) != order:
            samples, first = sum(count for _, count in order.ranges), order.ranges[0][0]
            raise InputError(
                f"the {samples} samples from {first} on are not those that the checkpoint's last "
                f"step read (hash {data_hash}, was {order.data_hash}): its order of samples cannot be continued"
            )

    def epoch(self, consumed: int) -> float:
        """Passes over the data once `consumed` samples are read (of several sources, over the most repeated)."""
        return max(self.corpora.stream.epochs(consumed))

    def steps(
        self, consumed: int, without: Quarantine, give_up: Callable[[], bool]
    ) -> Generator[StepBatch | None, None, None]:
        """This process's batches from sample `consumed` on; see `Loader.steps`."""
        return self.loader.steps(consumed, without=without, give_up=give_up)

    def count(self, batch: StepBatch | None, *flags: int) -> tuple[int, ...]:
        """(kept tokens, dropped tokens, UTF-8 bytes of the kept tokens, then each of `flags`), sums over all processes.

        Sums over all sequences of the step, in the one collective that a step needs before its first backward pass: the
        number of kept tokens follows from the token ids, so the global mean's denominator is known ahead. `batch` is
        None in a process that has given up waiting for one.
        """
        own = [0, 0, 0]
        if batch is not None and self.processes.mesh.speaks_for_its_sequences:
            target_bytes = sum(
                int(self.token_bytes[micro.targets[(micro.targets != IGNORE) & ~micro.drop]].sum())
                for micro in batch.micro_batches
            )
            own = [batch.kept, batch.dropped, target_bytes]
        numbers = torch.tensor([*own, *flags], device=self.processes.device)
        dist.all_reduce(numbers)
        return tuple(numbers.tolist())

    def own_part(self, x: torch.Tensor) -> torch.Tensor:
        """What this process has of each row under sequence parallelism: [b, S] -> [b, S / P]."""
        sequence = self.processes.mesh.sequence
        length = x.shape[1] // sequence.size
        return x.narrow(1, sequence.rank * length, length)

    def to_model(self, batch: Batch) -> dict[str, Any]:
        """A micro-batch as keyword arguments of the model's forward, on this process's device."""
        device = self.processes.device
        return {
            "tokens": self.own_part(batch.tokens).to(device, non_blocking=True),
            "targets": self.own_part(batch.targets).to(device, non_blocking=True),
            "drop": self.own_part(batch.drop).to(device, non_blocking=True),
            "cu_seqlens": batch.cu_seqlens.to(device, non_blocking=True),
            "max_seqlen": batch.max_seqlen,
        }


def open_corpora(config: Config) -> Corpora:
    """Open everything that `config` names. Raises InputError for what is missing, damaged or does not fit."""
    train, valid = open_train(config.data), open_valid(config.data)
    tokenizer = run_tokenizer(config.data)
    for source in (*train, *valid):
        source.corpus.check_tokenizer(tokenizer)
    if config.checkpoint.keep_best and not valid:
        raise InputError(
            "checkpoint.keep_best needs validation text, and no corpus of data.train or data.valid has any: set "
            "checkpoint.keep_every, or prepare the corpus with --valid-fraction"
        )
    mask = GoldfishMask(config.goldfish, tokenizer)
    stream = SampleStream(train, config.data.sequence_length, config.data.seed, mask.halo)
    return Corpora(train, valid, tokenizer, mask, stream)


def open_data(config: Config, processes: Processes) -> TrainingData:
    """Open everything that `config` names, and the loaders of this process. Raises InputError as open_corpora does."""
    corpora = open_corpora(config)
    train, valid, _, mask, stream = corpora
    length, batch = config.data.sequence_length, config.train.micro_batch_size
    ranks = (processes.mesh.data.rank, processes.mesh.data.size)
    seen = valid_loader = None
    masked = config.goldfish.k is not None or any(
        source.k not in ("default", None) or source.corpus.has_document_k for source in train
    )
    if masked and config.eval.dropped_sequences:
        seen = EvalLoader(stream, config.eval.dropped_sequences, batch, *ranks, mask=mask)
    if valid:
        valid_stream = SampleStream(valid, length, seed=0)
        valid_loader = EvalLoader(valid_stream, config.eval.sequences, batch, *ranks)
    return TrainingData(
        config,
        processes,
        corpora,
        Loader(stream, mask, batch, config.train.global_batch_size, *ranks, prefetch=config.data.prefetch),
        valid_loader,
        seen,
    )
