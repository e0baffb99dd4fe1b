"""The audit of a checkpoint: extraction of canaries, loss of dropped against kept tokens, validation."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from megafish.audit.extraction import Extraction, Probe, load_canaries, record, split_canaries, summarize
from megafish.audit.losses import held_out, kept_and_dropped, sequence_losses
from megafish.audit.panels import divergence_panel, memorization_panels
from megafish.audit.plots import draw, to_png
from megafish.audit.view import FORMAT, VERSION, RunView
from megafish.config import Config
from megafish.data.corpus import Sample, SampleStream, SourceSpec, open_train, open_valid
from megafish.data.loader import Batch, EvalLoader, make_batch
from megafish.data.tokenizer import Tokenizer
from megafish.decode.generate import generate
from megafish.errors import InputError
from megafish.model.load import LoadedRun, load_run
from megafish.objective.goldfish import GoldfishMask
from megafish.progress import track
from megafish.run import read_json
from megafish.train.track import Recited, publish_audit

RECITED_ROWS = 64
"""Lines of the table of recited text on the run's wandb and TensorBoard pages."""

REFERENCE_K = 4
"""A run without a mask is measured with this one, to have something to compare masked runs with."""


@dataclass(frozen=True)
class AuditResult:
    """Where an audit was written, and its figures (the content of summary.json)."""

    folder: Path
    summary: dict[str, Any]


def audit_run(
    path: str | Path,
    *,
    step: int | None = None,
    overrides: Sequence[str] = (),
    progress: bool = True,
    console: Console | None = None,
) -> AuditResult:
    """Audit a run (or a checkpoint folder inside it): write RUN/audit/step_XXXXXXXX/ and print the figures.

    The folder holds extraction.jsonl (one line a canary: text, continuation, scores), summary.json and the plots as
    PNG; it appears when it is complete and takes the place of an earlier audit of the same step. `step`: which
    checkpoint, the latest by default. `overrides`: settings of the audit section, e.g. "audit.prompt_tokens=32".
    `progress`: bars on standard error. Raises InputError where the run, its data or the settings do not fit.
    """
    loaded = load_run(path, step)
    config = _with_overrides(loaded, overrides)
    folder = loaded.run.audit / loaded.run.checkpoint(loaded.step).name
    _restore(folder)
    auditor = _Auditor(loaded, config, progress)
    extractions = auditor.extract()
    summary: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "run": config.name,
        "step": loaded.step,
        "samples": auditor.spent["samples"],
        "tokens": auditor.spent["tokens"],
        "supervised_tokens": auditor.spent["supervised_tokens"],
        "settings": config.audit.model_dump(),
        "mask": {**auditor.mask.describe(), "reference": auditor.reference},
        "extraction": summarize(extractions) if extractions else None,
        "losses": {"train": auditor.training_losses(), "valid": auditor.validation_losses()},
    }
    records = [record(item, loaded.tokenizer) for item in extractions]
    view = RunView(loaded.run.path, config.name, config, {}, [summary], records)
    _write(folder, summary, records, view)
    if extractions:
        levels = summary["extraction"]["levels"]
        rates = {f"recited_{level['exposures']}": level["exact_matches"] / level["canaries"] for level in levels}
        publish_audit(loaded.run, config, loaded.step, rates, _recited(extractions, loaded.tokenizer))
    console = console or Console()
    for table in tables(summary):
        console.print(table)
    if extractions and (left := summary["extraction"]["divergence"]) and not auditor.reference:
        console.print(
            f"not recited, with {left['least_exposures']} or more copies: {left['canaries']}; left at a dropped token "
            f"or right after one: {left['at_drop']} ({left['rate']:.0%}, by chance {left['chance']:.0%})",
            highlight=False,
        )
    console.print(f"written to {folder}", highlight=False, soft_wrap=True)
    return AuditResult(folder, summary)


