"""The audit of a model, from the named path to the files and the printed figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console

from megafish.audit.auditor import Auditor
from megafish.audit.extraction import Extraction, record
from megafish.audit.levels import summarize
from megafish.audit.probes import ProbeSet
from megafish.audit.tables import tables
from megafish.audit.target import SPENT, Target, load_target
from megafish.audit.verdict import verdict
from megafish.audit.view import FORMAT, VERSION, RunView
from megafish.audit.writing import restore, write_audit
from megafish.data.tokenizer import Tokenizer
from megafish.model.flops import parameter_count
from megafish.processes import joined_processes, together
from megafish.train.track import Recited, publish_audit

Extracted = tuple[ProbeSet, list[Extraction]]
"""A set of passages and what the model made of each."""
RECITED_ROWS = 64
"""Lines of the table of recited text on the run's wandb and TensorBoard pages."""


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
    output: str | Path | None = None,
    full: bool = False,
    progress: bool = True,
    console: Console | None = None,
) -> AuditResult:
    """Audit a run (or a checkpoint folder inside it) or a Hugging Face folder, and print the figures.

    A run's audit is RUN/audit/step_XXXXXXXX/, that of a Hugging Face folder `output`/audit/step_00000000/. It holds
    extraction.jsonl (one line a passage: text, continuation, scores), summary.json and the plots as PNG; it appears
    when it is complete and takes the place of an earlier audit of the same step. `step`: which checkpoint, the latest
    by default. `overrides`: see load_target, e.g. "audit.prompt_tokens=32". `full`: sweep prompt lengths and offsets,
    draw samples and search with beams where the settings ask for none. `progress`: bars on standard error. Raises
    InputError where the model, its data or the settings do not fit.

    Of several processes (torchrun, srun) each has the whole model and does its share of the batches; the first one
    writes and prints.
    """
    with joined_processes() as processes:
        target = together(lambda: load_target(path, step=step, overrides=overrides, output=output))

        def opened() -> Auditor:
            return Auditor(target, progress=progress, full=full, processes=processes)

        # The first one first: what is built once beside a corpus (a suffix array) the others find there.
        if processes.is_main:
            restore(target.folder)
        first = together(lambda: opened() if processes.is_main else None)
        auditor = together(lambda: first or opened())
        summary, sets = _measured(target, auditor)
        if processes.is_main:
            _write(target, summary, sets)
            _print(target, summary, console or Console())
    return AuditResult(target.folder, summary)


def _write(target: Target, summary: dict[str, Any], sets: list[Extracted]) -> None:
    """The audit's folder, and its figures on the run's pages."""
    records = [{"set": each.name, **record(item, target.tokenizer)} for each, items in sets for item in items]
    if not target.run.checkpoints.exists():
        target.run.save_config(target.config)  # of a Hugging Face folder: what a report is made from
    view = RunView(target.run.path, target.config.name, target.config, {}, [summary], records)
    write_audit(target.folder, summary, records, view)
    canaries = _canaries(sets)
    if canaries and target.state is not None:
        levels = summary["extraction"]["levels"]
        rates = {f"recited_{level['exposures']}": level["exact_rate"] for level in levels}
        publish_audit(target.run, target.config, target.step, rates, _recited(canaries, target.tokenizer))


def _print(target: Target, summary: dict[str, Any], console: Console) -> None:
    for table in tables(summary):
        console.print(table)
    for line in (*summary["notes"], f"verdict: {summary['verdict']['text']}"):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"written to {target.folder}", highlight=False, soft_wrap=True)


def _measured(target: Target, auditor: Auditor) -> tuple[dict[str, Any], list[Extracted]]:
    """The figures, and what was made of each passage. Collective."""
    sets = [(each, auditor.extract(each)) for each in auditor.sets]
    canaries = _canaries(sets)
    others = [(each, items) for each, items in sets if each.kind != "canaries"]
    spent = target.spent or dict.fromkeys(SPENT)
    model = target.model
    summary: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "run": target.config.name,
        "model": {"path": str(target.path), "parameters": parameter_count(model.config, model.vocab_size)},
        "step": target.step,
        **spent,
        "settings": auditor.settings.model_dump(),
        "mask": None if auditor.mask is None else {**auditor.mask.describe(), "reference": auditor.reference},
        "extraction": summarize(canaries) if canaries else None,
        "probes": [{"name": each.name, "kind": each.kind, **summarize(items)} for each, items in others],
        "sweep": auditor.sweep(),
        "beams": auditor.beams(),
        "membership": auditor.membership(),
        "losses": auditor.losses(),
        "notes": auditor.notes,
    }
    summary["verdict"] = verdict(summary)
    return summary, sets


def _canaries(sets: list[Extracted]) -> list[Extraction]:
    return next((items for each, items in sets if each.kind == "canaries"), [])


def _recited(extractions: list[Extraction], tokenizer: Tokenizer) -> list[Recited]:
    """What a table of an audit shows: those with most copies first, and of them what was reproduced furthest."""
    order = sorted(extractions, key=lambda item: (-(item.probe.exposures or 0), -item.prefix_length))[:RECITED_ROWS]
    return [
        Recited(
            item.probe.exposures or 0,
            item.exact,
            item.prefix_length,
            *(tokenizer.decode(ids) for ids in (item.prompt, item.generated, item.suffix)),
        )
        for item in order
    ]
