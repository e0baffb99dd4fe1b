"""The parts of one audit, which share the model, the data and the mask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from megafish.audit.continuation import score_and_continue
from megafish.audit.extraction import Extraction
from megafish.audit.losses import held_out, kept_and_dropped
from megafish.audit.members import choose_members
from megafish.audit.membership import FEWEST, attack, membership_scores
from megafish.audit.metrics import longest_common_prefix
from megafish.audit.probes import Probe, ProbeSet, corpus_id, load_canaries, longest, open_probes, split_probes
from megafish.audit.scores import token_scores
from megafish.audit.sweep import beams, sweep
from megafish.audit.target import Target, check_named, load_target
from megafish.audit.trained_with import check_trained_with
from megafish.config import AuditConfig, Config
from megafish.data.corpus import Sample, SampleStream, SourceSpec, open_train, open_valid
from megafish.data.loader import Batch, EvalLoader, make_batch
from megafish.decode.generate import Sampler, generate
from megafish.errors import InputError
from megafish.model.transformer import Transformer
from megafish.objective.goldfish import GoldfishMask
from megafish.processes import ALONE, Processes
from megafish.progress import track

REFERENCE_K = 4
"""A run without a mask is measured with this one, to have something to compare masked runs with."""

FULL_SAMPLES, FULL_BEAMS = 16, 30
"""What --full adds."""


class Auditor:
    """The parts of one audit, which share the model, the data and the mask."""

    def __init__(self, target: Target, *, progress: bool, full: bool, processes: Processes = ALONE) -> None:
        self.target = target
        self.model = target.model
        self.tokenizer = target.tokenizer
        self.config = target.config
        self.settings = target.config.audit
        self.progress = progress and processes.is_main
        self.processes = processes
        self.notes: list[str] = []
        if self.settings.reference is not None:
            check_named(self.settings.reference)  # before all the work that it is needed after
        self.reference = False
        self.mask: GoldfishMask | None = None
        self.stream: SampleStream | None = None
        if target.state is not None or self.config.data.train:
            self._open_data()
        self.canaries = self._canaries()
        if full:
            # Every canary must do for every cell.
            room = [len(probe.tokens) for probe in self.canaries]
            self.settings = _full(self.settings, min(room, default=longest(self.settings)))
        sets = [ProbeSet("canaries", "canaries", self.canaries)] if self.canaries else []
        self.sets = sets + open_probes(self.settings, self.tokenizer, longest(self.settings), self._epochs())
        self.notes += [note for each in self.sets for note in each.notes]
        if not self.sets and self.stream is None:
            raise InputError(
                f"{target.path}: nothing to audit it with: say what it was trained on (data.train=CORPUS) or name "
                "passages (audit.probes=CORPUS, or a text file)"
            )
        self._check_length()

    def _open_data(self) -> None:
        config = self.config
        sources = open_train(config.data)
        for source in sources:
            source.corpus.check_tokenizer(self.tokenizer)
        self.reference = not _drops_tokens(config, sources)
        goldfish = config.goldfish
        if self.reference:
            goldfish = goldfish.model_copy(update={"k": REFERENCE_K})
        self.mask = GoldfishMask(goldfish, self.tokenizer)
        self.stream = SampleStream(sources, config.data.sequence_length, config.data.seed, self.mask.halo)
        if self.target.state is not None:
            # The reference mask was not trained with: what must agree is the mask of the configuration.
            mask = GoldfishMask(config.goldfish, self.tokenizer) if self.reference else self.mask
            check_trained_with(self.target, {"data": self.stream.describe(), "mask": mask.describe()})

    def _check_length(self) -> None:
        longest_positions = self.config.data.sequence_length
        need = longest(self.settings)
        if self.sets and need > longest_positions:
            raise InputError(
                f"audit: passages of {need} tokens (the longest prompt + audit.suffix_tokens + the largest offset) are "
                f"longer than the {longest_positions} the model was trained on (data.sequence_length): lower them"
            )

    @property
    def consumed(self) -> int:
        """Samples the model has read; one pass where that is not known."""
        spent = self.target.spent
        if spent is not None:
            return spent["samples"]
        return 0 if self.stream is None else self.stream.unique_samples

    # ------------------------------------------------------------------------------------------------------- extraction

    def _canaries(self) -> list[Probe]:
        """The canaries of every training corpus; empty where none were planted."""
        epochs = self._epochs()
        return [
            probe
            for spec in ([] if self.stream is None else self.stream.sources)
            for probe in load_canaries(spec.corpus.path, epochs.get(corpus_id(spec.corpus)))
        ]

    def _epochs(self) -> dict[str, float]:
        """How often the model has read each training corpus, by its id; empty where that is not known."""
        if self.stream is None or self.target.spent is None:
            return {}
        found: dict[str, float] = {}
        for spec, seen in zip(self.stream.sources, self.stream.epochs(self.consumed), strict=True):
            name = corpus_id(spec.corpus)
            found[name] = found.get(name, 0.0) + seen  # one corpus may be named twice
        return found

    def extract(self, each: ProbeSet) -> list[Extraction]:
        """Continue every passage of a set."""
        settings, probes = self.settings, each.probes
        prompts, suffixes = split_probes(probes, settings.prompt_tokens, settings.suffix_tokens)
        scores, outputs = score_and_continue(
            self.model,
            self.tokenizer,
            prompts,
            suffixes,
            batch_size=settings.batch_size,
            sampler=Sampler(settings.temperature, settings.top_k, settings.top_p),
            progress=self.progress,
            processes=self.processes,
        )
        # Only a passage that is a whole document has its context, and so its mask, wherever it stands.
        dropped = [self._dropped(probe) if each.kind == "canaries" else None for probe in probes]
        losses = [(-score.log_prob).tolist() for score in scores]
        correct = [score.correct.tolist() for score in scores]
        drawn = [score.sampled_log_prob for score in scores]
        chances = [float(row.sum()) for row in drawn if row is not None]
        hits = self._hits(prompts, suffixes)
        fields = zip(probes, prompts, suffixes, outputs, dropped, losses, correct, chances, hits, strict=True)
        return [Extraction(*each) for each in fields]

    def _hits(self, prompts: list[list[int]], suffixes: list[list[int]]) -> list[list[int]]:
        """Of every continuation drawn, the tokens reproduced before the first difference."""
        settings = self.settings
        if not settings.samples:
            return [[] for _ in prompts]
        drawn = generate(
            self.model,
            self.tokenizer,
            [prompt for prompt in prompts for _ in range(settings.samples)],
            max_new_tokens=settings.suffix_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            seed=settings.seed,
            batch_size=settings.batch_size,
            progress=self.progress,
            processes=self.processes,
        )
        rows = [drawn[i : i + settings.samples] for i in range(0, len(drawn), settings.samples)]
        return [
            [longest_common_prefix(suffix, text) for text in texts]
            for suffix, texts in zip(suffixes, rows, strict=True)
        ]

    def _dropped(self, probe: Probe) -> list[bool] | None:
        """Which suffix tokens the mask drops wherever the passage stands; None where that is drawn anew each time."""
        settings = self.settings
        if self.mask is None or self.stream is None or self.mask.config.scheme == "random":
            return None
        paths = [str(spec.corpus.path) for spec in self.stream.sources]
        source = paths.index(probe.corpus)
        spec = self.stream.sources[source]
        halo = self.mask.halo
        n = settings.prompt_tokens + settings.suffix_tokens
        tokens = np.zeros(halo + n, dtype=np.int64)
        tokens[halo:] = probe.tokens[:n]
        starts = np.zeros(halo + n, dtype=np.bool_)
        starts[halo] = True
        positions = np.maximum(np.arange(-halo, n), 0)
        k = None
        if not self.reference and spec.k != "default":
            k = np.full(halo + n, spec.k or 0, dtype=np.int32)
        drop = self.mask([Sample(tokens, starts, positions, k, halo, source, 0)])[0]
        # Entry j of the mask is token j + 1 of the document.
        return drop[settings.prompt_tokens - 1 :].tolist()

    def sweep(self) -> list[dict[str, Any]]:
        """Greedy extraction by prompt length and offset, of every set."""
        return [
            {"set": each.name, **cell}
            for each in self.sets
            for cell in sweep(self.model, each.probes, self.settings, self.progress, self.processes)
        ]

    def beams(self) -> list[dict[str, Any]]:
        """Extraction by beam search, of every set."""
        found = []
        for each in self.sets if self.settings.beams else []:
            parts = split_probes(each.probes, self.settings.prompt_tokens, self.settings.suffix_tokens)
            results = beams(
                self.model, self.tokenizer, each.probes, *parts, self.settings, self.progress, self.processes
            )
            found += [{"set": each.name, **result} for result in results]
        return found

    # ------------------------------------------------------------------------------------------------------- membership

    def membership(self) -> dict[str, Any] | None:
        """Can training documents be told from held-out ones? None where there are no two groups to tell apart."""
        settings, valid = self.settings, self._valid()
        if not settings.membership or self.stream is None or not valid:
            return None
        length, read = settings.membership_tokens, self.config.data.sequence_length
        if length > read:
            self.notes.append(
                f"membership inference by the first {read} tokens of each text: the model was not trained on more "
                f"(audit.membership_tokens={length})"
            )
            length = read
        if self.target.spent is None:
            self.notes.append(
                "membership inference takes all training documents for read: it is not known of this model"
            )
        chosen = choose_members(
            self.stream,
            valid,
            self.canaries,
            consumed=self.consumed,
            count=settings.membership,
            length=length,
            seed=settings.seed,
        )
        self.notes += chosen.notes
        if min(len(chosen.members), len(chosen.non_members)) < FEWEST:
            self.notes.append(f"no membership inference: at least {FEWEST} texts of each kind are needed")
            return None
        reference = self._reference()
        groups = [self._scored(texts, reference) for texts in (chosen.members, chosen.non_members)]
        return {"tokens": length, **attack(*groups)}

    def _scored(self, texts: Sequence[Sequence[int]], reference: Transformer | None) -> dict[str, np.ndarray]:
        shared: dict[str, Any] = {
            "batch_size": self.settings.batch_size,
            "progress": self.progress,
            "processes": self.processes,
        }
        scores = token_scores(self.model, texts, moments=True, **shared)
        beside = None if reference is None else token_scores(reference, texts, **shared)
        return membership_scores(scores, [self.tokenizer.decode(text) for text in texts], beside)

    def _reference(self) -> Transformer | None:
        """The model of audit.reference, which must have the same tokens."""
        path = self.settings.reference
        if path is None:
            return None
        found = load_target(path, device=self.target.model.embedding.weight.device)
        if found.tokenizer.sha256 != self.tokenizer.sha256:
            raise InputError(
                f"audit.reference: {path} has another tokenizer ({found.tokenizer.path}) than {self.target.path}: its "
                "losses are of other tokens; name a model trained with the same one"
            )
        return found.model

    # ----------------------------------------------------------------------------------------------------------- losses

    def _valid(self) -> list[SourceSpec]:
        """The held-out documents; none without training data."""
        sources = [] if self.stream is None else open_valid(self.config.data)
        for source in sources:
            source.corpus.check_tokenizer(self.tokenizer)
        return sources

    def losses(self) -> dict[str, Any]:
        """Of training and of validation text; a few batches, which the first process does alone."""
        found: dict[str, Any] = {}
        if self.processes.is_main:
            found = {"train": self.training_losses(), "valid": self.validation_losses()}
        return self.processes.gather(found)[0]

    def training_losses(self) -> dict[str, Any] | None:
        """Loss of dropped and kept tokens on sequences spread evenly over those the model has trained on."""
        if self.stream is None or self.mask is None:
            return None
        count = min(self.settings.loss_sequences, max(self.consumed, 1))
        numbers = [int(number) for number in np.linspace(0, max(self.consumed - 1, 0), count)]
        size = min(self.config.train.micro_batch_size, count)
        groups = [numbers[i : i + size] for i in range(0, count, size)]
        batches = (make_batch([self._sample(self.stream, number) for number in group], self.mask) for group in groups)
        result = kept_and_dropped(self.model, self._shown(batches, len(groups), "training loss"))
        return {**result, "sequences": count}

    def _sample(self, stream: SampleStream, number: int) -> Sample:
        sample = stream.read(number)
        # The reference mask is the same for every source and document.
        return replace(sample, k=None) if self.reference else sample

    def validation_losses(self) -> dict[str, Any] | None:
        """Loss and bits per byte on validation sequences, never masked; None without validation text."""
        sources = self._valid()
        if not sources:
            return None
        stream = SampleStream(sources, self.config.data.sequence_length, seed=0)
        loader = EvalLoader(stream, self.config.eval.sequences, self.config.train.micro_batch_size)
        result = held_out(self.model, self._shown(loader, len(loader), "validation loss"), self.tokenizer.token_bytes)
        return None if result is None else {**result, "sequences": loader.sequences}

    def _shown(self, batches: Iterable[Batch], total: int, what: str) -> Iterator[Batch]:
        """The same batches, with a progress bar."""
        with track(total, what, "batch", enabled=self.progress) as bar:
            for batch in batches:
                yield batch
                bar.advance()


def _full(settings: AuditConfig, room: int) -> AuditConfig:
    """The settings with what --full adds: `room` is the length of the shortest passage [tokens]."""
    spare = room - settings.prompt_tokens - settings.suffix_tokens
    prompts = [settings.prompt_tokens >> shift for shift in (3, 2, 1, 0) if settings.prompt_tokens >> shift]
    offsets = sorted({spare * quarter // 4 for quarter in range(5)}) if spare > 0 else []
    added: dict[str, Any] = {
        "prompt_lengths": prompts,
        "offsets": offsets,
        "samples": FULL_SAMPLES,
        "beams": [FULL_BEAMS],
    }
    return settings.model_copy(update={key: value for key, value in added.items() if not getattr(settings, key)})


def _drops_tokens(config: Config, sources: Sequence[SourceSpec]) -> bool:
    """Does the run's mask drop anything: by the run's k, a source's, or (in a train.k.npy) a document's?"""
    if any((config.goldfish.k if source.k == "default" else source.k) is not None for source in sources):
        return True
    return any((source.corpus.path / "train.k.npy").is_file() for source in sources)