def _recited(extractions: list[Extraction], tokenizer: Tokenizer) -> list[Recited]:
    """What a table of an audit shows: those with most copies first, and of them what was reproduced furthest."""
    order = sorted(extractions, key=lambda item: (-item.canary.exposures, -item.prefix_length))[:RECITED_ROWS]
    return [
        Recited(
            item.canary.exposures,
            item.exact,
            item.prefix_length,
            *(tokenizer.decode(ids) for ids in (item.prompt, item.generated, item.suffix)),
        )
        for item in order
    ]


def _with_overrides(loaded: LoadedRun, overrides: Sequence[str]) -> Config:
    for override in overrides:
        if not override.startswith("audit."):
            raise InputError(
                f"override {override!r}: an audit changes settings of the section audit only (audit.key=value)"
            )
    return loaded.run.load_config(list(overrides)) if overrides else loaded.config


class _Auditor:
    """The parts of one audit, which share the model, the data and the mask."""

    def __init__(self, loaded: LoadedRun, config: Config, progress: bool) -> None:
        self.model = loaded.model
        self.tokenizer = loaded.tokenizer
        self.config = config
        self.progress = progress
        self.spent = _spent(loaded)
        self.consumed = self.spent["samples"]
        sources = open_train(config.data)
        for source in sources:
            source.corpus.check_tokenizer(loaded.tokenizer)
        self.reference = not _drops_tokens(config, sources)
        goldfish = config.goldfish
        if self.reference:
            goldfish = goldfish.model_copy(update={"k": REFERENCE_K})
        self.mask = GoldfishMask(goldfish, loaded.tokenizer)
        self.stream = SampleStream(sources, config.data.sequence_length, config.data.seed, self.mask.halo)
        # The reference mask was not trained with: what must agree is the mask of the configuration.
        mask = GoldfishMask(config.goldfish, loaded.tokenizer) if self.reference else self.mask
        _check_trained_with(loaded, {"data": self.stream.describe(), "mask": mask.describe()})

    # ------------------------------------------------------------------------------------------------------- extraction

    def extract(self) -> list[Extraction]:
        """Continue every canary of every training corpus; empty where none were planted."""
        settings = self.config.audit
        epochs = self.stream.epochs(self.consumed)
        groups = [load_canaries(spec.corpus.path, seen) for spec, seen in zip(self.stream.sources, epochs, strict=True)]
        canaries = [canary for group in groups for canary in group]
        numbers = [number for number, group in enumerate(groups) for _ in group]
        if not canaries:
            return []
        prompts, suffixes = split_canaries(canaries, settings.prompt_tokens, settings.suffix_tokens)
        outputs = generate(
            self.model,
            self.tokenizer,
            prompts,
            max_new_tokens=settings.suffix_tokens,
            batch_size=settings.batch_size,
            progress=self.progress,
        )
        texts = [prompt + suffix for prompt, suffix in zip(prompts, suffixes, strict=True)]
        losses: list[list[float]] = []
        with track(len(texts), "canary loss", "canary", enabled=self.progress) as bar:
            for rows in sequence_losses(self.model, texts, settings.batch_size):
                losses += [row[-settings.suffix_tokens :] for row in rows]
                bar.advance(len(rows))
        dropped = [self._dropped(canary, number) for canary, number in zip(canaries, numbers, strict=True)]
        return [
            Extraction(*fields)
            for fields in zip(canaries, prompts, suffixes, [list(o) for o in outputs], dropped, losses, strict=True)
        ]

    def _dropped(self, canary: Probe, source: int) -> list[bool] | None:
        """Which suffix tokens the mask drops wherever the canary stands; None where that is drawn anew each time."""
        settings = self.config.audit
        if self.mask.config.scheme == "random":
            return None
        spec = self.stream.sources[source]
        halo = self.mask.halo
        n = settings.prompt_tokens + settings.suffix_tokens
        tokens = np.zeros(halo + n, dtype=np.int64)
        tokens[halo:] = canary.tokens[:n]
        starts = np.zeros(halo + n, dtype=np.bool_)
        starts[halo] = True
        positions = np.maximum(np.arange(-halo, n), 0)
        k = None
        if not self.reference and spec.k != "default":
            k = np.full(halo + n, spec.k or 0, dtype=np.int32)
        drop = self.mask([Sample(tokens, starts, positions, k, halo, source, 0)])[0]
        # Entry j of the mask is token j + 1 of the document.
        return drop[settings.prompt_tokens - 1 :].tolist()

    # ----------------------------------------------------------------------------------------------------------- losses

    def training_losses(self) -> dict[str, Any]:
        """Loss of dropped and kept tokens on sequences spread evenly over those the run has trained on."""
        count = min(self.config.audit.loss_sequences, max(self.consumed, 1))
        numbers = [int(number) for number in np.linspace(0, max(self.consumed - 1, 0), count)]
        size = min(self.config.train.micro_batch_size, count)
        groups = [numbers[i : i + size] for i in range(0, count, size)]
        batches = (make_batch([self._sample(number) for number in group], self.mask) for group in groups)
        result = kept_and_dropped(self.model, self._shown(batches, len(groups), "training loss"))
        return {**result, "sequences": count}

    def _sample(self, number: int) -> Sample:
        sample = self.stream.read(number)
        # The reference mask is the same for every source and document.
        return replace(sample, k=None) if self.reference else sample

    def validation_losses(self) -> dict[str, Any] | None:
        """Loss and bits per byte on validation sequences, never masked; None without validation text."""
        sources = open_valid(self.config.data)
        if not sources:
            return None
        for source in sources:
            source.corpus.check_tokenizer(self.tokenizer)
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


def _spent(loaded: LoadedRun) -> dict[str, int]:
    """What the checkpoint was trained on: samples, tokens, supervised_tokens."""
    file = loaded.run.checkpoint(loaded.step) / "state.json"
    spent = read_json(file).get("spent")
    keys = ("samples", "tokens", "supervised_tokens")
    if not isinstance(spent, dict) or not all(isinstance(spent.get(key), int) for key in keys):
        raise InputError(
            f"{file}: does not say what was trained on (spent: {', '.join(keys)}): the checkpoint is damaged"
        )
    return {key: spent[key] for key in keys}


_TRAINED_WITH = {
    "data": (
        "the training data are not those the checkpoint was trained on",
        "restore the corpora and the section data of {config} of that time",
    ),
    "mask": (
        "the mask is not the one the checkpoint was trained with",
        "restore the section goldfish of {config} and the tokenizer of that time",
    ),
}
"""What state.json must hold like the audit finds it: what a difference means, and what to do."""


def _check_trained_with(loaded: LoadedRun, now: dict[str, Any]) -> None:
    """Refuse data or a mask that the checkpoint never met: counts of copies and dropped tokens would be made up."""
    file = loaded.run.checkpoint(loaded.step) / "state.json"
    state = read_json(file)
    for key, (meaning, remedy) in _TRAINED_WITH.items():
        if not isinstance(state.get(key), dict):
            raise InputError(f"{file}: does not say what was trained with ({key}): the checkpoint is damaged")
        if differences := _differing(state[key], now[key], key):
            raise InputError(
                f"{file.parent}: {meaning} (differs: {', '.join(differences)}): "
                f"{remedy.format(config=loaded.run.config_file)}, or train again"
            )


def _differing(saved: Any, now: Any, path: str) -> list[str]:
    """Paths of the values that differ, such as "data.sources.0.slots"."""
    if isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
        # Long lists of numbers are named as a whole.
        if not any(isinstance(value, dict) for value in (*saved, *now)):
            return [] if saved == now else [path]
        saved, now = dict(enumerate(saved)), dict(enumerate(now))
    if isinstance(saved, dict) and isinstance(now, dict):
        keys = sorted(saved.keys() | now.keys())
        return [found for key in keys for found in _differing(saved.get(key), now.get(key), f"{path}.{key}")]
    return [] if saved == now else [path]


def _drops_tokens(config: Config, sources: Sequence[SourceSpec]) -> bool:
    """Does the run's mask drop anything: by the run's k, a source's, or (in a train.k.npy) a document's?"""
    if any((config.goldfish.k if source.k == "default" else source.k) is not None for source in sources):
        return True
    return any((source.corpus.path / "train.k.npy").is_file() for source in sources)


def _previous(folder: Path) -> Path:
    """Where the earlier audit waits while the new one takes its place."""
    return folder.with_name(folder.name + ".old")


def _restore(folder: Path) -> None:
    """Put the earlier audit back where a kill hit between the two renames of `_write`."""
    if _previous(folder).exists() and not folder.exists():
        os.replace(_previous(folder), folder)


def _write(folder: Path, summary: dict[str, Any], records: Sequence[dict[str, Any]], view: RunView) -> None:
    """Write the audit beside and rename it, so that a kill leaves the earlier audit (see `_restore`) or the new one."""
    beside = folder.with_name(folder.name + ".tmp")
    previous = _previous(folder)
    _restore(folder)
    for leftover in (beside, previous):
        if leftover.exists():
            shutil.rmtree(leftover)
    beside.mkdir(parents=True)
    with open(beside / "extraction.jsonl", "w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in records)
    panels = memorization_panels([view])
    divergence = divergence_panel(view)
    for panel in [*panels, *([divergence] if divergence else [])]:
        (beside / f"{panel.name}.png").write_bytes(to_png(draw(panel, "light")))
    (beside / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    # A folder that is not empty cannot be replaced in one step: the earlier audit makes way first.
    if folder.exists():
        os.replace(folder, previous)
    os.replace(beside, folder)
    shutil.rmtree(previous, ignore_errors=True)


def tables(summary: dict[str, Any]) -> list[Table]:
    """The figures of summary.json for a terminal of 80 columns."""
    found = []
    extraction, settings = summary["extraction"], summary["settings"]
    if extraction is not None:
        table = _table(
            f"{summary['run']}, step {summary['step']}: canaries continued greedily "
            f"({settings['prompt_tokens']} tokens given, {settings['suffix_tokens']} asked for)",
            ["copies", "seen", "canaries", "exact", "95 %", "LCP", "ROUGE-L", "loss"],
            "copies: in the corpus, 0 is the control group; seen: copies x epochs; exact: word for word, with Wilson's "
            "interval; LCP: tokens before the first error; ROUGE-L: F1 on token ids; loss: of the true text",
        )
        for level in extraction["levels"]:
            table.add_row(
                str(level["exposures"]),
                f"{level['effective_exposures']:.4g}",
                str(level["canaries"]),
                f"{level['exact_matches']} ({level['exact_rate']:.0%})",
                f"{level['exact_low']:.0%} - {level['exact_high']:.0%}",
                f"{level['mean_prefix']:.1f}",
                f"{level['mean_rouge_l']:.3f}",
                f"{level['loss']:.3f}",
            )
        found.append(table)
    train, valid, mask = summary["losses"]["train"], summary["losses"]["valid"], summary["mask"]
    note = f"the run dropped nothing: kept and dropped are by a k = {mask['k']} mask that was not used"
    losses = _table("Loss, nothing masked", ["text", "tokens", "nats/token", "bits/byte"], note * mask["reference"])
    for key in ("kept", "dropped"):
        if train[f"loss_{key}"] is not None:
            losses.add_row(f"training, {key}", f"{train[f'tokens_{key}']:,}", f"{train[f'loss_{key}']:.4f}", "")
    if valid is not None:
        bits = "" if valid["bits_per_byte"] is None else f"{valid['bits_per_byte']:.4f}"
        losses.add_row("validation", f"{valid['tokens']:,}", f"{valid['loss']:.4f}", bits)
    found.append(losses)
    return found


def _table(title: str, headings: Sequence[str], caption: str) -> Table:
    table = Table(title=title, caption=caption or None, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    table.caption_justify = "left"
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "text" else "right", no_wrap=True)
    return table
